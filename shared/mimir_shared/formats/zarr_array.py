"""Arrays of a zarr v3 group, written clip by clip as plain bytes.

An array is one file: the sharding codec puts one chunk a clip behind the other, each followed by its crc32c and by
zeros up to the next cache line (safetensors_bytes.py says why), and the table of where they begin at the end. No
compressor: a clip's tensor is one range of raw bytes. Written by hand because the library takes whole shards in memory;
the tests read everything back with the library.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import google_crc32c
import numpy as np

from mimir_shared.formats.shard_format import HashingFile, NewFile
from mimir_shared.safetensors_bytes import whole_lines

METADATA: Final = "zarr.json"

_CHECKSUM: Final = {"name": "crc32c"}
_CHECKSUM_BYTES: Final = 4


@dataclass(frozen=True, kw_only=True)
class ArrayKind:
    """What the clips of an array have in common."""

    data_type: str
    """As zarr names it."""
    item_bytes: int
    """Of one element."""
    item_shape: tuple[int, ...]
    """Of one clip; of a ragged array without its first dim."""
    is_ragged: bool = False
    """Clips differ in their first dim: they are padded with zeros to the longest of the shard."""
    dims: tuple[str, ...]
    """Names of the dims of one clip."""
    attributes: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Member:
    """A written file of a group."""

    name: str
    """Relative to the group."""
    file: HashingFile


def write_member(name: str, data: bytes, new_file: NewFile) -> Member:
    """Write a whole file of a group."""
    file = HashingFile(new_file())
    file.write(data)
    return Member(name=name, file=file)


def metadata_bytes(document: Mapping[str, Any]) -> bytes:
    """A zarr.json; equal for equal documents."""
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def write_integers(name: str, values: Sequence[int], new_file: NewFile) -> list[Member]:
    """A whole int32 array of one dim in one chunk; an empty one has no chunk."""
    kind = ArrayKind(data_type="int32", item_bytes=4, item_shape=(), dims=(), attributes={})
    codecs = [_to_bytes(4), _CHECKSUM]
    document = _array_document(kind, len(values), (), codecs)
    members = [write_member(f"{name}/{METADATA}", metadata_bytes(document), new_file)]
    if values:
        data = np.array(values, "<i4").tobytes()
        members.append(write_member(f"{name}/c.0", _with_checksum(data), new_file))
    return members


class ArrayWriter:
    """One array of a group while clips are appended to it."""

    def __init__(self, name: str, kind: ArrayKind, new_file: NewFile) -> None:
        self.name = name
        self._kind = kind
        self._new_file = new_file
        # Of a ragged array the clips wait unpadded: how long the longest is, only the last clip tells.
        self._file = HashingFile(new_file())
        self._lengths: list[int] = []

    def append(self, data: bytes, length: int | None = None) -> None:
        """Append one clip's raw bytes; of a ragged array with the size of its first dim."""
        if self._kind.is_ragged:
            assert length is not None, f"{self.name} is ragged"
            self._file.write(data)
            self._lengths.append(length)
        else:
            assert len(data) == self.chunk_bytes, f"{self.name}: {len(data)} bytes, expected {self.chunk_bytes}"
            self._write_chunk(self._file, data)
            self._lengths.append(0)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Of one clip; of a ragged array only at the end what it will be. Zarr has no chunk of length 0."""
        leading = (max(1, *self._lengths, 0),) if self._kind.is_ragged else ()
        return leading + self._kind.item_shape

    @property
    def chunk_bytes(self) -> int:
        return int(np.prod(self.chunk_shape, dtype=np.int64)) * self._kind.item_bytes

    def offset(self, number: int) -> int:
        """Of the bytes of the clip that was appended as the `number`-th, in `data_name`, once finished."""
        return number * self._stride if self.chunk_bytes else 0

    @property
    def data_name(self) -> str:
        """The file that holds the clips. A tensor without elements has none, and lies nowhere in zarr.json."""
        shape = (0, *self.chunk_shape)
        return f"{self.name}/c.{'.'.join('0' * len(shape))}" if self.chunk_bytes else f"{self.name}/{METADATA}"

    def finish(self) -> list[Member]:
        """Write what can be written only now; every file of the array."""
        codec = {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": [1, *(max(1, size) for size in self.chunk_shape)],
                "codecs": [_to_bytes(self._kind.item_bytes), _CHECKSUM],
                "index_codecs": [_to_bytes(8), _CHECKSUM],
                "index_location": "end",
            },
        }
        document = _array_document(self._kind, len(self._lengths), self.chunk_shape, [codec])
        members = [write_member(f"{self.name}/{METADATA}", metadata_bytes(document), self._new_file)]
        if self._kind.is_ragged:
            members += write_integers(f"{self.name}_lengths", self._lengths, self._new_file)
        if self._lengths and self.chunk_bytes:
            file = self._padded() if self._kind.is_ragged else self._file
            file.write(self._chunk_table())
            members.append(Member(name=self.data_name, file=file))
        return members

    def _padded(self) -> HashingFile:
        """The clips of a ragged array, each filled up with zeros."""
        row_bytes = self.chunk_bytes // self.chunk_shape[0]
        self._file.temporary.file.flush()
        padded = HashingFile(self._new_file())
        with open(self._file.temporary.path, "rb") as unpadded:
            for length in self._lengths:
                data = unpadded.read(length * row_bytes)
                assert len(data) == length * row_bytes, f"{self.name}: {len(data)} bytes for {length} rows"
                self._write_chunk(padded, data.ljust(self.chunk_bytes, b"\0"))
        return padded

    def _write_chunk(self, file: HashingFile, data: bytes) -> None:
        if data:
            file.write(_with_checksum(data).ljust(self._stride, b"\0"))

    @property
    def _stride(self) -> int:
        """Bytes from chunk to chunk."""
        return whole_lines(self.chunk_bytes + _CHECKSUM_BYTES)

    def _chunk_table(self) -> bytes:
        """(offset, bytes) of every chunk, as the sharding codec wants them."""
        table = np.empty((len(self._lengths), 2), "<u8")
        table[:, 0] = np.arange(len(self._lengths)) * self._stride
        table[:, 1] = self.chunk_bytes + _CHECKSUM_BYTES
        return _with_checksum(table.tobytes())


def _with_checksum(data: bytes) -> bytes:
    return data + struct.pack("<I", google_crc32c.value(data))


def _to_bytes(item_bytes: int) -> dict[str, Any]:
    return {"name": "bytes"} if item_bytes == 1 else {"name": "bytes", "configuration": {"endian": "little"}}


def _array_document(
    kind: ArrayKind, num_clips: int, clip_shape: tuple[int, ...], codecs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    shape = [num_clips, *clip_shape]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": kind.data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, size) for size in shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0,
        "codecs": list(codecs),
        "attributes": dict(kind.attributes),
        "dimension_names": ["clip", *kind.dims],
    }
