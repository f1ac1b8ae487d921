"""Files that stay open between reads, so that a shard is not opened anew for every clip of it."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

MAX_OPEN_FILES: Final = 256

_MAX_BUFFERS: Final = 512
"""Of one preadv: half of what Linux takes."""

_WARM_BYTES: Final = 1 << 20
"""Of a piece that is read and then looked at: it fits into the second cache of servers of late. Smaller pieces are no
faster for one thread, and slower for several, for each is two moments at which they wait for one another."""


@dataclass
class _OpenFile:
    descriptor: int
    readers: int = 0
    """Threads that read from it now: until they are done it must not be closed, nor its number given away."""
    forgotten: bool = False
    """Its name has another file now: it is closed when the last of these is done."""


class OpenFiles:
    """The files read last. Safe between threads, which read at the same time: no position is kept."""

    def __init__(self, limit: int = MAX_OPEN_FILES) -> None:
        self._limit = limit
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(
        self,
        path: str,
        offset: int,
        buffers: Sequence[memoryview],
        seen: Callable[[memoryview], None] | None = None,
    ) -> int:
        """Fill buffers of bytes, one after the other, with what a file holds from `offset` on.

        Args:
            seen: is given all that was read, in order and piece by piece. Hashing costs half as much while a piece is
                still in the processor's cache, so that one call to the system becomes several.
        Returns: bytes read; fewer than the buffers take only where the file ends.
        Raises: OSError.
        """
        file = self._open(path)
        try:
            if seen is None:
                return _fill(file.descriptor, buffers, offset)
            done = 0
            for piece in _pieces(buffers):
                count = _fill(file.descriptor, piece, offset + done)
                done += count
                if count < sum(map(len, piece)):
                    break
                for buffer in piece:
                    seen(buffer)
            return done
        finally:
            with self._lock:
                file.readers -= 1
                if file.forgotten and not file.readers:
                    os.close(file.descriptor)
                if self._is_full:
                    self._close_oldest()

    def _open(self, path: str) -> _OpenFile:
        """A file that stays open until its `readers` is counted down again."""
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = _OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                self._files[path] = file
            self._files.move_to_end(path)
            file.readers += 1
            return file

    def forget(self, path: str) -> None:
        """Open a file, or all below a folder, anew at the next read: what had the name was replaced or moved."""
        with self._lock:
            for name in [name for name in self._files if name == path or name.startswith(f"{path}/")]:
                file = self._files.pop(name)
                file.forgotten = True
                if not file.readers:
                    os.close(file.descriptor)

    def _close_oldest(self) -> None:
        idle = [path for path, file in self._files.items() if not file.readers]
        while self._is_full and idle:
            os.close(self._files.pop(idle.pop(0)).descriptor)

    @property
    def _is_full(self) -> bool:
        return len(self._files) > self._limit

    def __len__(self) -> int:
        return len(self._files)

    def close(self) -> None:
        """Close them all; nobody may be reading."""
        for file in self._files.values():
            os.close(file.descriptor)
        self._files.clear()

    def __del__(self) -> None:
        self.close()


def _fill(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
    rest, done = buffers, 0
    while rest:
        count = os.preadv(descriptor, rest[:_MAX_BUFFERS], offset + done)
        if count == 0:
            break
        done += count
        rest = _after(rest, count)
    return done


def _pieces(buffers: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """Buffers and parts of them, in order: together so many bytes, but for the last."""
    piece: list[memoryview] = []
    room = _WARM_BYTES
    for buffer in buffers:
        start = 0
        while start < len(buffer):
            part = buffer[start : start + room]
            piece.append(part)
            start += len(part)
            room -= len(part)
            if room == 0:
                yield piece
                piece, room = [], _WARM_BYTES
    if piece:
        yield piece


def _after(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is still to be filled once `count` bytes have been read."""
    if count == sum(map(len, buffers)):
        return []
    rest = []
    for buffer in buffers:
        if count < len(buffer):
            rest.append(buffer[count:])
        count = max(count - len(buffer), 0)
    return rest
