"""Workers as real processes: the same cache as by one, whatever becomes of them."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from mimir_precompute.pipeline import EncodeOutcome
from mimir_precompute.workers.seen import read_workers
from mimir_shared.errors import CacheError, MachineError
from mimir_shared.manifest import CacheFormat
from mimir_shared.process_identity import life_of
from mimir_shared.storage.folder import LocalStorage
from tests.faults.workers import TEXT, end_of, make_clips, start
from tests.faults.workers import compared as contents
from tests.precompute.team.fake_team import count_records, encode_with, plan_clips, wait_for
from tests.precompute.team.fake_worker import Misfortune


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten clips whose videos are never opened."""
    return make_clips(tmp_path_factory.mktemp("team") / "clips")


@pytest.fixture
def text_cache(tmp_path: Path, clips: Path) -> Path:
    """A plan of ten shards of one clip."""
    plan_clips(tmp_path / "cache", clips)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Mapping[str, bytes]:
    """What one worker makes of it."""
    cache = tmp_path_factory.mktemp("by-one") / "cache"
    plan_clips(cache, clips)
    encode_with(cache, 1, features=TEXT)
    return contents(cache)


def shards_made(outcome: EncodeOutcome) -> list[tuple[str, int, int, int]]:
    return [(made.feature, made.shards_done_before, made.shards_made, made.encoded) for made in outcome.features]


@pytest.mark.parametrize("data_format", ["webdataset", "zarr"])
def test_one_then_eight_then_three_workers_make_the_cache_of_one(
    tmp_path: Path, toy_clips: Path, data_format: CacheFormat
) -> None:
    caches = tmp_path / "together", tmp_path / "alone"
    for cache in caches:
        plan_clips(cache, toy_clips)
    together, alone = caches
    encode_with(alone, 1, data_format=data_format)
    for workers in (1, 8):
        before = count_records(together)
        parent = start(lambda workers=workers: encode_with(
            together, workers, data_format=data_format, misfortune=Misfortune(clip_s=0.15)
        ))  # fmt: skip
        wait_for(lambda before=before: count_records(together) >= before + 8, f"{workers} workers made nothing")
        pids = [seen.report.pid for seen in read_workers(LocalStorage(together)) if seen.state == "working"]
        domain = read_workers(LocalStorage(together))[0].report.domain
        os.kill(parent, signal.SIGKILL)
        assert end_of(parent) == -signal.SIGKILL
        # a parent that is killed has no last word, and yet its workers end
        wait_for(lambda: all(life_of(domain, pid) == "dead" for pid in pids), f"workers {pids} outlive their parent")  # noqa: B023
    assert count_records(together) < count_records(alone)
    outcome = encode_with(together, 3, data_format=data_format)
    assert outcome.snapshot is not None
    assert contents(together) == contents(alone)


def test_a_worker_that_is_killed_is_started_again_and_its_shard_is_made(
    text_cache: Path, by_one: Mapping[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    once = tmp_path / "killed"
    outcome = encode_with(text_cache, 2, features=TEXT, misfortune=Misfortune(key="004.mp4", once=str(once)))
    assert once.exists()
    said = capfd.readouterr().err
    assert "was killed by SIGKILL, perhaps for want of memory; it is started again in" in said
    assert shards_made(outcome) == [(feature, 0, 10, 10) for feature in TEXT]
    assert contents(text_cache) == by_one


def test_a_clip_that_kills_every_worker_ends_the_run_with_exit_code_5(
    text_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MachineError, match=r"ended 4 times in a row, and nobody is left to make t5.*killed by SIGKILL"):
        encode_with(text_cache, 2, features=("t5",), misfortune=Misfortune(key="004.mp4"), backoff_s=0)
    assert count_records(text_cache) <= 9
    assert "is given up" in capfd.readouterr().err


def test_an_error_of_one_worker_is_that_of_the_run(text_cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CacheError, match=r"^this cache is damaged, says the test$"):
        encode_with(text_cache, 2, features=TEXT, misfortune=Misfortune(key="004.mp4", what="damaged"))
    with pytest.raises(MachineError, match=r"ended 2 times in a row.*the disk fails, says the test"):
        encode_with(text_cache, 2, features=TEXT, misfortune=Misfortune(key="004.mp4", what="disk"))
    assert "Traceback" not in capfd.readouterr().err
    assert not (text_cache / "leases").exists()


def test_a_fault_of_ours_comes_through_with_its_traceback_and_the_workers_number(
    text_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    once = text_cache.parent / "once"
    encode_with(text_cache, 2, features=TEXT, misfortune=Misfortune(key="004.mp4", what="bug", once=str(once)))
    said = capfd.readouterr().err
    assert "] AssertionError: a fault of ours, says the test" in said
    assert "[worker " in said


def test_features_may_be_placed_apart_and_one_waits_for_what_another_makes(
    text_cache: Path, by_one: Mapping[str, bytes]
) -> None:
    # answers begin slowly, so that the worker with llm finds nothing to start with
    place = ("t5=0", "answers=1", "llm=2")
    outcome = encode_with(text_cache, 3, place=place, features=TEXT, misfortune=Misfortune(clip_s=0.05))
    assert shards_made(outcome) == [(feature, 0, 10, 10) for feature in TEXT]
    assert contents(text_cache) == by_one


def test_a_second_call_starts_nobody(text_cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    encode_with(text_cache, 2, features=TEXT)
    capfd.readouterr()
    outcome = encode_with(text_cache, 2, features=TEXT)
    assert outcome.nothing_to_do
    assert outcome.snapshot is not None
    assert "workers" not in capfd.readouterr().err


def test_one_view_shows_all_and_workers_are_quiet(text_cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    encode_with(text_cache, 3, features=TEXT)
    said = capfd.readouterr().err
    assert said.count("t5: 10 clips in 10 shards to encode") == 1
    assert "llm: all 10 clips are done" in said
    assert "[worker" not in said
