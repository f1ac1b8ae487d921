"""A shard as a tar: read by `tarfile` and `webdataset`, by our offsets, and equal for equal samples."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from mimir_shared.errors import CacheError
from mimir_shared.features import FeatureTensor
from mimir_shared.formats.webdataset import WebDatasetWriter, document_bytes, read_document, read_tensors
from mimir_shared.manifest import SampleRecord


def _write(samples: list[tuple[int, dict[str, object], dict[str, FeatureTensor]]]) -> tuple[bytes, list[SampleRecord]]:
    file = io.BytesIO()
    writer = WebDatasetWriter(file, 7)
    records = [
        SampleRecord(row=row, key=f"k{row}", status="ok", caption_xxh3=0, stored=writer.add(row, document, tensors))
        for row, document, tensors in samples
    ]
    nbytes, _ = writer.finish()
    assert nbytes == len(file.getvalue())
    return file.getvalue(), records


def _float(*shape: int) -> FeatureTensor:
    return FeatureTensor(np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape), "f32")


def test_plain_tar_and_webdataset_see_every_sample(tmp_path: Path) -> None:
    data, _ = _write([(0, {"key": "a"}, {"x": _float(2, 3)}), (2, {"key": "b"}, {"x": _float(1)})])
    (tmp_path / "shard.tar").write_bytes(data)
    with tarfile.open(tmp_path / "shard.tar") as tar:
        names = tar.getnames()
    assert names == ["00000700000.json", "00000700000.safetensors", "00000700002.json", "00000700002.safetensors"]
    samples = list(webdataset.WebDataset(str(tmp_path / "shard.tar"), shardshuffle=False))
    assert [json.loads(sample["json"])["key"] for sample in samples] == ["a", "b"]
    np.testing.assert_array_equal(load(samples[0]["safetensors"])["x"], _float(2, 3).array)


@given(st.lists(st.tuples(st.text(max_size=30), st.lists(st.integers(0, 5), max_size=3)), max_size=6))
def test_our_offsets_lead_to_what_was_written(described: list[tuple[str, list[int]]]) -> None:
    samples = [(row * 2, {"text": text}, {"x": _float(*shape)}) for row, (text, shape) in enumerate(described)]
    data, records = _write(samples)
    for (_, document, tensors), record in zip(samples, records, strict=True):
        assert read_document(io.BytesIO(data), record, "here") == document
        np.testing.assert_array_equal(read_tensors(io.BytesIO(data), record, "here")["x"].array, tensors["x"].array)


def test_equal_samples_give_equal_bytes_and_entries_have_no_owner_or_time() -> None:
    samples = [(0, {"b": 1, "a": "ü"}, {"x": _float(2), "y": _float(3)})]
    first, _ = _write(samples)
    second, _ = _write([(0, {"a": "ü", "b": 1}, {"y": _float(3), "x": _float(2)})])
    assert first == second
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        owners = {(entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname) for entry in tar}
    assert owners == {(0, 0, 0, "", "")}


def test_a_flipped_byte_in_a_sample_is_refused_and_named() -> None:
    data, (record,) = _write([(0, {"text": "hello"}, {"x": _float(8)})])
    assert record.stored is not None
    for offset, read in ((record.stored.tensors[0].offset, read_tensors), (record.stored.json_offset, read_document)):
        damaged = bytearray(data)
        damaged[offset + 3] ^= 1
        with pytest.raises(CacheError, match=r"shard\.tar.*'k0'.*row 0"):
            read(io.BytesIO(bytes(damaged)), record, "shard.tar")


def test_documents_are_written_with_sorted_keys_as_utf8() -> None:
    assert document_bytes({"b": "é", "a": [1]}) == '{"a":[1],"b":"é"}'.encode()
