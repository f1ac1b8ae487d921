"""Leases: workers that share a cache tell each other which shard they are at.

A lease is a small file that its owner keeps touching. It only saves work: two workers that make the same shard
cost time, never a wrong cache, for the commit record has one author whatever the leases say. So a lease
may be wrong (a worker sleeps, a clock jumps), and it is enough that this is rare.

For the same reason an idle worker may make a shard once more that another one has had for much longer than shards
take: the first commit wins, and one slow machine does not hold up all others at the end.
"""

import contextlib
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath
from types import TracebackType
from typing import Final, Self

from mimir_precompute.termination import when_stopped
from mimir_precompute.workers.seen_lease import HEARTBEAT_S, LeaseOwner, SeenLease, read_lease, this_process
from mimir_shared.errors import InputError, MachineError
from mimir_shared.failpoints import failpoint
from mimir_shared.feature_folder import FeatureFolder
from mimir_shared.features import FEATURES
from mimir_shared.layout import lease_directory, lease_name, second_lease_name
from mimir_shared.storage.folder import machine_faults
from mimir_shared.storage.lease_store import HeldLease, LeaseStore

_EXAMINED_AT_ONCE: Final = 8
_EXAMINED_AT_START: Final = 64
SLOW_MEDIANS: Final = 2.0
"""A shard that was leased for so many times what this worker takes for one, in the median, may be made once more."""
_FEWEST_MEASURED: Final = 3
"""Shards that a worker must have made before it knows how long one takes."""


