"""A cache's place in memory, with a clock that a simulation sets: what leases and commits ask of a storage, counted."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mimir_precompute.shard_writer import FinishedShard
from mimir_shared.formats.shard_format import WrittenFile
from mimir_shared.manifest import DataFile
from mimir_shared.storage.folder import TemporaryFile
from mimir_shared.storage.lease_store import StoredLease


class SimulatedClock:
    """Shows what it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SimulatedStorage:
    """Files by name. Of what a cache asks of a storage, that which leases and commits do."""

    def __init__(self, clock: SimulatedClock, *, poll_s: float) -> None:
        self.clock = clock
        self.poll_s = poll_s
        self.files: dict[str, dict[str, bytes]] = {}
        """folder → name in it → content."""
        self.requests: Counter[str] = Counter()
        self.by_second: Counter[int] = Counter()
        self._leases = SimulatedLeaseStore(self)
        self._nothing = TemporaryFile(Path(os.devnull), open(os.devnull, "rb"))  # noqa: SIM115

    @property
    def root(self) -> str:
        return "simulated"

    def count(self, kind: str) -> None:
        self.requests[kind] += 1
        self.by_second[int(self.clock.now)] += 1

    def now_s(self) -> float:
        self.count("ask for the time")
        return self.clock.now

    def lease_store(self) -> "SimulatedLeaseStore":
        return self._leases

    def list(self, directory: str) -> list[str]:
        self.count("list records")
        return sorted(self.files.get(directory, ()))

    def exists(self, name: str) -> bool:
        self.count("exists")
        return self.peek(name) is not None

    def read(self, name: str) -> bytes:
        self.count("read record")
        data = self.peek(name)
        if data is None:
            raise FileNotFoundError(name)
        return data

    def read_many(self, names: Sequence[str]) -> Iterator[bytes]:
        return map(self.read, names)

    def create(self, name: str, data: bytes) -> bool:
        self.count("create record")
        return self.put(name, data)

    def publish_content(self, temporary: TemporaryFile, name: str, sha256: str) -> None:
        self.count("write data")
        self.put(name, b"")

    def finished_shard(self, shard: int) -> FinishedShard:
        """A shard with one data file, of no bytes: they would only be carried."""
        file = DataFile(path=f"data/{shard:06d}-00000000.tar", bytes=0, sha256="0" * 64)
        return FinishedShard(files=(WrittenFile(temporary=self._nothing, data_file=file),), samples=(), statistics={})

    def peek(self, name: str) -> bytes | None:
        folder, base = _split(name)
        return self.files.get(folder, {}).get(base)

    def put(self, name: str, data: bytes) -> bool:
        folder, base = _split(name)
        return self.files.setdefault(folder, {}).setdefault(base, data) is data


class SimulatedLeaseStore:
    """Leases in memory: their owner, and when they were touched."""

    def __init__(self, storage: SimulatedStorage) -> None:
        self.storage = storage
        self.poll_s = storage.poll_s
        self.leases: dict[str, dict[str, SimulatedLease]] = {}
        """folder → name in it → lease."""

    @property
    def root(self) -> str:
        return self.storage.root

    def now_s(self) -> float:
        return self.storage.now_s()

    def list(self, directory: str) -> list[str]:
        self.storage.count("list leases")
        return sorted(self.leases.get(directory, ()))

    def create(self, name: str, owner: bytes) -> "SimulatedLease | None":
        self.storage.count("create lease")
        folder, base = _split(name)
        lease = SimulatedLease(self, name, owner)
        return lease if self.leases.setdefault(folder, {}).setdefault(base, lease) is lease else None

    def read(self, name: str) -> StoredLease | None:
        self.storage.count("read lease")
        lease = self.peek(name)
        return None if lease is None else lease.stored()

    def remove(self, seen: StoredLease) -> bool:
        self.storage.count("remove lease")
        lease = self.peek(seen.name)
        if lease is None or lease.stored() != seen:
            return False
        self.pop(lease)
        return True

    def tidy(self, directories: Iterable[str]) -> None:
        """Nothing to be done: there are no folders."""

    def peek(self, name: str) -> "SimulatedLease | None":
        folder, base = _split(name)
        return self.leases.get(folder, {}).get(base)

    def pop(self, lease: "SimulatedLease") -> None:
        """Remove this lease, and none that another worker has put in its place."""
        if self.peek(lease.name) is lease:
            folder, base = _split(lease.name)
            del self.leases[folder][base]


class SimulatedLease:
    """A lease, and the hold on it."""

    def __init__(self, store: SimulatedLeaseStore, name: str, owner: bytes) -> None:
        self._store = store
        self.name = name
        self._owner = owner
        self._touched_s = store.storage.clock.now

    def touch(self) -> None:
        self._store.storage.count("touch lease")
        self._touched_s = self._store.storage.clock.now

    def drop(self) -> None:
        self._store.storage.count("remove lease")
        self._store.pop(self)

    def stored(self) -> StoredLease:
        return StoredLease(name=self.name, owner=self._owner, touched_s=self._touched_s)


def _split(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    return folder, base
