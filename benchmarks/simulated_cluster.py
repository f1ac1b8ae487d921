"""How a cluster of workers shares a cache, simulated: makespan against the ideal, work done twice, storage requests.

python -m benchmarks.simulated_cluster [--workers 64] [--shards 1954] [--dying 0.05] [--slow 1] [--seed 0]

Simulated are the clock, the storage (in memory), the machines and the encoders' time; the leases (Leases, ShardClaims)
and the commit (commit_shard) are the real ones. Workers go through the features in order, as `encode` does. The
requests of one attempt to claim all happen at one moment, and take their time afterwards. Everything follows from the
seed.
"""

import argparse
import heapq
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, cast

from benchmarks.simulated_storage import SimulatedClock, SimulatedStorage

from mimir_precompute.commit import commit_shard
from mimir_precompute.workers.lease import Leases, ShardClaims, Waiting
from mimir_precompute.workers.seen_lease import HEARTBEAT_S, LeaseOwner
from mimir_shared.feature_folder import FeatureFolder
from mimir_shared.features import DEPENDENCIES, FEATURES, FeatureName
from mimir_shared.storage.protocol import Storage

FINGERPRINT: Final = "0" * 64
_BACK_AFTER_S: Final = 300.0
_SLOWNESS: Final = 10.0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What is simulated."""

    workers: int = 64
    shards: int = 1954
    """Units of each feature."""
    unit_s: Mapping[FeatureName, float] = field(
        default_factory=lambda: {"latents": 192.0, "t5": 1.8, "answers": 7.7, "llm": 7.7}
    )
    """Seconds for a shard: of 256 clips at 0.75 s for the VAE, 7 ms for T5, 30 ms for each part of the LLM."""
    spread: float = 0.1
    """Shards of a feature differ by so much, either way."""
    load_s: float = 20.0
    """For a worker to load the model of a feature."""
    dying: float = 0.05
    """Share of the workers that die for good at some moment, holding their leases."""
    preempted: float = 0.0
    """Share that is told to end at some moment and comes back five minutes later, on another machine."""
    slow: int = 1
    """Workers that take ten times as long."""
    request_s: float = 0.02
    """For the storage to answer."""
    poll_s: float = 2.0
    """The longest pause of a worker that waits: 2 for a folder, 10 for a bucket."""
    seed: int = 0

    @property
    def work_s(self) -> float:
        """Of one worker of ordinary speed, for everything."""
        return self.shards * sum(self.unit_s.values())


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a simulation gave."""

    makespan_s: float
    """From the start to the last commit."""
    ideal_s: float
    """No schedule can be shorter: see `ideal_s`."""
    committed: int
    """Units."""
    duplicated: float
    """Share of the whole work that went into copies of units which another worker committed first."""
    lost: float
    """Share that died with workers."""
    results: Mapping[str, int]
    """Of the commits: committed, same, other."""
    requests: Mapping[str, int]
    busiest_second: int
    """Requests of the storage in the second that had most."""

    @property
    def ratio(self) -> float:
        return self.makespan_s / self.ideal_s


@dataclass(kw_only=True)
class Machine:
    """One worker and what will happen to it."""

    number: int
    speed: float
    dies_s: float | None = None
    preempted_s: float | None = None
    lives: int = 0
    """How often it was started; what was meant for an earlier life of it is void."""
    leases: Leases
    shard: tuple[FeatureName, int, float] | None = None
    """What it is at, and since when."""


def ideal_s(cluster: Cluster, machines: list[Machine]) -> float:
    """A lower bound: all machines compute from the first moment on, and to their deaths, at units of any size.

    No schedule is shorter than this, nor than the answers of a shard and then its hidden states on the fastest machine.
    """
    moments = sorted({m.dies_s for m in machines if m.dies_s is not None})
    moments += [m + _BACK_AFTER_S * end for m in _preemptions(machines) for end in (0, 1)]
    left, now = cluster.work_s, 0.0
    for until in [*sorted(moments), float("inf")]:
        speed = sum(m.speed for m in machines if _is_there(m, now))
        if speed * (until - now) >= left:
            now += left / speed
            break
        left -= speed * (until - now)
        now = until
    chain = (cluster.unit_s["answers"] + cluster.unit_s["llm"]) * (1 - cluster.spread)
    return max(now, chain / max(m.speed for m in machines))


def _preemptions(machines: list[Machine]) -> list[float]:
    return [m.preempted_s for m in machines if m.preempted_s is not None]


