"""Removes from a cache what nothing names any more, and nothing that anybody may be about to name.

What a worker is about to name is protected three times over. It is young: only what was not touched for
the grace period, by the storage's own clock, is removed. It belongs to a shard that a living worker has
leased, or its temporary file still is there as a second name. And if a worker slept longer than all that:
a file is first set aside, then the commit records are read once more and it goes back if one names it,
while the worker, after its record, looks for its data once more and publishes them again.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Final, Literal

from mimir_precompute.workers.lease import all_leases, take_over
from mimir_precompute.workers.seen_lease import read_lease
from mimir_shared.errors import CacheError
from mimir_shared.failpoints import failpoint
from mimir_shared.feature_folder import FeatureFolder, find_features
from mimir_shared.layout import lease_name, parse_record_name, second_lease_name
from mimir_shared.snapshot import Snapshot, list_snapshots
from mimir_shared.storage.folder import machine_faults
from mimir_shared.storage.found_file import FoundFile
from mimir_shared.storage.protocol import Storage

GRACE_S: Final = 3600.0
GarbageKind = Literal["data", "record", "lease", "temporary", "snapshot"]


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """One file that nothing needs. `name` is relative to the cache."""

    kind: GarbageKind
    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class GcReport:
    removed: tuple[Garbage, ...]
    """Or, of a dry run, what would be removed."""
    dry_run: bool

    @property
    def bytes(self) -> int:
        return sum(garbage.bytes for garbage in self.removed)

    def to_json(self) -> dict[str, object]:
        return {
            "dry_run": self.dry_run,
            "bytes": self.bytes,
            "removed": [asdict(garbage) for garbage in self.removed],
        }


def collect_garbage(storage: Storage, *, grace_s: float = GRACE_S, dry_run: bool = False) -> GcReport:
    """Remove data that no commit record names, superseded records, stale leases and abandoned temporary files.

    A superseded generation of a shard goes when no snapshot names it, a newer one is intact, and that one is older
    than the grace period. What any snapshot names stays.

    Raises: CacheError where a snapshot is damaged, for nobody can say then what it names; MachineError.
    """
    with machine_faults(f"{storage.root}: gc"):
        collector = _Collector(storage, grace_s)
        found = collector.find()
        removed = found if dry_run else tuple(garbage for garbage in found if collector.remove(garbage))
        return GcReport(removed=removed, dry_run=dry_run)


class _Collector:
    """What one call of `gc` knows of a cache. It looks at leases first and at data last, as workers do in reverse."""

    def __init__(self, storage: Storage, grace_s: float) -> None:
        self._storage = storage
        self._grace_s = grace_s
        self._now_s = storage.now_s()
        self._lease_store = storage.lease_store()
        self._leases = list(all_leases(self._lease_store))
        self._leased = {lease.name for lease in self._leases if not lease.is_stale(self._now_s)}
        self._snapshot_names = storage.list("snapshots")
        self._snapshots = list_snapshots(storage)

    def find(self) -> tuple[Garbage, ...]:
        stale = [lease for lease in self._leases if lease.is_stale(self._now_s)]
        found = [Garbage(kind="lease", name=lease.name, bytes=len(lease.stored.owner)) for lease in stale]
        lives = self._storage.temporaries()
        for file in self._storage.files("tmp"):
            life = lives.get("/".join(file.name.split("/")[:2]), "unknown")
            if life == "dead" or (life == "unknown" and self._is_old(file)):
                found.append(_garbage("temporary", file))
        found += self._unfinished_snapshots()
        for folder in find_features(self._storage):
            found += self._garbage_of(folder)
        return tuple(found)

    def remove(self, garbage: Garbage) -> bool:
        """Remove one file; False where it turned out to be needed, or is gone."""
        match garbage.kind:
            case "lease":
                seen = read_lease(self._lease_store, garbage.name)
                done = seen is not None and seen.is_stale(self._now_s) and take_over(self._lease_store, seen)
            case "temporary":
                self._storage.remove(garbage.name)
                done = True
            case "data" | "record" | "snapshot":
                done = self._remove_unless_named(garbage)
        failpoint("gc.removed")
        return done

    def _remove_unless_named(self, garbage: Garbage) -> bool:
        if self._is_named(garbage):
            return False
        try:
            aside = self._storage.set_aside(garbage.name)
        except FileNotFoundError:
            return False
        failpoint("gc.set_aside")
        named = self._is_named(garbage)
        if named:
            self._storage.put_back(aside, garbage.name)
        self._storage.remove(aside)
        self._remove_empty_folders(garbage.name)
        return not named

    def _is_named(self, garbage: Garbage) -> bool:
        """Look again whether something needs the file: before it is set aside, and when it is."""
        if garbage.kind == "snapshot":
            return self._storage.exists(f"{garbage.name.rpartition('/')[0]}/snapshot.json")
        feature, fingerprint, _, file = garbage.name.split("/", 3)
        folder = next(f for f in find_features(self._storage) if (f.feature, f.fingerprint) == (feature, fingerprint))
        if self._storage.list("snapshots") != self._snapshot_names:
            self._snapshot_names = self._storage.list("snapshots")
            self._snapshots = list_snapshots(self._storage)
        if garbage.kind == "record":
            return parse_record_name(file) in _pinned_records(self._snapshots, folder)
        shard = _shard_of(file)
        # by names alone: this is asked for every file that is to go, and a folder may hold thousands of records
        names = self._storage.list(f"{folder.directory}/manifests")
        places = [place for place in map(parse_record_name, names) if place is not None and place[0] == shard]
        records = _Records(self._storage, folder, places)
        return shard in records.damaged or garbage.name in records.files() | _pinned_files(self._snapshots)

    def _garbage_of(self, folder: FeatureFolder) -> Iterator[Garbage]:
        found = {
            place: file
            for file in self._storage.files(f"{folder.directory}/manifests")
            if (place := parse_record_name(file.name.rpartition("/")[2])) is not None
        }
        records = _Records(self._storage, folder, found)
        pinned = _pinned_records(self._snapshots, folder)
        superseded = {
            (shard, generation)
            for shard, generation in records.superseded()
            if (shard, generation) not in pinned and self._may_touch(folder, shard)
            # a snapshot that was begun before may still come to name the older one
            if self._is_old(found[shard, records.newest[shard]])
        }
        for place in sorted(superseded):
            yield _garbage("record", found[place])
        named = records.files(leave_out=superseded) | _pinned_files(self._snapshots)
        for file in self._storage.files(f"{folder.directory}/data"):
            owner = _shard_of(file.name.removeprefix(f"{folder.directory}/data/"))
            if owner is None or owner in records.damaged or file.name in named or not self._may_touch(folder, owner):
                continue
            if self._is_old(file) and not self._storage.has_second_name(file.name):
                yield _garbage("data", file)

    def _unfinished_snapshots(self) -> Iterator[Garbage]:
        files = list(self._storage.files("snapshots"))
        finished = {file.name for file in files if file.name.endswith("/snapshot.json")}
        for file in files:
            directory, _, name = file.name.rpartition("/")
            if name == "index.arrow" and f"{directory}/snapshot.json" not in finished and self._is_old(file):
                yield _garbage("snapshot", file)

    def _may_touch(self, folder: FeatureFolder, shard: int) -> bool:
        names = {named(folder.feature, folder.fingerprint, shard) for named in (lease_name, second_lease_name)}
        return names.isdisjoint(self._leased)

    def _is_old(self, file: FoundFile) -> bool:
        return self._now_s - file.modified_s > self._grace_s

    def _remove_empty_folders(self, name: str) -> None:
        folder = PurePosixPath(name).parent
        while folder.name != "data" and len(folder.parts) > 1:
            self._storage.remove_empty_folder(folder.as_posix())
            folder = folder.parent


def _garbage(kind: GarbageKind, file: FoundFile) -> Garbage:
    return Garbage(kind=kind, name=file.name, bytes=file.nbytes)


class _Records:
    """The commit records of a feature, or some of them, and the files that each names.

    Args:
        places: (shard, generation) of each. Of a shard all that there are, or none.
    """

    def __init__(self, storage: Storage, folder: FeatureFolder, places: Iterable[tuple[int, int]]) -> None:
        self._storage = storage
        self._folder = folder
        self._files: dict[tuple[int, int], frozenset[str]] = {}
        self.damaged: set[int] = set()
        """Shards of which a record cannot be read: what they name is unknown, so nothing of them is removed."""
        self.newest: dict[int, int] = {}
        for place in places:
            self._read(*place)

    def _read(self, shard: int, generation: int) -> None:
        self.newest[shard] = max(generation, self.newest.get(shard, -1))
        try:
            metadata, _ = self._folder.read_record_metadata(shard, generation)
        except CacheError:
            self.damaged.add(shard)
            return
        names = frozenset(f"{self._folder.directory}/{file.path}" for file in metadata.files)
        self._files[shard, generation] = names

    def files(self, leave_out: Iterable[tuple[int, int]] = ()) -> set[str]:
        """Names, relative to the cache, of all that the records name, but for those left out."""
        without = set(leave_out)
        return {name for place, names in self._files.items() if place not in without for name in names}

    def superseded(self) -> Iterator[tuple[int, int]]:
        """(shard, generation) of records below one that is whole, data included."""
        for shard, generation in self._files:
            newest = self.newest[shard]
            whole = shard not in self.damaged and all(map(self._storage.exists, self._files.get((shard, newest), ())))
            if generation < newest and whole:
                yield shard, generation


def _shard_of(path: str) -> int | None:
    """The shard that a file below data/ belongs to; None where it is not one of ours."""
    number = path.split("-")[0]
    return int(number) if number.isdecimal() else None


def _pinned_records(snapshots: Iterable[Snapshot], folder: FeatureFolder) -> set[tuple[int, int]]:
    pinned: set[tuple[int, int]] = set()
    for snapshot in snapshots:
        feature = snapshot.features.get(folder.feature)
        if feature is not None and feature.fingerprint.startswith(folder.fingerprint):
            pinned |= {(shard, generation) for shard, generation, _ in feature.records}
    return pinned


def _pinned_files(snapshots: Iterable[Snapshot]) -> set[str]:
    return {name for snapshot in snapshots for feature in snapshot.features.values() for name in feature.files}
