"""How far a cache is: from its plan and its commit records alone, on any machine that sees them."""

from dataclasses import asdict, dataclass, field

from mimir_shared.feature_folder import find_features
from mimir_shared.plan_file import Plan, read_plan
from mimir_shared.snapshot import list_snapshots
from mimir_shared.storage_protocol import Storage


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


@dataclass(kw_only=True)
class CacheStatus:
    """`status --json`, but for what is marked as shown to people only."""

    clips: int
    shards: int
    complete: bool = False
    features: dict[str, list[FeatureStatus]] = field(default_factory=dict)
    snapshots: list[str] = field(default_factory=list)
    """Digests, oldest first; shown to people only."""

    def to_json(self) -> dict[str, object]:
        return {
            "clips": self.clips,
            "shards": self.shards,
            "complete": self.complete,
            "features": {name: [asdict(one) for one in many] for name, many in self.features.items()},
        }


def read_status(storage: Storage) -> CacheStatus:
    """Raises InputError where there is no plan, CacheError where a record is damaged."""
    plan = read_plan(storage)
    status = CacheStatus(clips=count_clips(plan), shards=plan.num_shards)
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
        status.features.setdefault(folder.feature, []).append(one)
    status.complete = bool(status.features) and all(
        any(one.shards_done == status.shards for one in many) for many in status.features.values()
    )
    status.snapshots = [snapshot.digest for snapshot in list_snapshots(storage)]
    return status


def count_clips(plan: Plan) -> int:
    """Clips that the plan holds now: neither removed nor counted twice."""
    if len(plan.files) == 1:
        return int(plan.files[0].table.num_rows)
    return len(plan.newest_rows())
