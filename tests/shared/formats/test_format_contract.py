"""What every format of shards keeps to, checked for each of them alike."""

import hashlib
import os
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from mimir_shared.errors import CacheError
from mimir_shared.features import FeatureTensor, float32_to_bf16_bits
from mimir_shared.formats.open_format import open_shard_format
from mimir_shared.manifest import CacheFormat, CommitRecord, read_record, write_record
from mimir_shared.sealed import read_sealed_table, write_sealed_table
from mimir_shared.shard_files import ShardFiles
from mimir_shared.storage.folder import LocalStorage
from tests.fake_encoders import tree
from tests.shared.shards import Sample, counted, open_shard, specs_of, write_shard


def text_and_hidden(row: int, length: int) -> Sample:
    """A sample as `llm` has it: two ragged tensors and one of fixed shape, of two dtypes."""
    tensors = {
        "query_hidden": counted("bf16", length, 3, start=100 * row),
        "query_offsets": counted("i32", length, 2, start=row),
        "instruction_hidden": counted("bf16", 4, 3, start=row),
    }
    document = {"key": f"k{row}", "caption": "a café" * length}
    return Sample(row=row, document=document, tensors=tensors, specs=specs_of(tensors, "query_hidden", "query_offsets"))


def latents(row: int, bucket: str, frames: int) -> Sample:
    tensors = {"vae_moments": counted("bf16", 8, frames, 2, 3, start=row)}
    return Sample(
        row=row, document={"key": f"k{row}"}, tensors=tensors, specs=specs_of(tensors), bucket=bucket
    )  # fmt: skip


def read_back(root: Path, record: CommitRecord, samples: list[Sample]) -> None:
    """Every sample comes back bit for bit; rows that were not written have nothing."""
    written = {sample.row: sample for sample in samples}
    files = open_shard(root, record)
    for row in record.samples:
        if row.row not in written:
            assert row.stored is None
            continue
        expected = written[row.row]
        tensors = files.read_tensors(row)
        assert files.read_document(row) == expected.document
        assert tensors.keys() == expected.tensors.keys()
        for name, tensor in expected.tensors.items():
            assert tensors[name].dtype == tensor.dtype
            assert tensors[name].array.shape == tensor.array.shape
            assert tensors[name].array.tobytes() == tensor.array.tobytes()