def _is_there(machine: Machine, moment_s: float) -> bool:
    if machine.dies_s is not None and moment_s >= machine.dies_s:
        return False
    away_s = machine.preempted_s
    return away_s is None or not away_s <= moment_s < away_s + _BACK_AFTER_S


class Simulation:
    """One run of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.random = random.Random(cluster.seed)
        self.clock = SimulatedClock()
        self.storage = SimulatedStorage(self.clock, poll_s=cluster.poll_s)
        storage = cast(Storage, self.storage)  # the rest of it is not asked for
        self.folders = {feature: FeatureFolder(storage, feature, FINGERPRINT) for feature in FEATURES}
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.num_events = 0
        self.results: Counter[str] = Counter()
        self.last_commit_s = 0.0
        self.duplicated_s = self.lost_s = 0.0
        self.machines = self._machines()

    def run(self) -> Outcome:
        """Go on until every unit is committed."""
        cluster = self.cluster
        for machine in self.machines:
            # started by one command, not in the same instant
            self.after(self.random.uniform(0, 5), lambda machine=machine: self.start(machine))  # type: ignore[misc]
        while self.results["committed"] < cluster.shards * len(FEATURES):
            assert self.events, "nothing happens any more, and units are left"
            self.clock.now, _, happens = heapq.heappop(self.events)
            happens()
        for machine in self.machines:
            self._count_rest(machine)
            machine.leases.close()
        return Outcome(
            makespan_s=self.last_commit_s,
            ideal_s=ideal_s(cluster, self.machines),
            committed=self.results["committed"],
            duplicated=self.duplicated_s / cluster.work_s,
            lost=self.lost_s / cluster.work_s,
            results=dict(self.results),
            requests=dict(self.storage.requests),
            busiest_second=max(self.storage.by_second.values()),
        )

    def after(self, delay_s: float, happens: Callable[[], None]) -> None:
        self.num_events += 1  # events of one moment come in the order in which they were made
        heapq.heappush(self.events, (self.clock.now + delay_s, self.num_events, happens))

    def start(self, machine: Machine) -> None:
        """Begin a life of a machine."""
        machine.lives += 1
        life = machine.lives
        if machine.dies_s is not None:
            self.after(machine.dies_s - self.clock.now, lambda: self.die(machine))
        elif machine.preempted_s is not None and life == 1:
            self.after(machine.preempted_s - self.clock.now, lambda: self.preempt(machine))
        self.after(HEARTBEAT_S, lambda: self.beat(machine, life))
        self.begin_feature(machine, 0)

    def die(self, machine: Machine) -> None:
        """Its leases stay, and nobody touches them."""
        self._count_lost(machine)
        machine.lives += 1

    def preempt(self, machine: Machine) -> None:
        """It drops its leases, as a worker that is told to end does, and is started again elsewhere."""
        self._count_lost(machine)
        machine.lives += 1
        machine.leases.close()
        machine.leases = self._leases(machine.number, life=2)
        self.after(_BACK_AFTER_S, lambda: self.start(machine))

    def beat(self, machine: Machine, life: int) -> None:
        if machine.lives == life:
            machine.leases.touch()
            self.after(HEARTBEAT_S, lambda: self.beat(machine, life))

    def begin_feature(self, machine: Machine, index: int) -> None:
        """Load a model and claim shards; nothing where all is committed."""
        while index < len(FEATURES) and len(self.folders[FEATURES[index]].generations()) == self.cluster.shards:
            index += 1
        if index == len(FEATURES):
            return
        feature, life = FEATURES[index], machine.lives
        claims = ShardClaims(
            self.folders[feature],
            range(self.cluster.shards),
            machine.leases,
            needs=[self.folders[needed] for needed in DEPENDENCIES[feature]],
            choose=random.Random(self.random.random()),
        )
        turn = _Turn(machine=machine, life=life, index=index, claims=claims, pauses_s=claims.pauses_s())
        self.after(self.cluster.load_s, lambda: self.attempt(turn))

    def attempt(self, turn: "_Turn") -> None:
        """Claim, as ShardClaims.next does, with waiting left to the clock."""
        if turn.is_over:
            return
        before = self.storage.requests.total()
        found = turn.claims.attempt()
        asked_s = (self.storage.requests.total() - before) * self.cluster.request_s
        if found is None:
            self.begin_feature(turn.machine, turn.index + 1)
        elif isinstance(found, Waiting):
            self.after(asked_s + next(turn.pauses_s), lambda: self.attempt(turn))
        else:
            shard = found
            turn.pauses_s = turn.claims.pauses_s()
            turn.machine.shard = (turn.feature, shard, self.clock.now)
            takes_s = self._unit_s(turn.feature, shard) / turn.machine.speed
            self.after(asked_s + takes_s, lambda: self.commit(turn, shard))

    def commit(self, turn: "_Turn", shard: int) -> None:
        if turn.is_over:
            return
        before = self.storage.requests.total()
        result = commit_shard(
            self.folders[turn.feature],
            self.storage.finished_shard(shard),
            data_format="webdataset",
            shard=shard,
            fingerprint=FINGERPRINT,
            plan_seal=FINGERPRINT,
        )
        self.results[result] += 1
        if result == "committed":
            self.last_commit_s = self.clock.now
        else:
            self.duplicated_s += self._unit_s(turn.feature, shard)
        turn.machine.shard = None
        turn.claims.finished(shard)
        asked_s = (self.storage.requests.total() - before) * self.cluster.request_s
        self.after(asked_s, lambda: self.attempt(turn))

    def _unit_s(self, feature: FeatureName, shard: int) -> float:
        """Of a worker of ordinary speed: the same for every copy of a unit."""
        wide = random.Random(f"{self.cluster.seed} {feature} {shard}").uniform(-1, 1) * self.cluster.spread
        return self.cluster.unit_s[feature] * (1 + wide)

    def _count_lost(self, machine: Machine) -> None:
        self.lost_s += self._done_s(machine)
        machine.shard = None

    def _count_rest(self, machine: Machine) -> None:
        """What was at work when the last unit was committed: a copy of one that is committed."""
        self.duplicated_s += self._done_s(machine)
        machine.shard = None

    def _done_s(self, machine: Machine) -> float:
        return 0.0 if machine.shard is None else (self.clock.now - machine.shard[2]) * machine.speed

    def _machines(self) -> list[Machine]:
        cluster = self.cluster
        about_s = cluster.work_s / cluster.workers
        machines = [
            Machine(number=n, speed=1 / _SLOWNESS if n < cluster.slow else 1.0, leases=self._leases(n, life=1))
            for n in range(cluster.workers)
        ]
        ordinary = machines[cluster.slow :]
        self.random.shuffle(ordinary)
        dying = round(cluster.dying * cluster.workers)
        for machine in ordinary[:dying]:
            machine.dies_s = self.random.uniform(10, about_s)
        for machine in ordinary[dying : dying + round(cluster.preempted * cluster.workers)]:
            machine.preempted_s = self.random.uniform(10, about_s)
        return machines

    def _leases(self, number: int, *, life: int) -> Leases:
        owner = LeaseOwner(host=f"node{number}", domain=f"boot {number}", pid=1, token=f"{number}/{life}")
        return Leases(self.storage.lease_store(), owner=owner, beats=False, clock=self.clock)


@dataclass(kw_only=True)
class _Turn:
    """A machine's work on one feature, in one of its lives."""

    machine: Machine
    life: int
    index: int
    claims: ShardClaims
    pauses_s: Iterator[float]

    @property
    def feature(self) -> FeatureName:
        return FEATURES[self.index]

    @property
    def is_over(self) -> bool:
        return self.machine.lives != self.life


