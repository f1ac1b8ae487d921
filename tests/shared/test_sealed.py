"""Sealed files: what is read is what was written, or nothing is."""

import random

import numpy as np
import pyarrow as pa
import pytest

from mimir_shared.errors import CacheError
from mimir_shared.features import FeatureTensor
from mimir_shared.manifest import RecordMetadata, SampleRecord, read_record, write_record
from mimir_shared.safetensors_bytes import read_tensors
from mimir_shared.sealed import (
    check_sealed_tensors,
    read_sealed_json,
    read_sealed_table,
    write_sealed_json,
    write_sealed_table,
    write_sealed_tensors,
)


def _record() -> bytes:
    samples = [
        SampleRecord(row=n, key=f"clip-{n}", status="quarantined", stage="decode", reason="truncated", caption_xxh3=n)
        for n in range(64)
    ]
    metadata = RecordMetadata(
        feature="t5", shard=3, generation=0, format="webdataset", fingerprint="a" * 64, plan="b" * 64,
        files=(), ok=0, quarantined=64, statistics={},
    )  # fmt: skip
    return write_record(metadata, samples)


def test_a_sealed_table_gives_back_its_rows_and_metadata() -> None:
    table = pa.table({"a": [1, 2, None], "b": ["x", "é", None]})
    read, metadata = read_sealed_table(write_sealed_table(table, {"k": "v"}), "here")
    assert read.equals(table)
    assert metadata["k"] == "v"
    assert len(metadata["seal"]) == 64


def test_equal_tables_are_sealed_to_equal_bytes() -> None:
    table = pa.table({"a": list(range(1000))})
    assert write_sealed_table(table, {"k": "v"}) == write_sealed_table(table, {"k": "v"})


def test_a_commit_record_with_any_of_2000_single_bits_flipped_is_refused() -> None:
    data = _record()
    assert len(read_record(data, "here").samples) == 64
    choose = random.Random(0)
    for bit in choose.sample(range(len(data) * 8), 2000):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(CacheError, match="here"):
            read_record(bytes(flipped), "here")


def test_a_commit_record_cut_at_any_byte_is_refused() -> None:
    data = _record()
    for length in range(len(data)):
        with pytest.raises(CacheError):
            read_record(data[:length], "here")


def test_a_record_with_bytes_added_is_refused() -> None:
    with pytest.raises(CacheError, match="does not match the sha256"):
        read_record(_record() + b"\0", "here")


def test_a_plain_parquet_file_is_no_record() -> None:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.table({"a": [1]}), sink)
    with pytest.raises(CacheError):
        read_sealed_table(sink.getvalue().to_pybytes(), "here")


def test_a_sealed_table_without_our_footer_is_told_from_a_record() -> None:
    data = write_sealed_table(pa.table({"a": [1]}), {})
    with pytest.raises(CacheError, match="expected"):
        read_record(data, "here")


@pytest.mark.parametrize("kind", ["json", "tensors"])
def test_sealed_json_and_tensors_refuse_every_flipped_byte(kind: str) -> None:
    tensors = {"x": FeatureTensor(np.arange(6, dtype=np.uint16).reshape(2, 3), "bf16")}
    if kind == "json":
        data = write_sealed_json({"text": "répondre", "ids": [1, 2]})
        assert read_sealed_json(data, "here")["ids"] == [1, 2]
    else:
        data = write_sealed_tensors(tensors, {"note": "y"})
        check_sealed_tensors(data, "here")
        assert read_tensors(data, "here")["x"].array.tolist() == [[0, 1, 2], [3, 4, 5]]
    for position in range(len(data)):
        damaged = data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]
        with pytest.raises(CacheError):
            (read_sealed_json if kind == "json" else check_sealed_tensors)(damaged, "here")
