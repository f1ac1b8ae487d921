"""Damage to what is stored: whatever happens to the bytes of a shard, `verify` finds it, in its shard."""

import itertools
import random
import shutil
from pathlib import Path
from typing import get_args

import pytest

from mimir_precompute.inspection.verify import verify_cache
from mimir_shared.errors import CacheError
from mimir_shared.manifest import CacheFormat, read_record
from mimir_shared.storage.folder import LocalStorage
from tests.faults.damage import Shard, choose_byte, make_cache, replaced

NUM_FLIPS, NUM_CUTS = 1000, 300


@pytest.fixture(scope="module", params=get_args(CacheFormat))
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Shard]:
    """All shards of a cache of one format, in which nothing is wrong."""
    found = make_cache(tmp_path_factory.mktemp(request.param), request.param)
    assert len(found) == 8
    assert {shard.spec.format for shard in found} == {request.param}
    assert all(shard.problems() == [] for shard in found)
    return found


def cache_of(shards: list[Shard]) -> Path:
    return Path(shards[0].folder.storage.root)


def feature_shards(shards: list[Shard], feature: str) -> list[Shard]:
    return [shard for shard in shards if shard.folder.feature == feature]


def test_every_one_of_1000_flipped_bits_is_found(shards: list[Shard]) -> None:
    choose = random.Random(4)
    missed = []
    for _ in range(NUM_FLIPS):
        shard, path, offset = choose_byte(shards, choose)
        bit = 1 << choose.randrange(8)
        damaged = bytearray(path.read_bytes())
        damaged[offset] ^= bit
        with replaced(path, bytes(damaged)):
            if "sha256" not in shard.kinds():
                missed.append((path, offset, bit))
    assert missed == []


def test_every_one_of_300_cuts_is_found(shards: list[Shard]) -> None:
    choose = random.Random(5)
    missed = []
    for _ in range(NUM_CUTS):
        shard, path, length = choose_byte(shards, choose)
        with replaced(path, path.read_bytes()[:length]):
            if "length" not in shard.kinds():
                missed.append((path, length))
    assert missed == []


def test_a_flip_or_a_cut_of_each_single_file_is_found(shards: list[Shard]) -> None:
    # the smallest files are seldom hit where bytes are drawn at random
    choose = random.Random(6)
    for shard in shards:
        for path in shard.files:
            whole = path.read_bytes()
            for offset in (0, len(whole) - 1, choose.randrange(len(whole))):
                flipped = bytearray(whole)
                flipped[offset] ^= 1 << choose.randrange(8)
                for damaged in (bytes(flipped), whole[:offset], whole + b"\0"):
                    with replaced(path, damaged):
                        assert shard.kinds() & {"sha256", "length"}, f"{path} at {offset}"


