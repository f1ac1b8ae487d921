"""A disk that is full, fails, is read-only or vanishes: a clear error, no damage, and the same command goes on."""

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mimir_shared import failpoints
from mimir_shared.errors import MachineError
from tests.faults.conftest import World
from tests.faults.failing_disk import FailingDisk, in_own_mounts, mount_memory
from tests.faults.workers import assert_same_cache, compared, encode, end_of, make_clips, start
from tests.programs import BIN, environment


@pytest.fixture(scope="module")
def one_shard(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One shard of three features: every kind of file is published, in as few operations as can be."""
    folder = tmp_path_factory.mktemp("one-shard")
    clips = make_clips(folder / "clips", 2)
    encode(folder / "whole", clips)
    return World(clips=clips, whole=folder / "whole", uninterrupted=compared(folder / "whole"))


def _count_operations(world: World, folder: Path) -> int:
    disk = FailingDisk(None, 0)
    encode(folder / "counted", world.clips, disk=disk)
    shutil.rmtree(folder / "counted")
    return disk.operations


@pytest.mark.parametrize("number", [errno.EIO, errno.EDQUOT, errno.ENOSPC], ids=["EIO", "EDQUOT", "ENOSPC"])
def test_a_disk_that_fails_from_its_nth_operation_on_stops_the_run_for_every_n_and_damages_nothing(
    one_shard: World, memory_folder: Path, number: int
) -> None:
    operations = _count_operations(one_shard, memory_folder)
    assert operations > 80
    stopped = 0
    for fails_at in range(1, operations + 1):
        cache = memory_folder / str(fails_at)
        disk = FailingDisk(fails_at, number)
        with contextlib.suppress(MachineError):
            encode(cache, one_shard.clips, disk=disk)
            # heartbeats and claims vary a little: this run was over before
            assert disk.operations < fails_at, f"operation {fails_at} failed and nobody was told"
            continue
        stopped += 1
        published = compared(cache) if cache.exists() else {}
        assert [name for name, data in published.items() if one_shard.uninterrupted.get(name) != data] == []
        encode(cache, one_shard.clips)
        assert_same_cache(cache, one_shard.uninterrupted)
        shutil.rmtree(cache)
    assert stopped > operations - 10


@pytest.mark.parametrize("size", ["24k", "64k", "140k", "200k"])
def test_a_full_disk_is_told_with_what_is_free_and_the_run_goes_on_when_there_is_room(
    world: World, tmp_path: Path, size: str
) -> None:
    def fill_and_mend() -> None:
        mount_memory(tmp_path, f"size={size}")
        with pytest.raises(MachineError, match=r"No space left on device.*bytes and \d+ files free.*ENOSPC") as caught:
            encode(tmp_path / "cache", world.clips)
        assert caught.value.exit_code == 5
        published = compared(tmp_path / "cache")
        assert [name for name, data in published.items() if world.uninterrupted.get(name) != data] == []
        mount_memory(tmp_path, "size=64m", again=True)
        encode(tmp_path / "cache", world.clips)
        assert_same_cache(tmp_path / "cache", world.uninterrupted)

    in_own_mounts(fill_and_mend)


def test_a_read_only_cache_is_told_before_any_model_is_looked_for(world: World, tmp_path: Path) -> None:
    def make_read_only_and_encode() -> None:
        mount_memory(tmp_path, "size=64m")
        shutil.copytree(world.whole, tmp_path / "cache", ignore=shutil.ignore_patterns("snapshots"))
        mount_memory(tmp_path, "size=64m", again=True, read_only=True)
        command = [BIN / "mimir-precompute", "encode", "--cache", tmp_path / "cache", "--models", "no/such/models"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
        sys.stderr.write(done.stderr)
        assert done.returncode == 2
        assert "the cache folder cannot be written: Read-only file system" in done.stderr
        assert compared(tmp_path / "cache").items() <= world.uninterrupted.items()

    in_own_mounts(make_read_only_and_encode)


@pytest.mark.parametrize("point", ["data.written", "data.dir_synced", "record.linked", "empty.linked"])
def test_a_mount_that_vanishes_stops_the_run_and_nothing_is_written_in_its_place(
    world: World, memory_folder: Path, point: str
) -> None:
    cache, away = memory_folder / "cache", memory_folder / "away"

    def vanish(name: str) -> None:
        if name == point:
            failpoints.arm(None)
            cache.rename(away)
            cache.mkdir()  # the folder that it was mounted on

    failpoints.arm(vanish)
    try:
        with pytest.raises(MachineError, match=r"not the folder any more|No such file|gone") as caught:
            encode(cache, world.clips)
    finally:
        failpoints.arm(None)
    assert caught.value.exit_code == 5
    assert compared(cache) == {}
    shutil.rmtree(cache)
    away.rename(cache)
    encode(cache, world.clips)
    assert_same_cache(cache, world.uninterrupted)


def test_too_many_open_files_stop_the_run_with_exit_code_5(world: World, memory_folder: Path) -> None:
    codes = set()
    for spare in range(0, 16, 2):
        cache = memory_folder / str(spare)

        def with_few_files(cache: Path = cache, spare: int = spare) -> None:
            open_now = len(os.listdir("/proc/self/fd")) - 1
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + spare, hard))
            encode(cache, world.clips)

        codes.add(end_of(start(with_few_files)))
        encode(cache, world.clips)
        assert_same_cache(cache, world.uninterrupted)
    assert codes == {0, 5}
