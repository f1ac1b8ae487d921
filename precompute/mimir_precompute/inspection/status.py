"""How far a cache is: from its plan and its commit records, on any machine that sees them.

What is done is said by the records alone. Who works, how fast and how long still is what the workers say of
themselves (workers/seen.py).
"""

from dataclasses import asdict, dataclass, field

from mimir_precompute.workers.pace import rate_together, time_left_s
from mimir_precompute.workers.seen import SeenWorker, read_workers
from mimir_shared.feature_folder import find_features
from mimir_shared.plan_file import read_plan
from mimir_shared.snapshot import list_snapshots
from mimir_shared.storage.protocol import Storage


@dataclass(kw_only=True)
class FeatureStatus:
    fingerprint: str
    format: str
    shards_done: int = 0
    ok: int = 0
    quarantined: int = 0
    bytes: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """"stage: reason" → quarantined clips."""
    clips_per_s: float | None = None
    """Of all workers together, lately; None where nobody works on it."""
    eta_s: float | None = None
    """Seconds until it is done at that rate; None where nobody works on it."""


@dataclass(kw_only=True)
class CacheStatus:
    """`status --json`."""

    clips: int
    shards: int
    complete: bool = False
    superseded: int = 0
    """Rows of the shards that later plans replaced or removed; what is counted by shard counts them too."""
    features: dict[str, list[FeatureStatus]] = field(default_factory=dict)
    workers: list[SeenWorker] = field(default_factory=list)
    snapshots: list[str] = field(default_factory=list)
    """Digests, oldest first."""

    def to_json(self) -> dict[str, object]:
        return {
            "clips": self.clips,
            "shards": self.shards,
            "superseded": self.superseded,
            "complete": self.complete,
            "snapshots": self.snapshots,
            "features": {name: [asdict(one) for one in many] for name, many in self.features.items()},
            "workers": [
                {**worker.report.model_dump(exclude={"domain"}), "state": worker.state, "silent_s": worker.silent_s}
                for worker in self.workers
            ],
            "clips_per_s": self.clips_per_s,
            "eta_s": self.eta_s,
        }

    @property
    def clips_per_s(self) -> float | None:
        """Of all that is being made, together."""
        return rate_together(one.clips_per_s for many in self.features.values() for one in many)

    @property
    def eta_s(self) -> float | None:
        """Until the last feature that somebody works on is done; None where nobody works."""
        left_s = [one.eta_s for many in self.features.values() for one in many if one.clips_per_s is not None]
        return max((seconds for seconds in left_s if seconds is not None), default=None)


def read_status(storage: Storage) -> CacheStatus:
    """Raises InputError where there is no plan, CacheError where a record is damaged."""
    plan = read_plan(storage)
    planned = sum(file.num_planned for file in plan.files)
    status = CacheStatus(clips=plan.num_current, shards=plan.num_shards, superseded=planned - plan.num_current)
    status.workers = read_workers(storage)
    for folder in find_features(storage):
        spec = folder.read_spec()
        one = FeatureStatus(fingerprint=spec.fingerprint[:12], format=spec.format)
        generations = dict(sorted(folder.generations().items()))
        losing: dict[int, int] = {}
        for metadata, _ in folder.read_all_metadata(generations):
            one.shards_done += 1
            one.ok += metadata.ok
            one.quarantined += metadata.quarantined
            one.bytes += sum(file.bytes for file in metadata.files)
            if metadata.quarantined:
                losing[metadata.shard] = metadata.generation
        for record in folder.read_records(losing):
            for sample in record.samples:
                if sample.status == "quarantined":
                    why = f"{sample.stage}: {sample.reason}"
                    one.reasons[why] = one.reasons.get(why, 0) + 1
        add_pace(one, folder.feature, planned, status.workers)
        status.features.setdefault(folder.feature, []).append(one)
    status.complete = bool(status.features) and all(
        any(one.shards_done == status.shards for one in many) for many in status.features.values()
    )
    status.snapshots = [snapshot.digest for snapshot in list_snapshots(storage)]
    return status


def add_pace(status: FeatureStatus, feature: str, planned: int, workers: list[SeenWorker]) -> None:
    """Say how fast a feature is being made, and how long that will take still.

    Args:
        planned: rows that every feature is to have.
    """
    at_it = [
        worker.report
        for worker in workers
        if worker.state == "working"
        and (worker.report.feature, worker.report.fingerprint) == (feature, status.fingerprint)
    ]
    status.clips_per_s = rate_together(report.clips_per_s for report in at_it)
    left = planned - status.ok - status.quarantined - sum(report.clips_in_shard for report in at_it)
    status.eta_s = time_left_s(left, status.clips_per_s) if at_it else None
