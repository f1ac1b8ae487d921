"""What was read from a bucket, kept on a disk near by: bounded in bytes, shared by processes, never believed unchecked.

An entry is one range of one file, exactly as it was asked for: training asks for the same ranges in every epoch, so
that blocks of a fixed size would fetch bytes that nobody wants. It ends with its own checksum; one that is torn or
damaged is a miss. Entries appear by rename and there are no locks.

When the cache is full, what was used or added since this cache was opened stays, and only older entries make room,
the least recently used first. An epoch comes back to every sample once: plain LRU would drop each shortly before its
turn, and with room for half of the data serve 15 % of the reads in place of 50 %.
"""

import hashlib
import logging
import os
import struct
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import xxhash

from mimir_shared.errors import InputError

_LOG: Final = logging.getLogger("mimir")
_TRAILER: Final = struct.Struct("<8sQ")
"""Mark, xxh3-64 of the bytes before."""
_MARK: Final = b"mimir-1\n"
_STEP_SHARE: Final = 1 / 64
"""Of the limit: what one process adds before it looks again at what all have added."""
_RESERVED_STEPS: Final = 8
"""Room for what other processes add meanwhile."""
_LOOK_AGAIN_S: Final = 60.0
_TORN_AFTER_S: Final = 3600.0
_CLOCK_GRACE_S: Final = 1.0
"""File systems stamp by a coarser clock than the one that programs are told."""


class LocalReadCache:
    """Ranges of immutable files. Safe between threads and processes."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Creates the folder. Raises InputError where that is not possible."""
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._opened_s = time.time() - _CLOCK_GRACE_S
        self._lock = threading.Lock()
        self._room_bytes = 0
        self._is_full = False
        self._looked_s = float("-inf")
        self._is_writable = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise InputError(f"--cache-dir {folder}: cannot be made: {fault.strerror}; choose another") from fault

    def read_into(self, url: str, offset: int, buffers: Sequence[memoryview]) -> bool:
        """Fill buffers with a range that is kept here; False where it is not, or not intact."""
        nbytes = sum(map(len, buffers))
        path = self._path(url, offset, nbytes)
        trailer = bytearray(_TRAILER.size)
        try:
            with open(path, "rb", buffering=0) as file:
                if _fill(file.fileno(), [*buffers, memoryview(trailer)]) != nbytes + len(trailer):
                    raise OSError
                if bytes(trailer) != _trailer(buffers):
                    raise OSError
                os.utime(file.fileno())
        except FileNotFoundError:
            return False
        except OSError:
            with suppress(OSError):
                path.unlink()
            return False
        return True

    def add(self, url: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """Keep a range, if there is room. A disk that cannot take it is told once and not asked again."""
        nbytes = sum(map(len, buffers)) + _TRAILER.size
        if not self._is_writable or not self._take_room(nbytes):
            return
        path = self._path(url, offset, nbytes - _TRAILER.size)
        temporary = self.folder / f"tmp-{os.getpid()}-{uuid.uuid4().hex}"
        try:
            path.parent.mkdir(exist_ok=True)
            with open(temporary, "xb") as file:
                for buffer in buffers:
                    file.write(buffer)
                file.write(_trailer(buffers))
            os.replace(temporary, path)
        except OSError as fault:
            self._is_writable = False
            _LOG.warning("%s: nothing more is kept: %s; reading goes on from the bucket", self.folder, fault.strerror)
            with suppress(OSError):
                temporary.unlink()

    def forget(self, url: str, offset: int, nbytes: int) -> None:
        """Drop a range whose bytes turned out not to be those that were committed."""
        with suppress(OSError):
            self._path(url, offset, nbytes).unlink()

    def _path(self, url: str, offset: int, nbytes: int) -> Path:
        name = hashlib.blake2b(f"{url}\0{offset}\0{nbytes}".encode(), digest_size=16).hexdigest()
        return self.folder / name[:2] / name[2:]

    def _take_room(self, nbytes: int) -> bool:
        with self._lock:
            if nbytes > self._room_bytes and (not self._is_full or time.monotonic() - self._looked_s > _LOOK_AGAIN_S):
                self._look()
            if nbytes > self._room_bytes:
                return False
            self._room_bytes -= nbytes
            return True

    def _look(self) -> None:
        """Count what lies here, drop what is old where there is too much, and take the next step of room."""
        self._looked_s = time.monotonic()
        step = max(1, int(self.limit_bytes * _STEP_SHARE))
        goal = self.limit_bytes - _RESERVED_STEPS * step
        entries = sorted(self._entries())
        total = sum(nbytes for _, nbytes, _ in entries)
        for used_s, nbytes, path in entries:
            if total <= goal - step or used_s >= self._opened_s:
                break
            with suppress(OSError):
                path.unlink()
            total -= nbytes
        self._room_bytes = max(0, min(step, goal - total))
        self._is_full = self._room_bytes < step

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(last used, bytes, path) of every entry; removes what processes left that died while writing."""
        found = []
        for entry in _scan(self.folder):
            if entry.name.startswith("tmp-"):
                with suppress(OSError):
                    if time.time() - entry.stat().st_mtime > _TORN_AFTER_S:
                        os.unlink(entry.path)
            elif len(entry.name) == 2:
                for file in _scan(Path(entry.path)):
                    with suppress(OSError):
                        status = file.stat()
                        found.append((status.st_mtime, status.st_size, Path(file.path)))
        return found


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _fill(descriptor: int, buffers: Sequence[memoryview]) -> int:
    done = 0
    for buffer in buffers:
        filled = 0
        while filled < len(buffer):
            count = os.readv(descriptor, [buffer[filled:]])
            if count == 0:
                return done + filled
            filled += count
        done += filled
    return done


def _trailer(buffers: Sequence[memoryview]) -> bytes:
    digest = xxhash.xxh3_64()
    for buffer in buffers:
        digest.update(buffer)
    return _TRAILER.pack(_MARK, digest.intdigest())
