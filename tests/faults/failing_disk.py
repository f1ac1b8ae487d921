"""Disks that fail: one whose n-th operation raises, and a real one that is small, full or read-only."""

import ctypes
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from mimir_shared.storage.disk import Disk
from tests.faults.workers import end_of, start

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_RDONLY, _MS_REMOUNT = 1, 32
NOT_ALLOWED = 77


class FailingDisk(Disk):
    """Raises an OSError at its n-th operation, and at each one after it: the fault stays until it is mended."""

    def __init__(self, fails_at: int | None, number: int) -> None:
        self.operations = 0
        self._fails_at = fails_at
        self._number = number

    def count(self) -> None:
        self.operations += 1
        if self._fails_at is not None and self.operations >= self._fails_at:
            raise OSError(self._number, os.strerror(self._number))

    def create(self, path: Path) -> BinaryIO:
        self.count()
        return io.BufferedWriter(_FailingFile(self, path), buffer_size=2048)  # type: ignore[return-value]

    def sync_file(self, file: BinaryIO) -> None:
        file.flush()
        self.count()

    def link(self, source: Path, target: Path) -> None:
        self.count()
        super().link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        self.count()
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        self.count()
        super().remove(path)

    def make_directory(self, path: Path) -> None:
        self.count()
        super().make_directory(path)

    def sync_directory(self, path: Path) -> None:
        self.count()
        super().sync_directory(path)


class _FailingFile(io.FileIO):
    def __init__(self, disk: FailingDisk, path: Path) -> None:
        super().__init__(path, "xb")
        self._disk = disk

    def write(self, data: bytes) -> int | None:  # type: ignore[override]  # any buffer there
        try:
            self._disk.count()
        except OSError:
            super().write(bytes(data)[: len(data) // 2])  # a disk fails in the middle of a write
            raise
        return super().write(data)


def _enter_own_mounts() -> bool:
    """Give this process mounts of its own; False where the system does not let it. For a forked child."""
    library = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if library.unshare(_CLONE_NEWUSER | _CLONE_NEWNS) != 0:
        return False
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError:
        return False
    return True


def mount_memory(folder: Path, options: str, *, again: bool = False, read_only: bool = False) -> None:
    """Mount a file system in memory, or mount it again with other options. Raises OSError."""
    flags = (_MS_REMOUNT if again else 0) | (_MS_RDONLY if read_only else 0)
    library = ctypes.CDLL(None, use_errno=True)
    if library.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))


def in_own_mounts(work: Callable[[], None]) -> None:
    """Run `work` in a child with mounts of its own; skip where that is not allowed."""

    def child() -> None:
        if not _enter_own_mounts():
            os._exit(NOT_ALLOWED)
        work()

    code = end_of(start(child))
    if code == NOT_ALLOWED:
        pytest.skip("this system does not let a user mount; the disk that fails by itself stands for it")
    assert code == 0
