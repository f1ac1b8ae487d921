"""Leases as files of a folder: created by `link`, touched by their time, taken over by `rename`."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mimir_shared.storage.lease_store import StoredLease

if TYPE_CHECKING:
    from mimir_shared.storage.folder import LocalStorage

POLL_S: Final = 2.0


class LocalLeaseStore:
    """The leases of a cache in a folder of a local or network file system."""

    poll_s = POLL_S

    def __init__(self, storage: "LocalStorage") -> None:
        self._storage = storage

    @property
    def root(self) -> Path:
        return self._storage.root

    def now_s(self) -> float:
        return self._storage.now_s()

    def list(self, directory: str) -> list[str]:
        return self._storage.list(directory)

    def create(self, name: str, owner: bytes) -> "LocalLease | None":
        """See LeaseStore.

        A lease of nobody, left by a worker that was killed between creating and writing it, would hold its shard until
        it is stale: so it is written under another name first.
        """
        path = self._storage.path(name)
        if path.exists():
            return None
        with self._storage.temporary() as temporary:
            temporary.file.write(owner)
            temporary.file.flush()
            while True:
                self._storage.check_mounted()
                with contextlib.suppress(FileExistsError, FileNotFoundError):  # it may go while it is made
                    path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._storage.disk.link(temporary.path, path)
                    return LocalLease(self, name, owner, os.dup(temporary.file.fileno()))
                except FileExistsError:
                    return None
                except FileNotFoundError:
                    if not temporary.path.exists():  # what is to be linked is gone, with its mount perhaps
                        self._storage.check_mounted()
                        raise
                    # else another worker has just removed the empty folder

    def read(self, name: str) -> StoredLease | None:
        return _read(self._storage.path(name), name)

    def remove(self, seen: StoredLease) -> bool:
        try:
            aside = self._storage.set_aside(seen.name)
        except FileNotFoundError:
            return False
        found = _read(self._storage.path(aside), seen.name)
        same = found is None or found == seen
        if not same:
            # another worker was faster, or its owner lives after all: what was moved goes back
            with contextlib.suppress(OSError):
                self._storage.disk.link(self._storage.path(aside), self._storage.path(seen.name))
        self._storage.remove(aside)
        return same

    def drop(self, name: str, owner: bytes) -> None:
        """Remove a lease that has this owner, or none."""
        found = self.read(name)
        if found is not None and found.owner in (owner, b""):
            self._storage.path(name).unlink(missing_ok=True)

    def tidy(self, directories: Iterable[str]) -> None:
        for directory in directories:
            with contextlib.suppress(OSError):
                self._storage.path(directory).rmdir()


class LocalLease:
    """A lease that this process has, and an open descriptor of its file."""

    def __init__(self, store: LocalLeaseStore, name: str, owner: bytes, descriptor: int) -> None:
        self._store = store
        self._name = name
        self._owner = owner
        self._descriptor = descriptor

    def touch(self) -> None:
        # through the descriptor: a lease that was taken over is another worker's to touch
        os.utime(self._descriptor)

    def drop(self) -> None:
        os.close(self._descriptor)
        self._store.drop(self._name, self._owner)


def _read(path: Path, name: str) -> StoredLease | None:
    try:
        # opened, not only looked at, for a network file system then asks its server for the time
        with open(path, "rb") as file:
            return StoredLease(name=name, touched_s=os.fstat(file.fileno()).st_mtime, owner=file.read())
    except OSError:
        return None
