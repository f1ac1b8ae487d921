"""`verify` finds whatever is wrong with a cache, and says which shard and clip it concerns."""

import json
import random
import shutil
from pathlib import Path

import pytest

from mimir_precompute.cli.messages import describe_verification
from mimir_precompute.inspection.verify import VerifyReport, verify_cache
from mimir_shared.errors import CacheError
from mimir_shared.storage.folder import LocalStorage
from tests.precompute.test_pipeline import encode


@pytest.fixture(scope="module")
def good(toy_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("verify") / "cache"
    encode(toy_clips, cache)
    assert _verify(cache).ok
    return cache


@pytest.fixture
def cache(good: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(good, tmp_path / "cache"))


def _verify(cache: Path) -> VerifyReport:
    return verify_cache(LocalStorage(cache))


def _kinds(cache: Path) -> set[str]:
    return {problem.kind for problem in _verify(cache).problems}


def _shards(cache: Path, feature: str) -> list[Path]:
    return sorted(cache.glob(f"{feature}/*/data/*.tar"))


def test_any_flipped_bit_of_any_data_file_is_found_in_its_shard(good: Path, tmp_path: Path) -> None:
    choose = random.Random(1)
    cache = Path(shutil.copytree(good, tmp_path / "cache"))
    files = [path for feature in ("latents", "t5", "answers", "llm") for path in _shards(cache, feature)]
    for _ in range(40):
        path = choose.choice(files)
        whole = path.read_bytes()
        bit = choose.randrange(len(whole) * 8)
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(bytes(damaged))
        problems = _verify(cache).problems
        assert {(problem.feature, problem.shard) for problem in problems} == {
            (path.parts[-4], int(path.name.partition("-")[0]))
        }
        path.write_bytes(whole)


def test_a_flipped_bit_in_a_sample_names_its_row(cache: Path) -> None:
    path = _shards(cache, "t5")[0]
    data = bytearray(path.read_bytes())
    data[-11_000] ^= 4  # in the last samples, before the padding at the end
    path.write_bytes(bytes(data))
    assert {(problem.kind, problem.row is None) for problem in _verify(cache).problems} == {
        ("sha256", True),
        ("sample", False),
    }


def test_cut_empty_missing_and_swapped_shards_are_found(cache: Path) -> None:
    first, second, third = _shards(cache, "latents")
    whole = first.read_bytes()
    for length in (0, 1, 512, len(whole) // 2, len(whole) - 1):
        first.write_bytes(whole[:length])
        assert "length" in _kinds(cache), length
    first.unlink()
    assert _kinds(cache) == {"missing"}
    first.write_bytes(second.read_bytes())
    assert "sha256" in _kinds(cache) or "length" in _kinds(cache)
    first.write_bytes(third.read_bytes())
    assert not _verify(cache).ok


def test_a_damaged_record_is_found_and_the_rest_is_still_read(cache: Path) -> None:
    record = next(cache.glob("llm/*/manifests/000001.0.parquet"))
    record.write_bytes(record.read_bytes()[:-1])
    report = _verify(cache)
    assert [(p.feature, p.shard, p.kind) for p in report.problems] == [("llm", 1, "record")]
    assert report.shards == 12


def test_swapped_records_are_found(cache: Path) -> None:
    records = sorted(next(cache.glob("t5/*")).glob("manifests/*"))
    data = records[0].read_bytes()
    records[0].write_bytes(records[1].read_bytes())
    records[1].write_bytes(data)
    assert [(p.shard, p.kind) for p in _verify(cache).problems] == [(0, "record"), (1, "record")]


def test_records_of_another_plan_are_found(cache: Path, toy_clips: Path, tmp_path: Path) -> None:
    from tests.precompute.test_pipeline import captions_of, write_captions

    clips = Path(shutil.copytree(toy_clips, tmp_path / "clips"))
    write_captions(clips, {name: f"{text} !" for name, text in captions_of(clips).items()})
    encode(clips, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "plan" / "0000.parquet", cache / "plan" / "0000.parquet")
    problems = _verify(cache).problems
    assert sum(problem.kind == "plan" for problem in problems) == 12
    assert sum(problem.kind == "law" for problem in problems) == 4 * 12


def test_an_edited_spec_a_damaged_empty_prompt_and_a_damaged_index_are_found(cache: Path) -> None:
    spec = next(cache.glob("latents/*/spec.json"))
    spec.write_text(spec.read_text().replace('"fake"', '"other"'))
    assert _kinds(cache) == {"spec"}
    spec.write_text(spec.read_text().replace('"other"', '"fake"'))
    for name in ("t5/*/empty.safetensors", "answers/*/empty.json"):
        empty = next(cache.glob(name))
        data = bytearray(empty.read_bytes())
        data[-3] ^= 1
        empty.write_bytes(bytes(data))
    assert {(p.feature, p.kind) for p in _verify(cache).problems} == {("t5", "empty"), ("answers", "empty")}
    index = next(cache.glob("snapshots/*/index.arrow"))
    index.write_bytes(index.read_bytes()[:-1])
    assert "snapshot" in _kinds(cache)


def test_an_unfinished_cache_has_no_problem_but_says_what_is_missing(cache: Path) -> None:
    shutil.rmtree(cache / "snapshots")
    for record in cache.glob("llm/*/manifests/00000[12].0.parquet"):
        record.unlink()
    report = _verify(cache)
    assert report.problems == []
    assert list(report.unfinished.values()) == [2]


def test_a_damaged_plan_is_told_at_once(cache: Path) -> None:
    plan = cache / "plan" / "0000.parquet"
    plan.write_bytes(plan.read_bytes()[:-5])
    with pytest.raises(CacheError, match=r"plan/0000\.parquet"):
        _verify(cache)


def test_the_report_for_programs_has_the_promised_fields(good: Path) -> None:
    report = json.loads(json.dumps(_verify(good).to_json()))
    assert set(report) == {"ok", "shards", "samples", "bytes", "problems"}
    assert (report["ok"], report["shards"], report["samples"]) == (True, 12, 48)
    assert report["bytes"] == sum(path.stat().st_size for path in good.glob("*/*/data/*"))


def test_a_cut_file_is_told_in_one_line_with_the_number_of_samples_behind_the_cut(cache: Path) -> None:
    path = sorted(cache.glob("latents/*/data/**/*.tar"))[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    report = verify_cache(LocalStorage(cache))
    told = describe_verification("c", report).splitlines()
    lost = sum(problem.kind == "sample" for problem in report.problems)
    assert lost > 1
    assert len(told) == 4
    assert f"{lost} samples cannot be read" in told[1]
    assert "run `mimir-precompute verify`" not in "".join(told)
    assert "mimir-precompute verify c --repair" in told[-1]
