"""Leases: workers that share a cache tell each other which shard they are at.

A lease is a small file that its owner keeps touching. It only saves work: two workers that make the same shard
cost time, never a wrong cache, for the commit record has one author whatever the leases say. So a lease
may be wrong (a worker sleeps, a clock jumps), and it is enough that this is rare.
"""

import contextlib
import json
import os
import random
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from types import TracebackType
from typing import Final, Self

from mimir_precompute.termination import when_stopped
from mimir_shared.errors import InputError, MachineError
from mimir_shared.failpoints import failpoint
from mimir_shared.feature_folder import FeatureFolder
from mimir_shared.features import FEATURES
from mimir_shared.layout import lease_directory, lease_name
from mimir_shared.lease_store import HeldLease, LeaseStore, StoredLease
from mimir_shared.plain_documents import parse_json
from mimir_shared.process_identity import life_of, process_domain
from mimir_shared.storage import machine_faults

HEARTBEAT_S: Final = 20.0
TTL_HEARTBEATS: Final = 6
"""A lease that was not touched for so many heartbeats may be taken over."""
_EXAMINED_AT_ONCE: Final = 8


@dataclass(frozen=True, kw_only=True)
class LeaseOwner:
    """Who has a lease: what is written into it. The fields are empty where its content is not whole yet."""

    host: str = ""
    domain: str = ""
    pid: int = 0
    token: str = ""
    """Of one `Leases`: a process may have several, one after the other."""
    ttl_s: float = HEARTBEAT_S * TTL_HEARTBEATS
    """The owner touches it much more often than this."""


def this_process(heartbeat_s: float) -> LeaseOwner:
    """An owner that touches its leases every `heartbeat_s`."""
    return LeaseOwner(
        host=socket.gethostname(),
        domain=process_domain(),
        pid=os.getpid(),
        token=uuid.uuid4().hex,
        ttl_s=heartbeat_s * TTL_HEARTBEATS,
    )


@dataclass(frozen=True, kw_only=True)
class SeenLease:
    """A lease as found in the cache, and whose it is."""

    stored: StoredLease
    owner: LeaseOwner

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def is_dead(self) -> bool:
        """Whether the owner ran on this machine and certainly does not any more."""
        return self.owner.pid > 0 and life_of(self.owner.domain, self.owner.pid) == "dead"

    def is_stale(self, now_s: float) -> bool:
        """Whether its owner is dead, or has not touched it for long.

        A time far ahead is stale too: the storage's clock was set back, and no heartbeat has come since.

        Args:
            now_s: by the clock of the storage.
        """
        return self.is_dead or abs(now_s - self.stored.touched_s) > self.owner.ttl_s


def read_lease(store: LeaseStore, name: str) -> SeenLease | None:
    """None where there is no such lease (any more)."""
    stored = store.read(name)
    if stored is None:
        return None
    try:
        return SeenLease(stored=stored, owner=LeaseOwner(**parse_json(stored.owner)))
    except (ValueError, TypeError):
        return SeenLease(stored=stored, owner=LeaseOwner())


def all_leases(store: LeaseStore) -> Iterator[SeenLease]:
    """Every lease of a cache."""
    for feature in FEATURES:
        for fingerprint in store.list(f"leases/{feature}"):
            directory = lease_directory(feature, fingerprint)
            for name in store.list(directory):
                seen = read_lease(store, f"{directory}/{name}")
                if seen is not None:
                    yield seen


def take_over(store: LeaseStore, seen: SeenLease) -> bool:
    """Remove a stale lease, so that anybody may take it. Of several workers that try, one succeeds."""
    removed = store.remove(seen.stored)
    failpoint("lease.taken_over")
    return removed


