"""Many workers at one shard, workers that sleep, wrong clocks, other numbers of workers after a restart."""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest

from mimir_precompute.workers.lease import Leases
from mimir_shared import failpoints
from mimir_shared.storage.lease_store import HeldLease
from tests.faults.conftest import World
from tests.faults.workers import assert_same_cache, compared, encode, end_of, kill, run_alone, start

CLAIMANTS, RACES = 16, 20
HOUR_S = 3600


def _race_for_shard_0(cache: Path, clips: Path, ready: int, gate: tuple[int, int]) -> None:
    """Encode shard 0 of `t5` whoever has its lease, and wait before the commit until all others have come as far."""
    os.close(gate[1])

    def wait_for_all(point: str) -> None:
        if point == "data.written":
            os.write(ready, b".")
            os.read(gate[0], 1)  # returns when its other end is closed

    def take_what_others_have(leases: Leases, name: str) -> bool:
        leases._held[name] = mock.create_autospec(HeldLease)
        return True

    failpoints.arm(wait_for_all)
    with mock.patch.object(Leases, "take", take_what_others_have):
        encode(cache, clips, shards=(0,), features=("t5",))


def _results(cache: Path) -> Counter[str]:
    lines = [line for path in (cache / "logs").iterdir() for line in path.read_text().splitlines()]
    return Counter(event["result"] for event in map(json.loads, lines) if event["event"] == "shard")


def test_of_16_processes_that_commit_one_shard_at_once_exactly_one_wins_twenty_times_over(
    world: World, memory_folder: Path
) -> None:
    encode(memory_folder / "begun", world.clips, shards=(1,), features=("t5",))
    for race in range(RACES):
        cache = memory_folder / str(race)
        shutil.copytree(memory_folder / "begun", cache, ignore=shutil.ignore_patterns("logs"))
        ready, gate = os.pipe(), os.pipe()
        pids = [
            start(lambda: _race_for_shard_0(cache, world.clips, ready[1], gate))  # noqa: B023
            for _ in range(CLAIMANTS)
        ]
        os.close(gate[0])
        arrived = 0
        while arrived < CLAIMANTS:
            arrived += len(os.read(ready[0], CLAIMANTS))
        os.close(gate[1])
        assert [end_of(pid) for pid in pids] == [0] * CLAIMANTS
        assert _results(cache) == {"committed": 1, "same": CLAIMANTS - 1}
        for descriptor in ready:
            os.close(descriptor)
        expected = {
            name: data
            for name, data in world.uninterrupted.items()
            if name.startswith(("plan", "t5")) and not any(f"{shard:06d}" in name for shard in range(2, 10))
        }
        assert_same_cache(cache, expected)
        shutil.rmtree(cache)


@pytest.mark.parametrize("point", ["lease.taken", "data.written", "data.linked", "record.written", "record.linked"])
def test_a_worker_that_sleeps_longer_than_its_lease_and_goes_on_changes_nothing(
    world: World, memory_folder: Path, point: str
) -> None:
    def sleep_here(name: str) -> None:
        if name == point:
            failpoints.arm(None)
            os.kill(os.getpid(), signal.SIGSTOP)

    def sleepy() -> None:
        failpoints.arm(sleep_here)
        encode(memory_folder, world.clips)

    sleeper = start(sleepy)
    _, status = os.waitpid(sleeper, os.WUNTRACED)
    assert os.WIFSTOPPED(status), f"the worker never came to {point}"
    run_alone(lambda: encode(memory_folder, world.clips))
    assert_same_cache(memory_folder, world.uninterrupted)
    kill(sleeper, signal.SIGCONT)
    assert end_of(sleeper) == 0
    assert_same_cache(memory_folder, world.uninterrupted)


def test_workers_whose_clocks_are_hours_apart_make_the_same_cache(world: World, memory_folder: Path) -> None:
    def work(skew_s: float) -> None:
        with mock.patch("time.time", return_value=time.time() + skew_s):
            encode(memory_folder, world.clips, clip_s=0.01)

    skews = (-HOUR_S, 0.0, HOUR_S)
    pids = {skew_s: start(lambda skew_s=skew_s: work(skew_s)) for skew_s in skews}  # type: ignore[misc]
    time.sleep(0.15)
    kill(pids[HOUR_S])
    end_of(pids.pop(HOUR_S))
    pids[HOUR_S] = start(lambda: work(HOUR_S))
    assert [end_of(pid) for pid in pids.values()] == [0, 0, 0]
    assert_same_cache(memory_folder, world.uninterrupted)


def test_one_worker_then_eight_then_three_make_the_same_cache(world: World, memory_folder: Path) -> None:
    choose = random.Random(0)
    for attempt in range(3):
        cache = memory_folder / str(attempt)

        def work(cache: Path = cache) -> None:
            encode(cache, world.clips, clip_s=0.01)

        for count in (1, 8):
            pids = [start(work) for _ in range(count)]
            time.sleep(choose.uniform(0.1, 0.2))
            for pid in pids:
                kill(pid)
            assert {end_of(pid) for pid in pids} <= {0, -signal.SIGKILL}
        pids = [start(work) for _ in range(3)]
        assert [end_of(pid) for pid in pids] == [0, 0, 0]
        assert_same_cache(cache, world.uninterrupted)


@pytest.mark.parametrize("data_format", ["webdataset", "zarr"])
def test_three_workers_share_the_shards_and_none_makes_what_another_has(
    world: World, memory_folder: Path, data_format: str
) -> None:
    def work() -> None:
        encode(memory_folder / "shared", world.clips, clip_s=0.02, data_format=data_format, heartbeat_s=1.0)

    pids = [start(work) for _ in range(3)]
    assert [end_of(pid) for pid in pids] == [0, 0, 0]
    encode(memory_folder / "alone", world.clips, data_format=data_format)
    assert_same_cache(memory_folder / "shared", compared(memory_folder / "alone"))
    assert _results(memory_folder / "shared") == {"committed": 15}
    assert len(list((memory_folder / "shared" / "logs").iterdir())) > 1