@pytest.mark.parametrize("data_format", ["webdataset", "zarr"])
class TestFormat:
    def test_samples_come_back_as_they_were_written(self, data_format: CacheFormat, tmp_path: Path) -> None:
        samples = [text_and_hidden(row, length) for row, length in enumerate((5, 1, 9, 0))]
        read_back(tmp_path, write_shard(tmp_path, data_format, samples), samples)

    def test_samples_of_several_buckets_stand_in_one_shard(self, data_format: CacheFormat, tmp_path: Path) -> None:
        samples = [latents(0, "9x8x12", 3), latents(1, "1x8x12", 1), latents(2, "9x8x12", 3)]
        read_back(tmp_path, write_shard(tmp_path, data_format, samples), samples)

    def test_a_row_that_was_left_out_is_absent(self, data_format: CacheFormat, tmp_path: Path) -> None:
        samples = [text_and_hidden(row, 2) for row in (1, 4)]
        record = write_shard(tmp_path, data_format, samples)
        assert [row.stored is None for row in record.samples] == [True, False, True, True, False]
        read_back(tmp_path, record, samples)

    def test_samples_without_tensors_keep_their_text(self, data_format: CacheFormat, tmp_path: Path) -> None:
        samples = [Sample(row=row, document={"key": f"k{row}", "n": [row]}, tensors={}) for row in range(3)]
        record = write_shard(tmp_path, data_format, samples)
        assert all(row.stored is not None and row.stored.xxh3 is None for row in record.samples)
        read_back(tmp_path, record, samples)

    def test_a_shard_without_a_sample_is_a_shard(self, data_format: CacheFormat, tmp_path: Path) -> None:
        record = write_shard(tmp_path, data_format, [])
        assert record.metadata.files
        assert record.samples == ()

    def test_bf16_keeps_every_bit(self, data_format: CacheFormat, tmp_path: Path) -> None:
        values = np.array([1.0, -0.0, np.inf, np.nan, 1e-40, 3.4e38], np.float32)
        bits = np.concatenate([float32_to_bf16_bits(values), np.array([0x7FC1, 0xFFFF, 1], np.uint16)])
        tensors = {"x": FeatureTensor(bits, "bf16")}
        samples = [Sample(row=0, document={"key": "k"}, tensors=tensors, specs=specs_of(tensors))]
        read_back(tmp_path, write_shard(tmp_path, data_format, samples), samples)

    def test_equal_samples_give_equal_bytes(self, data_format: CacheFormat, tmp_path: Path) -> None:
        def reordered(sample: Sample) -> Sample:
            document = dict(reversed(sample.document.items()))
            tensors = dict(reversed(sample.tensors.items()))
            return Sample(row=sample.row, document=document, tensors=tensors, specs=sample.specs, bucket=sample.bucket)

        samples = [text_and_hidden(row, 1 + row) for row in range(3)]
        (tmp_path / "b").mkdir()
        first = write_shard(tmp_path / "a", data_format, samples)
        second = write_shard(tmp_path / "b", data_format, [reordered(sample) for sample in samples])
        assert tree(tmp_path / "a") == tree(tmp_path / "b")
        assert first == second

    def test_another_value_gives_another_name(self, data_format: CacheFormat, tmp_path: Path) -> None:
        names = set()
        for length in (1, 2):
            record = write_shard(tmp_path, data_format, [text_and_hidden(0, length)])
            names.add("/".join(record.metadata.files[0].path.split("/")[:2]))
        assert len(names) == 2
        assert all(name.startswith("data/000007-") for name in names)

    def test_the_record_lists_every_file_by_length_and_sha256(self, data_format: CacheFormat, tmp_path: Path) -> None:
        record = write_shard(tmp_path, data_format, [text_and_hidden(0, 3), text_and_hidden(1, 2)])
        found = {
            name: (len(data), hashlib.sha256(data).hexdigest())
            for name, data in tree(tmp_path).items()
        }  # fmt: skip
        assert {file.path: (file.bytes, file.sha256) for file in record.metadata.files} == found

    def test_places_are_plain_bytes_and_the_hash_is_over_them_in_order(
        self, data_format: CacheFormat, tmp_path: Path
    ) -> None:
        samples = [text_and_hidden(row, length) for row, length in enumerate((3, 7))]
        record = write_shard(tmp_path, data_format, samples)
        for row, sample in zip(record.samples, samples, strict=True):
            assert row.stored is not None
            parts = []
            for place in row.stored.tensors:
                descriptor = os.open(tmp_path / record.metadata.files[place.file].path, os.O_RDONLY)
                parts.append(os.pread(descriptor, place.nbytes, place.offset))
                os.close(descriptor)
                assert parts[-1] == sample.tensors[place.name].array.tobytes()
            assert xxhash.xxh3_64_intdigest(b"".join(parts)) == row.stored.xxh3

    @settings(max_examples=25, deadline=None)
    @given(
        described=st.lists(
            st.tuples(st.booleans(), st.text(max_size=20), st.integers(0, 6), st.sampled_from(["a", "b"])), max_size=6
        ),
        width=st.integers(0, 3),
    )
    def test_any_samples_come_back(
        self, data_format: CacheFormat, described: list[tuple[bool, str, int, str]], width: int
    ) -> None:
        samples = []
        for row, (is_ok, text, length, bucket) in enumerate(described):
            tensors = {"r": counted("f32", length, width), "x": counted("i32", 2, width), "h": counted("f16", 3)}
            if is_ok:
                document = {"key": f"k{row}", "text": text}
                specs = specs_of(tensors, "r")
                samples.append(Sample(row=row, document=document, tensors=tensors, specs=specs, bucket=bucket))
        with tempfile.TemporaryDirectory() as folder:
            read_back(Path(folder), write_shard(Path(folder), data_format, samples), samples)

    def test_memory_does_not_grow_with_the_samples(self, data_format: CacheFormat, tmp_path: Path) -> None:
        tensors = {"x": counted("f32", 64, 1024), "r": counted("bf16", 32, 1024)}  # 320 kB
        specs = specs_of(tensors, "r")
        with open_shard_format(LocalStorage(tmp_path), data_format, 0) as writer:
            tracemalloc.start()
            try:
                for row in range(40):
                    writer.add(row, {"key": f"k{row}"}, tensors, specs, None)
                writer.finish()
                _, peak_bytes = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        assert peak_bytes < 4 * 320_000

    def test_rows_must_rise(self, data_format: CacheFormat, tmp_path: Path) -> None:
        sample = text_and_hidden(1, 2)
        with open_shard_format(LocalStorage(tmp_path), data_format, 0) as writer:
            writer.add(1, sample.document, sample.tensors, sample.specs, None)
            with pytest.raises(AssertionError, match="row 1 after row"):
                writer.add(1, sample.document, sample.tensors, sample.specs, None)

    def test_what_is_not_published_is_removed(self, data_format: CacheFormat, tmp_path: Path) -> None:
        sample = text_and_hidden(0, 2)
        with open_shard_format(LocalStorage(tmp_path), data_format, 0) as writer:
            writer.add(0, sample.document, sample.tensors, sample.specs, None)
            assert tree(tmp_path)
            writer.finish()
        assert tree(tmp_path) == {}

    def test_a_flipped_byte_in_a_sample_is_refused_and_named(self, data_format: CacheFormat, tmp_path: Path) -> None:
        record = write_shard(tmp_path, data_format, [text_and_hidden(0, 4)])
        stored = record.samples[0].stored
        assert stored is not None
        places = [(place.file, place.offset, ShardFiles.read_tensors) for place in stored.tensors]
        for file, offset, read in [*places, (stored.json_file, stored.json_offset, ShardFiles.read_document)]:
            path = tmp_path / record.metadata.files[file].path
            whole = path.read_bytes()
            path.write_bytes(whole[: offset + 3] + bytes([whole[offset + 3] ^ 1]) + whole[offset + 4 :])
            with pytest.raises(CacheError, match=r"data/000007.*'k0'.*row 0"):
                read(open_shard(tmp_path, record), record.samples[0])
            path.write_bytes(whole)
        read_back(tmp_path, record, [text_and_hidden(0, 4)])

    def test_a_missing_and_a_cut_file_are_refused_and_named(self, data_format: CacheFormat, tmp_path: Path) -> None:
        record = write_shard(tmp_path, data_format, [text_and_hidden(0, 4)])
        stored = record.samples[0].stored
        assert stored is not None
        place = stored.tensors[-1]
        path = tmp_path / record.metadata.files[place.file].path
        path.write_bytes(path.read_bytes()[: place.offset + place.nbytes - 1])
        with pytest.raises(CacheError, match=r"data/000007.*'k0'.*row 0"):
            open_shard(tmp_path, record).read_tensors(record.samples[0])
        path.unlink()
        with pytest.raises(CacheError, match=r"missing, though the commit rec"):
            open_shard(tmp_path, record).read_tensors(record.samples[0])


def test_both_formats_give_a_sample_the_same_hashes(tmp_path: Path) -> None:
    samples = [text_and_hidden(row, 2 + row) for row in range(3)]
    tar, group = (write_shard(tmp_path, name, samples) for name in ("webdataset", "zarr"))
    for one, other in zip(tar.samples, group.samples, strict=True):
        assert one.stored is not None
        assert other.stored is not None
        assert (one.stored.xxh3, one.stored.json_xxh3) == (other.stored.xxh3, other.stored.json_xxh3)


def test_a_record_of_another_release_is_refused_by_its_version(tmp_path: Path) -> None:
    record = write_shard(tmp_path, "webdataset", [text_and_hidden(0, 2)])
    table, footer = read_sealed_table(write_record(record.metadata, record.samples), "here")
    metadata = footer["mimir"].replace('"version":2', '"version":1')
    old = write_sealed_table(table.drop_columns(["json_file"]), {"mimir": metadata})
    with pytest.raises(CacheError, match=r"record of version 1, expected 2.*another release.*new --cache"):
        read_record(old, "here")
