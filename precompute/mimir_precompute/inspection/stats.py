"""What the values of a cache look like, and which shards look unlike the others: from the commit records alone.

A shard is a random sample of the data, so shards differ by chance only, and the less the more clips they have. One that
differs by far more was made by another encoder than the rest, whatever its spec says: a broken kernel, another
channel order, a wrong scale.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

import numpy as np

from mimir_shared.feature_folder import FeatureFolder, find_features
from mimir_shared.manifest import TensorStatistics
from mimir_shared.statistics import merge_statistics
from mimir_shared.storage.protocol import Storage

MIN_SHARDS: Final = 8
"""With fewer nobody can say how much shards differ by chance."""
SCORE_LIMIT: Final = 7.0
"""Robust standard deviations, from FULL_SHARDS shards on; of fewer the spread is known less well, and the limit grows
with the square of what is lacking. Of 1,000 clean caches fewer than one in a hundred is blamed (a test counts)."""
FULL_SHARDS: Final = 20
MEAN_FLOOR: Final = 0.05
"""Means closer than this share of the channel's own spread are never told apart."""
STD_FLOOR: Final = 0.03
"""Nor spreads that differ by less than this share."""
_MAD_TO_STD: Final = 1.4826

Measure = Literal["mean", "std"]


@dataclass(frozen=True, kw_only=True)
class ShardDrift:
    """One shard that is unlike the others."""

    feature: str
    fingerprint: str
    shard: int
    tensor: str
    channel: int | None
    """The one that is farthest off; None: all channels together, or a tensor without channels."""
    measure: Measure
    value: float
    others: float
    """Median over all shards."""
    score: float
    """How many robust standard deviations (1.4826 MAD, for as many clips as the shard has) it is off."""
    limit: float


@dataclass(kw_only=True)
class FeatureStatistics:
    """One feature over all of its shards, by the newest generations."""

    fingerprint: str
    shards: int
    clips: int
    tensors: dict[str, TensorStatistics] = field(default_factory=dict)


@dataclass(kw_only=True)
class CacheStatistics:
    features: dict[str, list[FeatureStatistics]] = field(default_factory=dict)
    drifts: list[ShardDrift] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        features = {
            name: [
                {**vars(one), "tensors": {tensor: t.model_dump(mode="json") for tensor, t in one.tensors.items()}}
                for one in many
            ]
            for name, many in self.features.items()
        }
        return {"features": features, "drifts": [asdict(drift) for drift in self.drifts]}


@dataclass(frozen=True)
class ShardStatistics:
    """What the commit record of one shard says of the values in it."""

    shard: int
    clips: int
    tensors: Mapping[str, TensorStatistics]


def read_statistics(storage: Storage) -> CacheStatistics:
    """Merge the statistics of all shards, exactly, and compare each shard with the others.

    Raises: CacheError where a record is damaged.
    """
    found = CacheStatistics()
    for folder in find_features(storage):
        shards = list(_read_shards(folder))
        one = FeatureStatistics(
            fingerprint=folder.fingerprint[:12],
            shards=len(shards),
            clips=sum(shard.clips for shard in shards),
            tensors=merge_statistics(dict(shard.tensors) for shard in shards),
        )
        found.features.setdefault(folder.feature, []).append(one)
        found.drifts += find_drifts(folder.feature, one.fingerprint, shards)
    return found


def _read_shards(folder: FeatureFolder) -> Iterator[ShardStatistics]:
    for shard, generation in sorted(folder.generations().items()):
        metadata, _ = folder.read_record_metadata(shard, generation)
        if metadata.ok:
            yield ShardStatistics(shard, metadata.ok, metadata.statistics)


def find_drifts(feature: str, fingerprint: str, shards: Sequence[ShardStatistics]) -> list[ShardDrift]:
    """At most one finding for each shard, tensor and measure: the channel that is farthest off."""
    drifts = []
    for tensor in sorted({name for shard in shards for name in shard.tensors}):
        present = [shard for shard in shards if tensor in shard.tensors]
        if len(present) < MIN_SHARDS:
            continue
        limit = SCORE_LIMIT * max(1.0, FULL_SHARDS / len(present)) ** 2
        clips = np.array([shard.clips for shard in present])
        means = np.array([shard.tensors[tensor].mean for shard in present])  # (shards, channels)
        stds = np.sqrt([shard.tensors[tensor].variance for shard in present])  # (shards, channels)
        spread = np.median(stds, axis=0)
        moving = spread > 0
        if not moving.any():
            continue
        values: dict[Measure, np.ndarray] = {"mean": means, "std": stds}
        for measure, value in values.items():
            others = np.median(value, axis=0)
            off = np.zeros_like(value)
            off[:, moving] = (value - others)[:, moving] / spread[moving]
            floor = MEAN_FLOOR if measure == "mean" else STD_FLOOR
            for row, channel, score in _outliers(off, clips, floor, limit):
                everything = channel is None or value.shape[1] == 1
                drifts.append(
                    ShardDrift(
                        feature=feature,
                        fingerprint=fingerprint,
                        shard=present[row].shard,
                        tensor=tensor,
                        channel=None if everything else channel,
                        measure=measure,
                        value=float(value[row].mean() if channel is None else value[row, channel]),
                        others=float(others.mean() if channel is None else others[channel]),
                        score=score,
                        limit=limit,
                    )
                )
    return drifts


def _outliers(
    off: np.ndarray, clips: np.ndarray, floor: float, limit: float
) -> Iterator[tuple[int, int | None, float]]:
    """(row, channel, score) of shards that are farther off than chance allows.

    Args:
        off: (shards, channels) deviations from the median, in units of the channel's spread.
        clips: (shards,) how many clips each shard has: chance grows with the root of their scarcity.
    """
    # all channels together beside each one: a wrong scale moves them all a little
    together = off.mean(axis=1, keepdims=True)
    together = together - np.median(together)
    root = np.sqrt(clips)[:, None]
    scores = np.abs(off) * root / _scale(off * root)
    joint = np.abs(together) * root / _scale(together * root)
    for row in range(len(off)):
        channel = int(np.argmax(np.where(np.abs(off[row]) > floor, scores[row], -1.0)))
        if scores[row, channel] > limit and abs(off[row, channel]) > floor:
            yield row, channel, float(scores[row, channel])
        elif joint[row, 0] > limit and abs(together[row, 0]) > floor:
            yield row, None, float(joint[row, 0])


def _scale(deviations: np.ndarray) -> np.ndarray:
    """(channels,) 1.4826 MAD; no channel is believed to be steadier than the tensor's channels are on the whole."""
    own = np.median(np.abs(deviations), axis=0)
    smallest = np.finfo(float).tiny
    return np.asarray(_MAD_TO_STD * np.maximum(np.maximum(own, np.median(np.abs(deviations))), smallest))