COLUMNS: Final = (
    "workers", "units", "die", "pre-empted", "ten times slower", "makespan, s", "ideal, s", "ratio", "made twice",
    "lost", "requests a unit", "in the busiest second",
)  # fmt: skip


def row(cluster: Cluster, outcome: Outcome) -> str:
    """A row of the table in BENCHMARKS.md."""
    cells = (
        str(cluster.workers),
        str(cluster.shards * len(FEATURES)),
        f"{cluster.dying:.0%}",
        f"{cluster.preempted:.0%}",
        str(cluster.slow),
        f"{outcome.makespan_s:.0f}",
        f"{outcome.ideal_s:.0f}",
        f"{outcome.ratio:.3f}",
        f"{outcome.duplicated:.2%}",
        f"{outcome.lost:.2%}",
        f"{sum(outcome.requests.values()) / outcome.committed:.1f}",
        str(outcome.busiest_second),
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plain = Cluster()
    for name in ("workers", "shards", "dying", "preempted", "slow", "poll_s", "load_s", "seed"):
        default = getattr(plain, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    cluster = Cluster(**vars(parser.parse_args()))
    outcome = Simulation(cluster).run()
    requests = ", ".join(f"{kind} {count}" for kind, count in sorted(outcome.requests.items()))
    sys.stdout.write(
        f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n{row(cluster, outcome)}\n"
        f"requests: {requests}; commits: {dict(outcome.results)}\n"
    )


if __name__ == "__main__":
    main()
