"""A file of a storage as Python's own readers expect one: sequential, seekable, read-only."""

import io
from typing import Final

from mimir_shared.storage.protocol import Storage

_AHEAD_BYTES: Final = 32 << 20
"""Read at once: from a bucket in several requests at a time."""


def open_stored_file(storage: Storage, name: str) -> io.BufferedReader:
    """A file to be read from its beginning. Raises FileNotFoundError where there is none."""
    storage.read_into(name, 0, [memoryview(bytearray(1))])
    return io.BufferedReader(_StoredFile(storage, name), _AHEAD_BYTES)


class _StoredFile(io.RawIOBase):
    def __init__(self, storage: Storage, name: str) -> None:
        self._storage = storage
        self._name = name
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # any writable buffer there
        nbytes = self._storage.read_into(self._name, self._position, [memoryview(buffer).cast("B")])
        self._position += nbytes
        return nbytes

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the end of a stored file is found by reading it")
        self._position = offset + (self._position if whence == io.SEEK_CUR else 0)
        return self._position
