"""Power is cut behind any operation; what was not fsynced is lost, torn or reordered. No bad shard is ever believed."""

import contextlib
import random
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from mimir_precompute.inspection.verify import verify_cache
from mimir_shared.errors import CacheError
from mimir_shared.feature_folder import find_features
from mimir_shared.storage.folder import LocalStorage
from tests.faults.conftest import World
from tests.faults.power import RecordingDisk
from tests.faults.workers import assert_same_cache, compared, encode

CUTS = 200
CUTS_IN_A_ROW = 3


def _wrong(cache: Path, uninterrupted: Mapping[str, bytes]) -> list[str]:
    """What is wrong with what a power cut left: nothing published may be torn, and all that is named is there."""
    wrong = [name for name, data in compared(cache).items() if uninterrupted.get(name) != data]
    storage = LocalStorage(cache)
    if not storage.list("plan"):
        return wrong + [f"{folder.directory} without a plan" for folder in find_features(storage)]
    try:
        return wrong + [problem.detail for problem in verify_cache(storage).problems]
    except CacheError as fault:
        return [*wrong, str(fault)]


def test_two_hundred_power_cuts_leave_no_bad_shard_and_the_next_run_ends_in_the_same_cache(
    world: World, memory_folder: Path
) -> None:
    choose = random.Random(0)
    cuts, places = 0, set()
    while cuts < CUTS:
        cache = memory_folder / "fresh"
        disk = RecordingDisk(cache)
        encode(cache, world.clips, disk=disk)
        # the run after a cut is recorded too, and cut in turn
        for _ in range(CUTS_IN_A_ROW):
            left = memory_folder / str(cuts)
            places.add(disk.cut_power(choose, left))
            cuts += 1
            assert _wrong(left, world.uninterrupted) == []
            shutil.rmtree(cache)
            cache, disk = left, RecordingDisk(left)
            encode(cache, world.clips, disk=disk)
            assert_same_cache(cache, world.uninterrupted)
        shutil.rmtree(cache)
    assert len(places) > 50, "the cuts are all at the same few places"


class _Stopped(Exception):
    """Ends the first of two workers where it stands."""


@contextlib.contextmanager
def _nobody_waits(cache: Path) -> Iterator[None]:
    """Take away every lease, again and again: one worker would wait for the other, which lives and does not move."""
    done = threading.Event()

    def sweep() -> None:
        while not done.wait(0.01):
            shutil.rmtree(cache / "leases", ignore_errors=True)

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        yield
    finally:
        done.set()
        sweeper.join()


class _FirstWorker:
    """Stops behind its n-th new name of a kind; there another worker encodes the rest, and then the power is cut."""

    def __init__(self, cache: Path, left: Path, clips: Path, countdown: int, kind: str = "") -> None:
        self.stopped_behind: str | None = None
        self._kind = kind
        self._cache = cache
        self._left = left
        self._clips = clips
        self._countdown = countdown
        self._disk = RecordingDisk(cache, then=self._passed)

    def run(self) -> None:
        with contextlib.suppress(_Stopped):
            encode(self._cache, self._clips, disk=self._disk)

    def _passed(self, name: str) -> None:
        if self.stopped_behind is not None or self._kind not in name:
            return
        self._countdown -= 1
        if self._countdown < 0:
            self.stopped_behind = name
            with _nobody_waits(self._cache):
                encode(self._cache, self._clips, disk=self._disk)
            self._disk.keep_what_is_durable(self._left)
            raise _Stopped


def test_what_a_worker_builds_upon_is_durable_though_its_author_never_came_to_the_fsync(
    world: World, memory_folder: Path
) -> None:
    def stop_behind(countdown: int, kind: str = "") -> str | None:
        cache, left = memory_folder / "cache", memory_folder / "left"
        first = _FirstWorker(cache, left, world.clips, countdown, kind)
        first.run()
        if first.stopped_behind is not None:
            assert_same_cache(left, world.uninterrupted)
            shutil.rmtree(left)
        shutil.rmtree(cache)
        return first.stopped_behind

    stopped_behind: list[str] = []
    while (name := stop_behind(len(stopped_behind))) is not None:
        stopped_behind.append(name)
    # threads take turns in another order each time, so that counting may miss a name or meet it twice
    for kind in ("plan/", "spec.json", "empty.", "data/", "manifests/", "index.arrow", "snapshot.json"):
        stopped_behind.append(stop_behind(0, kind) or "")
        assert kind in stopped_behind[-1], f"the first worker never stopped behind {kind}"
    folders = set(stopped_behind) - set(world.uninterrupted)
    assert len(folders) > 8, f"too few new folders were stopped behind: {folders}"


@pytest.mark.parametrize("forgotten", ["sync", "sync_folder"])
def test_a_protocol_without_fsync_of_files_or_of_folders_fails_the_same_cuts(
    world: World, memory_folder: Path, forgotten: str
) -> None:
    choose = random.Random(2)
    disk = RecordingDisk(memory_folder / "cache", forgets=(forgotten,))
    encode(memory_folder / "cache", world.clips, disk=disk)
    wrong = 0
    for number in range(40):
        left = memory_folder / str(number)
        disk.cut_power(choose, left)
        wrong += bool(_wrong(left, world.uninterrupted))
    assert wrong > 0, "the cuts do not tell a protocol that fsyncs from one that does not"
