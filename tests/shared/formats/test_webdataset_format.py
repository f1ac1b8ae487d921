"""What a tar shard is to tools that are not ours; what all formats have in common is in test_format_contract."""

import json
import tarfile
from pathlib import Path

import numpy as np
import webdataset
from safetensors.numpy import load

from mimir_shared.formats.webdataset import document_bytes
from tests.shared.shards import Sample, counted, write_shard


def write_tar(root: Path) -> Path:
    samples = [
        Sample(row=0, document={"key": "a"}, tensors={"x": counted("f32", 2, 3)}),
        Sample(row=2, document={"key": "b"}, tensors={"x": counted("f32", 1)}),
    ]
    (file,) = write_shard(root, "webdataset", samples).metadata.files
    return root / file.path


def test_plain_tar_and_webdataset_see_every_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path)
    with tarfile.open(path) as tar:
        names = tar.getnames()
    assert names == ["00000700000.json", "00000700000.safetensors", "00000700002.json", "00000700002.safetensors"]
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [json.loads(sample["json"])["key"] for sample in samples] == ["a", "b"]
    np.testing.assert_array_equal(load(samples[0]["safetensors"])["x"], counted("f32", 2, 3).array)


def test_members_have_no_owner_and_no_time(tmp_path: Path) -> None:
    with tarfile.open(write_tar(tmp_path)) as tar:
        owners = {(entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname) for entry in tar}
    assert owners == {(0, 0, 0, "", "")}


def test_documents_are_written_with_sorted_keys_as_utf8() -> None:
    assert document_bytes({"b": "é", "a": [1]}) == '{"a":[1],"b":"é"}'.encode()