class Leases:
    """The leases that this process holds in one cache. Its thread touches them; `close` drops them."""

    def __init__(
        self,
        store: LeaseStore,
        *,
        heartbeat_s: float = HEARTBEAT_S,
        owner: LeaseOwner | None = None,
        beats: bool = True,
    ) -> None:
        """Hold nothing yet.

        Args:
            owner: who holds them; None: this process.
            beats: whether a thread touches them every `heartbeat_s`; without it, whoever has them calls `touch`.
        """
        self.store = store
        self._heartbeat_s = heartbeat_s
        self._owner = json.dumps(asdict(owner or this_process(heartbeat_s))).encode()
        self._beats = beats
        self._held: dict[str, HeldLease] = {}
        self._folders: set[str] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._heart: threading.Thread | None = None
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(when_stopped(self._leave))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def take(self, name: str) -> bool:
        """Take a lease that nobody has; False where somebody has it. Raises MachineError."""
        self._folders |= {str(folder) for folder in PurePosixPath(name).parents if folder.name}
        with machine_faults(f"{self.store.root}/{name}: taking the lease"):
            held = self.store.create(name, self._owner)
        if held is None:
            return False
        with self._lock:
            self._held[name] = held
        failpoint("lease.taken")
        if self._beats and self._heart is None:
            self._heart = threading.Thread(target=self._beat, name="leases", daemon=True)
            self._heart.start()
        return True

    def remove_abandoned(self) -> None:
        """Remove the leases of processes that died on this machine, committed shards' among them."""
        with machine_faults(f"{self.store.root}/leases: removing those of dead processes"):
            for lease in all_leases(self.store):
                if lease.is_dead:
                    take_over(self.store, lease)

    def holds(self, name: str) -> bool:
        return name in self._held

    def drop(self, name: str) -> None:
        """Give a lease back; nothing happens to one that another worker has taken over."""
        with self._lock:
            held = self._held.pop(name, None)
        if held is None:
            return
        # one that cannot be given back is taken over: at once from this machine, or when it is stale
        with contextlib.suppress(OSError, MachineError):
            held.drop()
        failpoint("lease.dropped")

    def drop_all(self) -> None:
        for name in list(self._held):
            self.drop(name)

    def close(self) -> None:
        """Drop every lease, end the thread, and remove the folders if nobody else is here."""
        self._closing.set()
        if self._heart is not None:
            self._heart.join()
        self._stack.close()
        self._leave()

    def _leave(self) -> None:
        self.drop_all()
        self.store.tidy(sorted(self._folders, key=len, reverse=True))

    def _beat(self) -> None:
        while not self._closing.wait(self._heartbeat_s):
            self.touch()

    def touch(self) -> None:
        """Say of every lease held that its owner lives. A storage that fails at it is not complained about."""
        with self._lock:
            for held in self._held.values():
                with contextlib.suppress(OSError, MachineError):
                    held.touch()
        failpoint("lease.heartbeat")


@dataclass(frozen=True)
class Waiting:
    """Nothing can be claimed now."""

    num_left: int
    """Shards that other workers hold, or that wait for what they are made from."""


