"""A shard of many files is committed like one of a single file: killed between any two of them, nothing is lost."""

import random
import shutil
import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest

from mimir_precompute.inspection.verify import verify_cache
from mimir_shared.storage.folder import LocalStorage
from tests.faults.conftest import World
from tests.faults.kills import Counter, RandomKills, die_at
from tests.faults.workers import assert_same_cache, compared, encode, end_of, run_alone, start

KILLS = 20
encode_zarr = partial(encode, data_format="zarr")


@pytest.fixture(scope="module")
def uninterrupted(world: World, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    """The files of a zarr cache that nobody disturbed."""
    cache = tmp_path_factory.mktemp("zarr") / "whole"
    encode_zarr(cache, world.clips)
    assert verify_cache(LocalStorage(cache)).problems == []
    return compared(cache)


@pytest.mark.parametrize("step", ["written", "synced", "linked", "dir_synced"])
def test_a_worker_killed_between_the_files_of_a_group_leaves_nothing_half(
    world: World, uninterrupted: Mapping[str, bytes], memory_folder: Path, step: str
) -> None:
    choose = random.Random(step)
    passed = Counter()
    kills = rounds = 0
    files = sum("/data/" in name for name in uninterrupted)
    while kills < KILLS:
        cache = memory_folder / str(rounds)
        rounds += 1
        for _ in range(4):
            countdown = choose.randrange(1, files // 2)

            def work(cache: Path = cache, countdown: int = countdown) -> None:
                die_at(f"data.{step}", countdown, passed)
                encode_zarr(cache, world.clips)

            code = end_of(start(work))
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
        run_alone(partial(encode_zarr, cache, world.clips))
        assert_same_cache(cache, uninterrupted)
        shutil.rmtree(cache)
        assert rounds <= KILLS
    assert passed.value >= KILLS


def test_random_kills_of_three_workers_leave_the_cache_of_an_undisturbed_one(
    world: World, uninterrupted: Mapping[str, bytes], memory_folder: Path
) -> None:
    kills = 0
    for attempt in range(3):
        cache = memory_folder / str(attempt)
        battery = RandomKills(partial(encode_zarr, cache, world.clips, clip_s=0.01), kills=8, seed=attempt)
        battery.run()
        run_alone(partial(encode_zarr, cache, world.clips))
        assert_same_cache(cache, uninterrupted)
        kills += battery.done
    assert kills >= KILLS
