"""What one of thousands of workers does otherwise, so that together they ask little of a file system.

A worker among n starts after a pause by chance, looks less often while it waits, does not look at what each of the
others says of itself, and leaves it to one of them to judge the whole and write its snapshot.
"""

import random
import time
from collections.abc import Mapping
from typing import Final

from mimir_precompute.pipeline import EncodeJob, EncodeOutcome, conclude, encode_features, open_features
from mimir_precompute.provenance import RunLog
from mimir_precompute.workers.lease import Leases, take_over
from mimir_precompute.workers.progress import Progress
from mimir_precompute.workers.seen_lease import read_lease
from mimir_shared.feature_folder import FeatureFolder, FeatureSpec
from mimir_shared.features import FeatureName
from mimir_shared.snapshot import Snapshot, incomplete_shards, list_snapshots

WATCH_AT_MOST: Final = 32
"""Workers that look at each other: more show themselves alone."""
_STARTS_PER_S: Final = 50
_LOOKS_PER_S: Final = 25
_LONGEST_PAUSE_S: Final = 60.0
_CONCLUSION: Final = "leases/conclusion"


def start_pause_s(workers: int, choose: random.Random) -> float:
    """How long a worker waits before it first asks anything of the cache."""
    return choose.uniform(0, min(_LONGEST_PAUSE_S, workers / _STARTS_PER_S)) if workers > 1 else 0.0


def poll_s(workers: int, own_s: float) -> float:
    """How often, at most, a worker that waits looks whether there is something to do.

    Args:
        own_s: what it is for a few workers, by the kind of storage.
    """
    return min(_LONGEST_PAUSE_S, max(own_s, workers / _LOOKS_PER_S))


def encode_in_crowd(job: EncodeJob, progress: Progress, log: RunLog) -> EncodeOutcome:
    """As encode_cache, but that one worker concludes for all."""
    specs = open_features(job)
    outcome = EncodeOutcome(features=encode_features(job, specs, progress, log))
    conclude_once(job, specs, outcome)
    return outcome


def conclude_once(job: EncodeJob, specs: Mapping[FeatureName, FeatureSpec], outcome: EncodeOutcome) -> None:
    """Conclude, unless another worker has done so or is at it."""
    folders = [FeatureFolder(job.storage, feature, specs[feature].fingerprint) for feature in job.features]
    if incomplete_shards(job.plan, folders):
        conclude(job, specs, outcome)
        return
    outcome.snapshot = _snapshot_of(job, specs)
    if outcome.snapshot is not None:
        return
    with Leases(job.storage.lease_store(), heartbeat_s=job.heartbeat_s) as leases:
        if not _take(leases):
            outcome.others_conclude = True
            return
        outcome.snapshot = _snapshot_of(job, specs)  # another may have come to its end just before
        if outcome.snapshot is None:
            conclude(job, specs, outcome)


def _take(leases: Leases) -> bool:
    if leases.take(_CONCLUSION):
        return True
    seen = read_lease(leases.store, _CONCLUSION)
    if seen is not None and seen.is_stale(leases.store.now_s()):
        take_over(leases.store, seen)
    return leases.take(_CONCLUSION)


def _snapshot_of(job: EncodeJob, specs: Mapping[FeatureName, FeatureSpec]) -> Snapshot | None:
    """The newest snapshot, if it is one of this plan and these features."""
    for snapshot in list_snapshots(job.storage)[-1:]:
        pinned = {feature: one.fingerprint for feature, one in snapshot.features.items()}
        wanted = {feature: specs[feature].fingerprint for feature in job.features}
        if snapshot.plans == tuple(file.seal for file in job.plan.files) and wanted.items() <= pinned.items():
            return snapshot
    return None


def pause_before_start(workers: int) -> None:
    time.sleep(start_pause_s(workers, random.Random()))