class ShardClaims:
    """Deals out the shards of one feature that are still to be made, to this worker among others.

    `finished` and `close` may be called by other threads than `next`.

    Args:
        shards: what this call of `encode` is to make.
        generations: shard → the generation that is to be made, for shards that are made again.
        needs: folders of features that must have a shard before this feature can be made of it.
        needs_will_come: whether other workers see to those, though none may be at it just now.
        say: told once, when all that is left is in the hands of other workers.
        poll_s: how often to look while waiting; None: as the store of the leases has it.
    """

    def __init__(
        self,
        folder: FeatureFolder,
        shards: Sequence[int],
        leases: Leases,
        *,
        generations: Mapping[int, int] | None = None,
        needs: Sequence[FeatureFolder] = (),
        needs_will_come: bool = False,
        say: Callable[[str], None] = lambda _: None,
        poll_s: float | None = None,
        choose: random.Random | None = None,
    ) -> None:
        self._folder = folder
        self._shards = tuple(shards)
        self._leases = leases
        self._generations = generations or {}
        self._needs = tuple(needs)
        self._needs_will_come = needs_will_come
        self._say = say
        self._poll_s = leases.store.poll_s if poll_s is None else poll_s
        self._store = leases.store
        self._random = choose or random.Random()
        self._closed = threading.Event()

    def next(self) -> int | None:
        """Claim a shard that is neither committed nor leased by another living worker.

        Blocks while only shards that others hold are left.

        Returns: None when every shard is committed, or claimed here and not yet `finished`; and after `close`.
        Raises: InputError where a shard lacks what it is made from, and nobody is making that.
        """
        pause_s = min(0.05, self._poll_s)
        told = False
        while isinstance(found := self.attempt(), Waiting):
            if not told:
                self._say(f"{self._folder.feature}: waiting for {found.num_left} shards that other workers hold")
                told = True
            self._closed.wait(pause_s * self._random.uniform(0.5, 1.5))
            pause_s = min(pause_s * 2, self._poll_s)
        return found

    def attempt(self) -> int | Waiting | None:
        """As `next`, but it says that it would wait instead of waiting."""
        while left := self._left():
            leased = self._leased(self._folder)
            free = [shard for shard in left if shard not in leased]
            ready = self._with_needs(free)
            for shard in self._in_my_order(ready, alone=not leased):
                if self._leases.take(self._lease(shard)):
                    # only now, for its last holder may have committed it since the list was made
                    if not self._uncommitted([shard]):
                        self._leases.drop(self._lease(shard))
                        continue
                    return shard
            if not ready:
                if free and len(free) == len(left):
                    self._check_needs(free)
                if not self._take_over_stale(self._folder, leased & set(left)):
                    return Waiting(len(left))
        return None

    def finished(self, shard: int) -> None:
        """Drop the lease of a shard: it is committed, or it is given up."""
        self._leases.drop(self._lease(shard))

    def close(self) -> None:
        """Drop what is still claimed, and end a wait in `next`. May be called twice."""
        self._closed.set()
        for shard in self._shards:
            self._leases.drop(self._lease(shard))

    def _lease(self, shard: int) -> str:
        return lease_name(self._folder.feature, self._folder.fingerprint, shard)

    def _left(self) -> list[int]:
        if self._closed.is_set():
            return []
        return [s for s in self._uncommitted(self._shards) if not self._leases.holds(self._lease(s))]

    def _uncommitted(self, shards: Iterable[int]) -> list[int]:
        newest = self._folder.generations()
        return [shard for shard in shards if newest.get(shard, -1) < self._generations.get(shard, 0)]

    def _leased(self, folder: FeatureFolder) -> set[int]:
        names = self._store.list(lease_directory(folder.feature, folder.fingerprint))
        found = {int(name) for name in names if name.isdecimal()}
        if folder is self._folder:
            found -= {shard for shard in found if self._leases.holds(self._lease(shard))}
        return found

    def _in_my_order(self, shards: list[int], *, alone: bool) -> Iterable[int]:
        # Workers that start together begin at different places; one that is alone goes from the first on.
        start = 0 if alone or not shards else self._random.randrange(len(shards))
        return shards[start:] + shards[:start]

    def _with_needs(self, shards: list[int]) -> list[int]:
        for folder in self._needs:
            made = folder.generations()
            shards = [shard for shard in shards if shard in made]
        return shards

    def _check_needs(self, shards: list[int]) -> None:
        """Wait for what others are making; what nobody makes, nobody may wait for."""
        for folder in self._needs:
            made = folder.generations()
            lacking = [shard for shard in shards if shard not in made]
            leased = self._leased(folder) & set(lacking)
            if leased:
                self._take_over_stale(folder, leased)
            elif lacking and not self._needs_will_come:
                raise InputError(
                    f"{self._folder.storage.root}: shard {lacking[0]} has no `{folder.feature}` yet, from which "
                    f"`{self._folder.feature}` is made; encode both: --features {folder.feature},{self._folder.feature}"
                )

    def _take_over_stale(self, folder: FeatureFolder, leased: set[int]) -> bool:
        """Free stale leases among some of these, chosen by chance so that idle workers do not all ask for all."""
        chosen = self._random.sample(sorted(leased), min(len(leased), _EXAMINED_AT_ONCE))
        names = [lease_name(folder.feature, folder.fingerprint, shard) for shard in chosen]
        seen = [lease for lease in (read_lease(self._store, name) for name in names) if lease is not None]
        now_s = self._store.now_s() if seen else 0.0
        stale = [lease for lease in seen if lease.is_stale(now_s)]
        for lease in stale:
            take_over(self._store, lease)
        return bool(stale) or len(seen) < len(names)