def test_a_flip_within_a_sample_names_its_row(shards: list[Shard]) -> None:
    for shard in shards:
        record = shard.folder.read_record(shard.number, 0)
        for sample in record.samples:
            assert sample.stored is not None
            stored = sample.stored
            places = [(place.file, place.offset, place.nbytes) for place in stored.tensors if place.nbytes]
            for file, offset, nbytes in [*places, (stored.json_file, stored.json_offset, stored.json_nbytes)]:
                damaged = bytearray(shard.files[file].read_bytes())
                damaged[offset + nbytes // 2] ^= 4
                with replaced(shard.files[file], bytes(damaged)):
                    assert {(p.kind, p.row) for p in shard.problems()} == {("sha256", None), ("sample", sample.row)}


def test_a_missing_and_an_empty_file_are_found(shards: list[Shard]) -> None:
    for shard in shards:
        for path in shard.files:
            with replaced(path, None):
                assert shard.kinds() == {"missing"}, path
            with replaced(path, b""):
                assert "length" in shard.kinds(), path


def test_swapped_shards_are_found(shards: list[Shard]) -> None:
    for feature in ("latents", "t5", "answers", "llm"):
        first, second = feature_shards(shards, feature)
        one, other = (
            Path(*shard.files[0].parts[: shard.files[0].parts.index("data") + 2]) for shard in (first, second)
        )
        swap(one, other)
        try:
            assert first.problems()
            assert second.problems()
        finally:
            swap(one, other)
        assert first.problems() == second.problems() == []


def test_two_files_of_a_shard_in_each_others_place_are_found(shards: list[Shard]) -> None:
    for shard in shards:
        for one, other in itertools.pairwise(shard.files):
            if one.read_bytes() != other.read_bytes():
                swap(one, other)
                try:
                    assert shard.kinds() & {"sha256", "length"}, f"{one} and {other}"
                finally:
                    swap(one, other)


def test_an_array_of_another_shard_is_found(shards: list[Shard]) -> None:
    if shards[0].spec.format != "zarr":
        pytest.skip("a tar is one file")
    first, second = feature_shards(shards, "t5")
    for path, donor in zip(first.files, second.files, strict=True):
        assert path.name == donor.name
        if path.read_bytes() != donor.read_bytes():
            with replaced(path, donor.read_bytes()):
                assert first.kinds() & {"sha256", "length"}, path


def test_a_file_too_many_in_the_folder_of_a_shard_is_found(shards: list[Shard]) -> None:
    if shards[0].spec.format != "zarr":
        pytest.skip("a tar has no folder")
    for shard in shards:
        root = shard.files[-1].parent
        for extra in (root / "c.0", root / "documents" / "c.1.0", root / "more" / "zarr.json"):
            extra.parent.mkdir(exist_ok=True)
            extra.write_bytes(b"{}")
            assert [problem.kind for problem in shard.problems()] == ["extra"]
            assert any(part in shard.problems()[0].detail for part in (extra.name, "more"))
            extra.unlink()
            if extra.parent.name == "more":
                extra.parent.rmdir()


def test_a_commit_record_cut_at_any_byte_or_with_any_bit_flipped_is_refused(shards: list[Shard]) -> None:
    shard = feature_shards(shards, "llm")[1]
    data = shard.folder.storage.read(shard.folder.record_path(shard.number, 0))
    for length in range(len(data)):
        with pytest.raises(CacheError, match=f"here.*{length} bytes"):
            read_record(data[:length], "here")
    choose = random.Random(7)
    for bit in choose.sample(range(len(data) * 8), 500):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(CacheError, match="here"):
            read_record(bytes(flipped), "here")


def test_swapped_and_damaged_commit_records_are_found(shards: list[Shard]) -> None:
    for feature in ("latents", "t5", "answers", "llm"):
        first, second = feature_shards(shards, feature)
        one, other = (cache_of(shards) / shard.folder.record_path(shard.number, 0) for shard in (first, second))
        swap(one, other)
        try:
            assert first.kinds() == second.kinds() == {"record"}
        finally:
            swap(one, other)
        with replaced(one, one.read_bytes()[:-7]):
            assert first.kinds() == {"record"}


def test_every_other_file_of_a_cache_is_checked_too(shards: list[Shard], tmp_path: Path) -> None:
    cache = Path(shutil.copytree(cache_of(shards), tmp_path / "cache"))
    choose = random.Random(8)
    for pattern in ("*/*/empty.*", "snapshots/*/*"):
        for path in sorted(cache.glob(pattern)):
            whole = path.read_bytes()
            for _ in range(20):
                flipped = bytearray(whole)
                flipped[choose.randrange(len(whole))] ^= 1 << choose.randrange(8)
                path.write_bytes(flipped)
                assert {problem.kind for problem in verify_cache(LocalStorage(cache)).problems} <= {"empty", "snapshot"}
                assert not verify_cache(LocalStorage(cache)).ok, path
            path.write_bytes(whole)
    assert verify_cache(LocalStorage(cache)).ok


def test_the_empty_prompt_of_another_feature_is_found(shards: list[Shard], tmp_path: Path) -> None:
    cache = Path(shutil.copytree(cache_of(shards), tmp_path / "cache"))
    shutil.copy(next(cache.glob("llm/*/empty.safetensors")), next(cache.glob("t5/*/empty.safetensors")))
    (problem,) = verify_cache(LocalStorage(cache)).problems
    assert (problem.feature, problem.kind) == ("t5", "empty")
    assert "query_hidden" in problem.detail


def test_a_spec_that_names_the_other_format_is_found(shards: list[Shard], tmp_path: Path) -> None:
    cache = Path(shutil.copytree(cache_of(shards), tmp_path / "cache"))
    spec = next(cache.glob("t5/*/spec.json"))
    names = list(get_args(CacheFormat))
    other = names[1 - names.index(shards[0].spec.format)]
    spec.write_text(spec.read_text().replace(f'"format": "{shards[0].spec.format}"', f'"format": "{other}"'))
    problems = verify_cache(LocalStorage(cache)).problems
    assert {(problem.feature, problem.shard, problem.kind) for problem in problems} == {
        ("t5", 0, "spec"),
        ("t5", 1, "spec"),
    }


def data_path(shard: Shard) -> Path:
    """The tar or the folder of a shard."""
    names = {file.path.split("/")[1] for file in shard.folder.read_record(shard.number, 0).metadata.files}
    (name,) = names
    return cache_of([shard]) / shard.folder.directory / "data" / name


def swap(one: Path, other: Path) -> None:
    aside = one.parent / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
