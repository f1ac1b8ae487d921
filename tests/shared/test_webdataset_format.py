"""A shard as a tar: read by `tarfile` and `webdataset`, by our offsets, and equal for equal samples."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import webdataset
from safetensors.numpy import load

from mimir_shared.features import FeatureTensor
from mimir_shared.formats.webdataset import WebDatasetWriter, document_bytes
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


def test_equal_samples_give_equal_bytes_and_entries_have_no_owner_or_time() -> None:
    samples = [(0, {"b": 1, "a": "ü"}, {"x": _float(2), "y": _float(3)})]
    first, _ = _write(samples)
    second, _ = _write([(0, {"a": "ü", "b": 1}, {"y": _float(3), "x": _float(2)})])
    assert first == second
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        owners = {(entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname) for entry in tar}
    assert owners == {(0, 0, 0, "", "")}


def test_documents_are_written_with_sorted_keys_as_utf8() -> None:
    assert document_bytes({"b": "é", "a": [1]}) == '{"a":[1],"b":"é"}'.encode()
