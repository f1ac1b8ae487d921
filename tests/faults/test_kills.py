"""Workers are killed at any moment; the cache ends as if none had been."""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from mimir_shared import failpoints
from tests.faults.conftest import World
from tests.faults.kills import Counter, RandomKills, die_at
from tests.faults.workers import assert_same_cache, compared, encode, end_of, run_alone, start

KILLS_AT_EACH_POINT = 20
KILLS_OF_ONE_CACHE = 5
POINTS = sorted(failpoints.PUBLISHING | {name for name in failpoints.DECLARED if name.startswith("lease.")})
LATE = ("snapshot", "snapshot_index")
"""Kinds that are published once all shards are committed."""


def test_twenty_random_kills_of_three_workers_leave_the_cache_of_an_undisturbed_one(
    world: World, memory_folder: Path
) -> None:
    kills = 0
    for attempt in range(5):
        cache = memory_folder / str(attempt)
        battery = RandomKills(lambda: encode(cache, world.clips, clip_s=0.01), kills=8, seed=attempt)  # noqa: B023
        battery.run()
        run_alone(lambda: encode(cache, world.clips))  # noqa: B023
        assert_same_cache(cache, world.uninterrupted)
        _assert_nothing_left(cache)
        kills += battery.done
    assert kills >= 20


@pytest.mark.parametrize("point", POINTS)
def test_twenty_kills_at_a_failpoint_leave_the_cache_of_an_undisturbed_worker(
    world: World, memory_folder: Path, point: str
) -> None:
    choose = random.Random(point)
    passed = Counter()
    kills = rounds = 0
    kind = point.split(".")[0]
    while kills < KILLS_AT_EACH_POINT:
        cache = memory_folder / str(rounds)
        rounds += 1
        if kind in LATE:
            shutil.copytree(world.whole, cache, ignore=shutil.ignore_patterns("snapshots"))
        kills += _kill_at(point, cache, world, passed, choose)
        run_alone(lambda: encode(cache, world.clips))  # noqa: B023
        assert_same_cache(cache, world.uninterrupted)
        _assert_nothing_left(cache)
        assert rounds <= 3 * KILLS_AT_EACH_POINT, f"{point} is rarely reached: {passed.value} times"
        shutil.rmtree(cache)
    assert passed.value >= KILLS_AT_EACH_POINT


def _assert_nothing_left(cache: Path) -> None:
    """No temporary file and no lease of a killed worker."""
    assert [path for folder in ("tmp", "leases") for path in (cache / folder).rglob("*") if path.is_file()] == []


def _kill_at(point: str, cache: Path, world: World, passed: Counter, choose: random.Random) -> int:
    """Start workers that die at the point, at most a few times; how many did."""
    for number in range(KILLS_OF_ONE_CACHE):
        at = "lease.taken" if point == "lease.taken_over" and number == 0 else point
        countdown = choose.choice((1, 1, 2, 3))

        def work(at: str = at, countdown: int = countdown) -> None:
            die_at(at, countdown, passed)
            encode(cache, world.clips, clip_s=0.003 if point == "lease.heartbeat" else 0.0)

        code = end_of(start(work))
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            return number
    return KILLS_OF_ONE_CACHE


def _write_naively(cache: Path, whole: Path) -> None:
    """What many programs do: write to the final name, and take a file that exists for done."""
    for source in sorted(path for path in whole.rglob("*") if path.is_file()):
        target = cache / source.relative_to(whole)
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        data = source.read_bytes()
        with open(target, "wb", buffering=0) as file:
            for begin in range(0, len(data), 512):
                file.write(data[begin : begin + 512])
                time.sleep(0.002)


def test_a_naive_writer_fails_the_same_battery(world: World, memory_folder: Path) -> None:
    torn = []
    for attempt in range(5):
        cache = memory_folder / str(attempt)
        RandomKills(lambda: _write_naively(cache, world.whole), kills=8, seed=attempt).run()  # noqa: B023
        run_alone(lambda: _write_naively(cache, world.whole))  # noqa: B023
        ours = compared(cache)
        torn += [name for name, data in world.uninterrupted.items() if ours.get(name) != data]
    assert torn, "kills of a writer that leaves torn files were not noticed"


def test_the_naive_writer_is_right_when_nobody_kills_it(world: World, memory_folder: Path) -> None:
    _write_naively(memory_folder, world.whole)
    assert_same_cache(memory_folder, world.uninterrupted)