def all_leases(store: LeaseStore, *, at_most: int | None = None) -> Iterator[SeenLease]:
    """Every lease of a cache.

    Args:
        at_most: so many of each feature, chosen by chance.
    """
    for feature in FEATURES:
        for fingerprint in store.list(f"leases/{feature}"):
            directory = lease_directory(feature, fingerprint)
            names = store.list(directory)
            for name in names if at_most is None or len(names) <= at_most else random.sample(names, at_most):
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Hold nothing yet.

        Args:
            owner: who holds them; None: this process.
            beats: whether a thread touches them every `heartbeat_s`; without it, whoever has them calls `touch`.
            clock: seconds since any moment.
        """
        self.store = store
        self.clock = clock
        self._heartbeat_s = heartbeat_s
        self._owner = owner or this_process(heartbeat_s)
        self._behind_s: float | None = None
        """What the storage's clock shows when `clock` shows 0; asked for once."""
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
            if self._behind_s is None:
                self._behind_s = self.store.now_s() - self.clock()
            owner = replace(self._owner, taken_s=round(self._behind_s + self.clock(), 3))
            held = self.store.create(name, json.dumps(asdict(owner)).encode())
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
        """Remove leases of processes that died on this machine, committed shards' among them.

        Of very many leases some are looked at: thousands of workers that start must not each read all.
        """
        with machine_faults(f"{self.store.root}/leases: removing those of dead processes"):
            for lease in all_leases(self.store, at_most=_EXAMINED_AT_START):
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
        begin_with: shards that this worker takes before others, in order.
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
        begin_with: Collection[int] = (),
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
        self._begin_with = frozenset(begin_with)
        self._say = say
        self._poll_s = leases.store.poll_s if poll_s is None else poll_s
        self._store = leases.store
        self._random = choose or random.Random()
        self._closed = threading.Event()
        self._claimed_s: dict[int, float] = {}
        """When each shard that is claimed here and not finished was claimed."""
        self._taken_s: list[float] = []
        """How long this worker took for each shard, from the claim to the commit."""

    def next(self) -> int | None:
        """Claim a shard that is neither committed nor leased by another living worker.

        Where there is none, one that another worker has had for much longer than this one takes; a shard is made twice
        at once, and never three times. Blocks while only shards that others hold are left.

        Returns: None when every shard is committed, or claimed here and not yet `finished`; and after `close`.
        Raises: InputError where a shard lacks what it is made from, and nobody is making that.
        """
        pauses_s = self.pauses_s()
        told = False
        while isinstance(found := self.attempt(), Waiting):
            if not told:
                self._say(f"{self._folder.feature}: waiting for {found.num_left} shards that other workers hold")
                told = True
            self._closed.wait(next(pauses_s))
        return found

    def pauses_s(self) -> Iterator[float]:
        """How long to wait between one `attempt` and the next: longer and longer, and never as long as others do."""
        pause_s = min(0.05, self._poll_s)
        while True:
            yield pause_s * self._random.uniform(0.5, 1.5)
            pause_s = min(pause_s * 2, self._poll_s)

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
                    self._claimed_s[shard] = self._leases.clock()
                    return shard
            if not ready:
                if free and len(free) == len(left):
                    self._check_needs(free)
                seen, now_s = self._examine(self._folder, leased & set(left))
                if not self._take_over_stale(seen, now_s):
                    again = self._claim_again(seen, now_s)
                    return Waiting(len(left)) if again is None else again
        return None

    def finished(self, shard: int) -> None:
        """Drop the lease of a shard: it is committed, or it is given up."""
        claimed_s = self._claimed_s.pop(shard, None)
        if claimed_s is not None:
            self._taken_s.append(self._leases.clock() - claimed_s)
        self._drop(shard)

    def close(self) -> None:
        """Drop what is still claimed, and end a wait in `next`. May be called twice."""
        self._closed.set()
        for shard in self._shards:
            self._drop(shard)

    def _lease(self, shard: int) -> str:
        return lease_name(self._folder.feature, self._folder.fingerprint, shard)

    def _second_lease(self, shard: int) -> str:
        return second_lease_name(self._folder.feature, self._folder.fingerprint, shard)

    def _drop(self, shard: int) -> None:
        self._leases.drop(self._lease(shard))
        self._leases.drop(self._second_lease(shard))

    def _left(self) -> list[int]:
        if self._closed.is_set():
            return []
        return [shard for shard in self._uncommitted(self._shards) if shard not in self._claimed_s]

    def _uncommitted(self, shards: Iterable[int]) -> list[int]:
        newest = self._folder.generations()
        return [shard for shard in shards if newest.get(shard, -1) < self._generations.get(shard, 0)]

    def _leased(self, folder: FeatureFolder) -> set[int]:
        names = self._store.list(lease_directory(folder.feature, folder.fingerprint))
        found = {int(name) for name in names if name.isdecimal()}
        return found - self._claimed_s.keys() if folder is self._folder else found

    def _in_my_order(self, shards: list[int], *, alone: bool) -> Iterable[int]:
        # Workers that start together begin at different places; one that is alone goes from the first on.
        first = [shard for shard in shards if shard in self._begin_with]
        others = [shard for shard in shards if shard not in self._begin_with]
        start = 0 if alone or not others else self._random.randrange(len(others))
        return first + others[start:] + others[:start]

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
                self._take_over_stale(*self._examine(folder, leased))
            elif lacking and not self._needs_will_come:
                raise InputError(
                    f"{self._folder.storage.root}: shard {lacking[0]} has no `{folder.feature}` yet, from which "
                    f"`{self._folder.feature}` is made; encode both: --features {folder.feature},{self._folder.feature}"
                )

    def _examine(self, folder: FeatureFolder, leased: set[int]) -> tuple[dict[int, SeenLease | None], float]:
        """Look at some of these leases, chosen by chance so that idle workers do not all ask for all.

        Returns: shard → its lease, None where that is gone by now; and the storage's time.
        """
        chosen = self._random.sample(sorted(leased), min(len(leased), _EXAMINED_AT_ONCE))
        seen = {
            shard: read_lease(self._store, lease_name(folder.feature, folder.fingerprint, shard)) for shard in chosen
        }
        return seen, self._store.now_s() if any(seen.values()) else 0.0

    def _take_over_stale(self, seen: Mapping[int, SeenLease | None], now_s: float) -> bool:
        """Free what is stale; whether anything is free now that was not before."""
        stale = [lease for lease in seen.values() if lease is not None and lease.is_stale(now_s)]
        for lease in stale:
            take_over(self._store, lease)
        return bool(stale) or None in seen.values()

    def _claim_again(self, seen: Mapping[int, SeenLease | None], now_s: float) -> int | None:
        """A shard that a living worker has had for too long, to be made once more; None where there is none."""
        if len(self._taken_s) < _FEWEST_MEASURED:
            return None
        since_s = now_s - SLOW_MEDIANS * statistics.median(self._taken_s)
        slow = [(lease.owner.taken_s, shard) for shard, lease in seen.items() if lease is not None]
        for _, shard in sorted(one for one in slow if 0 < one[0] < since_s):
            if self._leases.take(self._second_lease(shard)):
                if self._uncommitted([shard]):
                    self._claimed_s[shard] = self._leases.clock()
                    return shard
                self._leases.drop(self._second_lease(shard))
                continue
            second = read_lease(self._store, self._second_lease(shard))
            if second is not None and second.is_stale(now_s):
                take_over(self._store, second)
        return None
