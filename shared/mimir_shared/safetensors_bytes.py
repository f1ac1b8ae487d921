"""The bytes of a safetensors file, the same for the same tensors, and where each tensor lies in them.

The library's own `serialize` takes raw addresses, writes metadata in the order of a hash map, and does
not say at what offset a tensor came to lie; the cache needs equal bytes and the offsets. Files are read
by the library in the tests.
"""

import itertools
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mimir_shared.errors import CacheError
from mimir_shared.features import NUMPY_DTYPES, DType, FeatureTensor
from mimir_shared.plain_documents import parse_json

_NAMES: dict[str, str] = {"bf16": "BF16", "f16": "F16", "f32": "F32", "i32": "I32"}
ALIGNMENT = 64
"""Bytes that the place of a file's first tensor is a multiple of: a cache line. What begins at the same place of a line
as the memory that it is read to is copied a quarter faster. The format itself asks for 8."""
_LENGTH = struct.Struct("<Q")
"""Of the header; it comes first."""
_MAX_HEADER_BYTES = 100_000_000
"""The library's own limit: a longer header is refused, whatever its length field says."""


def whole_lines(nbytes: int) -> int:
    """So many bytes, and those up to the next multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """Where one tensor lies in a file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: int = 0
    """Which of the files that belong together, where there are several."""
    offset: int
    """Of the first byte, from the start of the file."""
    nbytes: int


def stored_order(tensors: Mapping[str, FeatureTensor]) -> list[tuple[str, FeatureTensor]]:
    """Widest dtype first, then by name: without gaps, every tensor is aligned to its item size."""
    return sorted(tensors.items(), key=lambda item: (-item[1].array.itemsize, item[0]))


def tensors_to_safetensors(tensors: Mapping[str, FeatureTensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The tensors in stored order, without gaps; the first at a multiple of 64 bytes."""
    ordered = stored_order(tensors)
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(metadata)
    position = 0
    for name, tensor in ordered:
        end = position + tensor.array.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.array.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(whole_lines(_LENGTH.size + len(text)) - _LENGTH.size)
    return b"".join([_LENGTH.pack(len(text)), text, *(tensor.array.tobytes() for _, tensor in ordered)])


def read_header(data: bytes, where: str) -> list[TensorPlace]:
    """The tensors of a file, in the order in which they lie. Raises CacheError for a bad header."""
    names = {value: key for key, value in _NAMES.items()}
    try:
        (length,) = _LENGTH.unpack_from(data)
        begin = _LENGTH.size
        assert length <= min(_MAX_HEADER_BYTES, len(data) - begin), f"header of {length} bytes in a file of {len(data)}"
        header = parse_json(data[begin : begin + length])
        places = []
        for name, entry in header.items():
            if name != "__metadata__":
                first, end = entry["data_offsets"]
                numbers = (first, end, *entry["shape"])
                assert all(type(number) is int and number >= 0 for number in numbers), f"{name!r} has {numbers}"
                places.append(
                    TensorPlace(
                        name=name,
                        dtype=names[entry["dtype"]],  # type: ignore[arg-type]
                        shape=tuple(entry["shape"]),
                        offset=begin + length + first,
                        nbytes=end - first,
                    )
                )
    except (AssertionError, KeyError, ValueError, TypeError, AttributeError, struct.error) as fault:
        raise CacheError(f"{where}: not a readable safetensors file ({fault}); it is damaged") from fault
    places.sort(key=lambda place: place.offset)
    for before, after in itertools.pairwise(places):
        if after.offset < before.offset + before.nbytes:
            raise CacheError(f"{where}: {before.name!r} and {after.name!r} share bytes; the file is damaged")
    return places


def read_tensors(data: bytes, where: str) -> dict[str, FeatureTensor]:
    """Every tensor of a file, as views of `data`. Raises CacheError where header and bytes disagree."""
    return {place.name: tensor_at(data, place, base=0, where=where) for place in read_header(data, where)}


def tensor_at(data: bytes | bytearray | memoryview, place: TensorPlace, *, base: int, where: str) -> FeatureTensor:
    """View one tensor in bytes that begin at file offset `base`.

    Raises: CacheError where the place lies outside the bytes or its size does not fit its shape.
    """
    dtype = NUMPY_DTYPES[place.dtype]
    count = math.prod(place.shape)  # in Python's integers: a product of hostile dims must not wrap around
    begin = place.offset - base
    if count * dtype.itemsize != place.nbytes or min((begin, *place.shape)) < 0 or begin + place.nbytes > len(data):
        raise CacheError(
            f"{where}: {place.name!r} should take {count * dtype.itemsize} bytes for dims {place.shape}, "
            f"its place has {place.nbytes} at offset {place.offset} of {base + len(data)}; the file is damaged"
        )
    array = np.frombuffer(data, dtype=dtype, count=count, offset=begin)
    return FeatureTensor(array.reshape(place.shape), place.dtype)
