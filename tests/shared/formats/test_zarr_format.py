"""What a zarr shard is to the zarr library; what all formats have in common is in test_format_contract."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr

from mimir_shared.manifest import CommitRecord
from tests.shared.shards import Sample, counted, specs_of, write_shard


def group_of(root: Path, record: CommitRecord) -> zarr.Group:
    folder = "/".join(record.metadata.files[0].path.split("/")[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a plain reader is not warned about anything
        return zarr.open_group(root / folder, mode="r")


def text_sample(row: int, length: int) -> Sample:
    tensors = {
        "query_hidden": counted("bf16", length, 3, start=10 * row),
        "t5_embeds": counted("f32", 4, 2, start=row),
        "ids": counted("i32", 5, start=row),
    }
    document = {"key": f"k{row}", "caption": "café" * length}
    return Sample(row=row, document=document, tensors=tensors, specs=specs_of(tensors, "query_hidden"))


def test_the_library_reads_rows_keys_tensors_and_documents(tmp_path: Path) -> None:
    samples = [text_sample(row, length) for row, length in ((0, 2), (3, 5), (4, 0))]
    group = group_of(tmp_path, write_shard(tmp_path, "zarr", samples))
    assert group["rows"][:].tolist() == [0, 3, 4]
    assert group.attrs["keys"] == ["k0", "k3", "k4"]
    assert group["query_hidden"].attrs["dtype"] == "bf16"
    assert group["query_hidden_lengths"][:].tolist() == [2, 5, 0]
    for number, sample in enumerate(samples):
        for name in ("t5_embeds", "ids"):
            np.testing.assert_array_equal(group[name][number], sample.tensors[name].array)
        length = group["query_hidden_lengths"][number]
        np.testing.assert_array_equal(group["query_hidden"][number, :length], sample.tensors["query_hidden"].array)
        assert not group["query_hidden"][number, length:].any()
        text = group["documents"][number, : group["documents_lengths"][number]].tobytes()
        assert json.loads(text) == sample.document


def test_arrays_have_one_chunk_a_clip_in_one_file_with_checksums_and_named_dims(tmp_path: Path) -> None:
    record = write_shard(tmp_path, "zarr", [text_sample(row, 2) for row in range(3)])
    group = group_of(tmp_path, record)
    array = group["t5_embeds"]
    assert (array.shape, array.chunks, array.shards) == ((3, 4, 2), (1, 4, 2), (3, 4, 2))
    assert array.metadata.dimension_names == ("clip", "d0", "d1")
    assert "Crc32cCodec" in repr(array.metadata.codecs)
    files = [file.path for file in record.metadata.files if "/t5_embeds/" in file.path]
    assert [path.rpartition("/")[2] for path in files] == ["c.0.0.0", "zarr.json"]


def test_each_bucket_is_a_group_with_rows_of_its_own(tmp_path: Path) -> None:
    def sample(row: int, bucket: str, frames: int) -> Sample:
        tensors = {"vae_moments": counted("bf16", 4, frames, 2, 2, start=row)}
        return Sample(row=row, document={"key": f"k{row}"}, tensors=tensors, specs=specs_of(tensors), bucket=bucket)

    samples = [sample(0, "9x8x8", 3), sample(2, "1x8x8", 1), sample(3, "9x8x8", 3)]
    group = group_of(tmp_path, write_shard(tmp_path, "zarr", samples))
    assert group["rows"][:].tolist() == [0, 2, 3]
    assert group["9x8x8/rows"][:].tolist() == [0, 3]
    assert group["1x8x8"].attrs["keys"] == ["k2"]
    np.testing.assert_array_equal(group["9x8x8/vae_moments"][1], samples[2].tensors["vae_moments"].array)
    np.testing.assert_array_equal(group["1x8x8/vae_moments"][0], samples[1].tensors["vae_moments"].array)


def test_a_group_without_clips_can_be_opened(tmp_path: Path) -> None:
    group = group_of(tmp_path, write_shard(tmp_path, "zarr", []))
    assert group["rows"].shape == (0,)
    assert group["documents"].shape == (0, 1)
    assert group.attrs["keys"] == []


def test_the_checksum_that_the_library_checks_is_ours(tmp_path: Path) -> None:
    record = write_shard(tmp_path, "zarr", [text_sample(0, 2)])
    path = tmp_path / next(file.path for file in record.metadata.files if file.path.endswith("t5_embeds/c.0.0.0"))
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"(?i)checksum"):
        group_of(tmp_path, record)["t5_embeds"][0]


def test_the_groups_own_document_is_published_last(tmp_path: Path) -> None:
    files = write_shard(tmp_path, "zarr", [text_sample(0, 2)]).metadata.files
    assert [file.path.count("/") for file in files if file.path.endswith("/zarr.json")][-1] == 2
    assert files[-1].path.endswith(".zarr/zarr.json")
