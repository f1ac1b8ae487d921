"""The places in a commit record lead to what was written, and nothing else passes for it."""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimir_shared.errors import CacheError
from mimir_shared.features import FeatureTensor
from mimir_shared.formats.webdataset import WebDatasetWriter
from mimir_shared.manifest import (
    RECORD_SCHEMA,
    CommitRecord,
    DataFile,
    RecordMetadata,
    SampleRecord,
    read_record,
    write_record,
)
from mimir_shared.sealed import read_sealed_table, write_sealed_table
from mimir_shared.shard_files import ShardFiles
from mimir_shared.storage import LocalStorage

Sample = tuple[dict[str, object], dict[str, FeatureTensor]]


def _float(*shape: int) -> FeatureTensor:
    return FeatureTensor(np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape), "f32")


def _write(root: Path, samples: Sequence[Sample]) -> CommitRecord:
    with open(root / "shard.tar", "wb") as file:
        writer = WebDatasetWriter(file, 0)
        records = [
            SampleRecord(row=row, key=f"k{row}", status="ok", caption_xxh3=0, stored=writer.add(row, *sample))
            for row, sample in enumerate(samples)
        ]
        nbytes, sha256 = writer.finish()
    metadata = RecordMetadata(
        feature="t5", shard=0, generation=0, format="webdataset", fingerprint="0" * 64, plan="0" * 64,
        files=(DataFile(path="shard.tar", bytes=nbytes, sha256=sha256),), ok=len(records), quarantined=0, statistics={},
    )  # fmt: skip
    return read_record(write_record(metadata, records), "here")


@given(st.lists(st.tuples(st.text(max_size=30), st.lists(st.integers(0, 5), max_size=3)), max_size=6))
def test_the_places_lead_to_what_was_written(described: list[tuple[str, list[int]]]) -> None:
    samples: list[Sample] = [({"text": text}, {"x": _float(*shape)}) for text, shape in described]
    with tempfile.TemporaryDirectory() as folder:
        record = _write(Path(folder), samples)
        files = ShardFiles(LocalStorage(Path(folder)), ".", record)
        for (document, tensors), sample in zip(samples, record.samples, strict=True):
            assert files.read_document(sample) == document
            np.testing.assert_array_equal(files.read_tensors(sample)["x"].array, tensors["x"].array)


def test_a_flipped_byte_in_a_sample_is_refused_and_named(tmp_path: Path) -> None:
    record = _write(tmp_path, [({"text": "hello"}, {"x": _float(8)})])
    (sample,) = record.samples
    assert sample.stored is not None
    whole = (tmp_path / "shard.tar").read_bytes()
    for offset, read in (
        (sample.stored.tensors[0].offset, ShardFiles.read_tensors),
        (sample.stored.json_offset, ShardFiles.read_document),
    ):
        damaged = bytearray(whole)
        damaged[offset + 3] ^= 1
        (tmp_path / "shard.tar").write_bytes(damaged)
        files = ShardFiles(LocalStorage(tmp_path), ".", record)
        with pytest.raises(CacheError, match=r"shard\.tar.*'k0'.*row 0"):
            read(files, sample)


def test_a_missing_and_a_cut_file_are_refused_and_named(tmp_path: Path) -> None:
    record = _write(tmp_path, [({"text": "hello"}, {"x": _float(8)})])
    path = tmp_path / "shard.tar"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(CacheError, match=r"shard\.tar.*'k0'"):
        ShardFiles(LocalStorage(tmp_path), ".", record).read_tensors(record.samples[0])
    path.unlink()
    with pytest.raises(CacheError, match=r"shard\.tar: miss"):
        ShardFiles(LocalStorage(tmp_path), ".", record).read_tensors(record.samples[0])


def test_a_record_of_another_release_is_refused_by_its_version(tmp_path: Path) -> None:
    record = _write(tmp_path, [({}, {"x": _float(2)})])
    data = write_record(record.metadata, record.samples)
    table, footer = read_sealed_table(data, "here")
    assert table.schema == RECORD_SCHEMA
    old = write_sealed_table(
        table.drop_columns(["json_file"]), {"mimir": footer["mimir"].replace('"version":2', '"version":1')}
    )
    assert hashlib.sha256(old).digest() != hashlib.sha256(data).digest()
    with pytest.raises(CacheError, match=r"record of version 1, expected 2.*another release.*new --cache"):
        read_record(old, "here")
