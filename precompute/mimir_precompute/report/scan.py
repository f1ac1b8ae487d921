"""One pass over the plan and the commit records of a cache: what became of every clip, without reading its tensors."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from mimir_shared.errors import CacheError
from mimir_shared.feature_folder import FeatureFolder, find_features
from mimir_shared.features import FEATURES, FeatureName
from mimir_shared.manifest import CommitRecord, SampleRecord, TensorStatistics
from mimir_shared.plan_file import Plan, PlannedClip
from mimir_shared.storage.protocol import Storage

T = TypeVar("T")


@dataclass(kw_only=True)
class FeatureCounts:
    """Clips of the newest plan in the committed shards of one feature."""

    ok: int = 0
    quarantined: int = 0


@dataclass(kw_only=True)
class CacheScan:
    """What the records say, about clips that no later plan changed or removed."""

    features: dict[FeatureName, FeatureFolder]
    """The folder of each feature that charts and gallery are about."""
    counts: dict[FeatureName, FeatureCounts] = field(default_factory=dict)
    usable: list[PlannedClip] = field(default_factory=list)
    """ok in every feature of the cache, in shard order: what training would see."""
    with_latents: list[PlannedClip] = field(default_factory=list)
    planned: list[PlannedClip] = field(default_factory=list)
    """Every clip of the plan, in shard order."""
    buckets: Counter[str] = field(default_factory=Counter)
    statistics: dict[FeatureName, dict[int, dict[str, TensorStatistics]]] = field(default_factory=dict)
    """Of each committed shard."""


def choose_features(storage: Storage, wanted: Mapping[str, str]) -> dict[FeatureName, FeatureFolder]:
    """One folder for each feature: the one asked for, else the one with most shards done.

    Args:
        wanted: feature → beginning of the fingerprint.
    """
    chosen: dict[FeatureName, FeatureFolder] = {}
    folders = find_features(storage)
    for feature in FEATURES:
        fitting = [f for f in folders if f.feature == feature and f.fingerprint.startswith(wanted.get(feature, ""))]
        if fitting:
            chosen[feature] = max(fitting, key=lambda folder: len(folder.generations()))
    return chosen


def scan_cache(plan: Plan, folders: Mapping[FeatureName, FeatureFolder]) -> CacheScan:
    """Read the newest commit record of every shard. Raises CacheError where one is damaged."""
    scan = CacheScan(
        features=dict(folders),
        counts={feature: FeatureCounts() for feature in folders},
        statistics={feature: {} for feature in folders},
    )
    generations = {feature: folder.generations() for feature, folder in folders.items()}
    for shard in range(plan.num_shards):
        records = {
            feature: folder.read_record(shard, generations[feature][shard])
            for feature, folder in folders.items()
            if shard in generations[feature]
        }
        for feature, record in records.items():
            scan.statistics[feature][shard] = record.metadata.statistics
        for clip in plan.shard_clips(shard):
            if not plan.is_superseded(clip):
                _count_clip(scan, clip, {feature: _row_of(record, clip) for feature, record in records.items()})
    return scan


def _row_of(record: CommitRecord, clip: PlannedClip) -> SampleRecord:
    if clip.row >= len(record.samples) or record.samples[clip.row].key != clip.key:
        raise CacheError(
            f"{record.metadata.feature}: the commit record of shard {clip.shard} does not have the plan's clip "
            f"{clip.key!r} in row {clip.row}; run `mimir-precompute verify`"
        )
    return record.samples[clip.row]


def _count_clip(scan: CacheScan, clip: PlannedClip, samples: Mapping[FeatureName, SampleRecord]) -> None:
    scan.planned.append(clip)
    for feature, sample in samples.items():
        if sample.status == "ok":
            scan.counts[feature].ok += 1
        else:
            scan.counts[feature].quarantined += 1
    latents = samples.get("latents")
    if latents is not None and latents.status == "ok":
        assert latents.bucket is not None, f"{clip.key!r} has latents of no bucket"
        scan.with_latents.append(clip)
        scan.buckets[latents.bucket] += 1
    if scan.features and len(samples) == len(scan.features) and all(s.status == "ok" for s in samples.values()):
        scan.usable.append(clip)


def spread_evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items, the same each time: the middles of as many equal parts."""
    count = min(count, len(items))
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]
