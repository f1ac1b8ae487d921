"""Leases as objects of a bucket: created if absent, touched and taken over by writes that name the version seen.

An object is its owner's line and a second line that no other write has, so that each write gives another entity tag,
and so that an answer that was lost can be told from a lost race by reading back.
"""

import uuid
from collections.abc import Callable, Iterable
from typing import Final

from mimir_shared.errors import MachineError
from mimir_shared.storage.bucket_objects import BucketObjects, Version
from mimir_shared.storage.lease_store import StoredLease

POLL_S: Final = 10.0
"""A look is several requests, which cost money, and services slow down who asks too often."""


class BucketLeaseStore:
    """The leases of a cache in a bucket."""

    poll_s = POLL_S

    def __init__(self, objects: BucketObjects, impatient: BucketObjects, now_s: Callable[[], float]) -> None:
        """Leases among some objects.

        Args:
            impatient: the same place with shorter limits: a heartbeat that fails is followed by another one, and a
                process that is told to end does not wait for the bucket.
            now_s: by the service's clock.
        """
        self._objects = objects
        self.impatient = impatient
        self._now_s = now_s

    @property
    def root(self) -> str:
        return self._objects.root

    def now_s(self) -> float:
        return self._now_s()

    def list(self, directory: str) -> list[str]:
        return self._objects.names(directory)

    def create(self, name: str, owner: bytes) -> "BucketLease | None":
        """See LeaseStore."""
        return BucketLease(self, name, owner) if self._objects.create(name, _content(owner)) else None

    def read(self, name: str) -> StoredLease | None:
        return read_lease_object(self._objects, name)

    def remove(self, seen: StoredLease) -> bool:
        # ours first, by a write that only one of several can do; then nobody else has reason to touch it
        if not self._objects.replace(seen.name, _content(b""), seen.version):
            return False
        self._objects.delete(seen.name)
        return True

    def tidy(self, directories: Iterable[str]) -> None:
        """Nothing to be done: a bucket has no folders."""


class BucketLease:
    """A lease that this process has."""

    def __init__(self, store: BucketLeaseStore, name: str, owner: bytes) -> None:
        self._store = store
        self._name = name
        self._owner = owner
        self._version: Version | None = None
        """That it has now; None where that is not known."""

    def touch(self) -> None:
        """See HeldLease."""
        if self._version is None:
            self._version = self._find_version()
        if self._version is None:
            return
        expected, self._version = self._version, None
        self._version = self._store.impatient.replace(self._name, _content(self._owner), expected)

    def drop(self) -> None:
        """See HeldLease."""
        if self._find_version() is not None:
            self._store.impatient.delete(self._name)

    def _find_version(self) -> Version | None:
        """None where it is not ours any more."""
        found = read_lease_object(self._store.impatient, self._name)
        return found.version if found is not None and found.owner == self._owner else None


def read_lease_object(objects: BucketObjects, name: str) -> StoredLease | None:
    """None where there is no such lease, or the bucket does not say."""
    try:
        found = objects.get(name)
    except (FileNotFoundError, MachineError):
        return None
    owner = found.data.partition(b"\n")[0]
    return StoredLease(name=name, owner=owner, touched_s=found.modified_s, version=found.version)


def _content(owner: bytes) -> bytes:
    return owner + b"\n" + uuid.uuid4().hex.encode() + b"\n"
