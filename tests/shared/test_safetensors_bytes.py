"""Our safetensors bytes against the safetensors library, and the places that we say tensors lie at."""

import json
import struct
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from mimir_shared.errors import CacheError
from mimir_shared.features import NUMPY_DTYPES, FeatureTensor, float32_to_bf16_bits
from mimir_shared.safetensors_bytes import read_header, read_tensors, tensor_at, tensors_to_safetensors

_TORCH = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "i32": torch.int32}

tensors_strategy = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(
        st.sampled_from(sorted(NUMPY_DTYPES)), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 2**32 - 1)
    ),
    max_size=5,
)


def _tensor(dtype: str, shape: list[int], seed: int) -> FeatureTensor:
    count = int(np.prod(shape))
    raw = np.random.default_rng(seed).integers(0, 256, count * NUMPY_DTYPES[dtype].itemsize, dtype=np.uint8)
    return FeatureTensor(raw.view(NUMPY_DTYPES[dtype]).reshape(shape), dtype)  # type: ignore[arg-type]


@given(tensors_strategy)
def test_the_library_reads_what_we_write_and_so_do_we(described: dict[str, tuple[str, list[int], int]]) -> None:
    tensors = {name: _tensor(*what) for name, what in described.items()}
    data = tensors_to_safetensors(tensors)
    library, ours = load(data), read_tensors(data, "here")
    assert set(library) == set(ours) == set(tensors)
    for name, tensor in tensors.items():
        assert library[name].dtype == _TORCH[tensor.dtype]
        assert list(library[name].shape) == list(tensor.array.shape) == list(ours[name].array.shape)
        assert ours[name].array.tobytes() == tensor.array.tobytes()
        assert library[name].reshape(-1).view(torch.uint8).numpy().tobytes() == tensor.array.tobytes()


@given(tensors_strategy)
def test_each_place_holds_the_bytes_of_its_tensor_without_gaps(
    described: dict[str, tuple[str, list[int], int]],
) -> None:
    tensors = {name: _tensor(*what) for name, what in described.items()}
    data = tensors_to_safetensors(tensors)
    places = read_header(data, "here")
    assert not places or places[0].offset % 64 == 0
    for before, after in pairwise(places):
        assert before.offset + before.nbytes == after.offset
    for place in places:
        assert data[place.offset : place.offset + place.nbytes] == tensors[place.name].array.tobytes()
        assert place.offset % NUMPY_DTYPES[place.dtype].itemsize == 0


def test_metadata_is_read_by_the_library_and_no_tensor() -> None:
    data = tensors_to_safetensors({"x": _tensor("f32", [2], 0)}, {"b": "2", "a": "1"})
    length = struct.unpack("<Q", data[:8])[0]
    assert json.loads(data[8 : 8 + length])["__metadata__"] == {"b": "2", "a": "1"}
    assert [place.name for place in read_header(data, "here")] == ["x"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 16,
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 8) + b'{"x":1}}',
        struct.pack("<Q", 58) + b'{"x":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}    ',
    ],
)
def test_hostile_headers_are_refused(data: bytes) -> None:
    with pytest.raises(CacheError, match="here"):
        read_header(data, "here")


def test_a_place_outside_the_bytes_or_of_another_size_is_refused() -> None:
    data = tensors_to_safetensors({"x": _tensor("f32", [4], 0)})
    (place,) = read_header(data, "here")
    with pytest.raises(CacheError, match="should take 16 bytes"):
        tensor_at(data[:-1], place, base=0, where="here")


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_bfloat16_is_rounded_as_torch_rounds_it(values: list[float]) -> None:
    array = np.array(values, np.float32)
    bits = float32_to_bf16_bits(array)
    expected = torch.from_numpy(array).to(torch.bfloat16)
    got = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    widened = FeatureTensor(bits, "bf16").to_float32()
    np.testing.assert_array_equal(widened, got.to(torch.float32).numpy())
