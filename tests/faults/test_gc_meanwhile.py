"""gc beside workers, with no grace at all, and gc that is killed: the cache ends the same."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from mimir_precompute.gc import collect_garbage
from mimir_shared import failpoints
from mimir_shared.feature_folder import find_features
from mimir_shared.storage.folder import LocalStorage
from tests.faults.conftest import World
from tests.faults.kills import Counter, die_at
from tests.faults.workers import assert_same_cache, encode, end_of, kill, run_alone, start


def _collect_again_and_again(cache: Path) -> None:
    storage = LocalStorage(cache)
    for _ in range(20):
        collect_garbage(storage, grace_s=0)
        time.sleep(0.005)


def test_gc_twenty_times_over_while_workers_encode_and_die_changes_nothing(world: World, memory_folder: Path) -> None:
    choose = random.Random(0)
    for attempt in range(3):
        cache = memory_folder / str(attempt)

        def work(cache: Path = cache) -> None:
            encode(cache, world.clips, clip_s=0.01)

        workers = [start(work), start(work)]
        collector = start(lambda cache=cache: _collect_again_and_again(cache))  # type: ignore[misc]
        time.sleep(choose.uniform(0.1, 0.3))
        kill(workers[0])
        assert end_of(workers[0]) in (0, -signal.SIGKILL)
        assert end_of(start(work)) == 0
        assert end_of(workers[1]) == 0
        assert end_of(collector) == 0
        collect_garbage(LocalStorage(cache), grace_s=0)
        run_alone(lambda cache=cache: encode(cache, world.clips))  # type: ignore[misc]
        assert_same_cache(cache, world.uninterrupted)


def _leave_garbage(cache: Path) -> None:
    storage = LocalStorage(cache)
    for folder in find_features(storage):
        for shard in range(2):
            storage.create(f"{folder.directory}/data/{shard:06d}-{8 * 'a'}.tar", b"orphan")
    storage.create(f"snapshots/{12 * '0'}/index.arrow", b"unfinished")
    storage.create("leases/t5/0123456789ab/000007", b"{}")
    os.utime(cache / "leases/t5/0123456789ab/000007", (1, 1))
    (cache / "tmp" / "otherhost-77-abc").write_bytes(b"half")


@pytest.mark.parametrize("point", sorted(name for name in failpoints.DECLARED if name.startswith("gc.")))
def test_gc_that_is_killed_and_run_again_leaves_just_what_is_named(
    world: World, memory_folder: Path, point: str
) -> None:
    choose = random.Random(point)
    passed, kills, attempt = Counter(), 0, 0
    while kills < 20:
        cache = memory_folder / str(attempt)
        attempt += 1
        shutil.copytree(world.whole, cache)
        _leave_garbage(cache)
        time.sleep(0.02)  # not to be touched for no time at all is to be older than now
        code = -signal.SIGKILL
        while code == -signal.SIGKILL and kills < 20:
            countdown = choose.randint(1, 3)

            def work(cache: Path = cache, countdown: int = countdown) -> None:
                die_at(point, countdown, passed)
                collect_garbage(LocalStorage(cache), grace_s=0)

            code = end_of(start(work))
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
        run_alone(lambda cache=cache: collect_garbage(LocalStorage(cache), grace_s=0))  # type: ignore[misc]
        assert_same_cache(cache, world.uninterrupted)
        assert list((cache / "leases").rglob("0*7")) == []
        assert list((cache / "tmp").iterdir()) == []
    assert passed.value >= 20
