"""How the values of the features are distributed, over the whole cache and from shard to shard."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mimir_precompute.inspection.stats import ShardDrift, read_statistics
from mimir_precompute.report.scan import CacheScan
from mimir_shared.features import FEATURES
from mimir_shared.manifest import TensorStatistics
from mimir_shared.page.charts import LineChart, Series, Spread, SpreadChart, line_chart, spread_chart
from mimir_shared.statistics import merge_statistics
from mimir_shared.storage.protocol import Storage


@dataclass(frozen=True, kw_only=True)
class ChannelFigure:
    title: str
    chart: SpreadChart
    channels: tuple[Spread, ...]


@dataclass(frozen=True, kw_only=True)
class ValueRow:
    """All values of one tensor together."""

    feature: str
    tensor: str
    count: int
    spread: Spread


@dataclass(frozen=True, kw_only=True)
class DriftFigure:
    chart: LineChart
    says: str


def channel_figures(scan: CacheScan) -> list[ChannelFigure]:
    """Each channel of the latents; moments are two sets of channels, the mean and the log-variance."""
    merged = merge_statistics(scan.statistics.get("latents", {}).values())
    figures = []
    for name, statistics in sorted(merged.items()):
        channels = _spreads(statistics)
        parts = {"Latents, channel by channel": channels}
        if name == "vae_moments":
            half = len(channels) // 2
            parts = {"Mean of the posterior": channels[:half], "Log-variance of the posterior": channels[half:]}
        for title, part in parts.items():
            chart = spread_chart(part, name="channel", x_label="channel")
            figures.append(ChannelFigure(title=title, chart=chart, channels=part))
    return figures


def value_rows(scan: CacheScan) -> list[ValueRow]:
    """One row for every tensor that has statistics."""
    rows = []
    for feature in FEATURES:
        for name, one in sorted(merge_statistics(scan.statistics.get(feature, {}).values()).items()):
            mean, variance = np.array(one.mean), np.array(one.variance)
            # the spread of all values is that within the channels and that between them
            spread = Spread(
                mean=float(mean.mean()),
                std=float(np.sqrt(variance.mean() + mean.var())),
                min=min(one.min),
                max=max(one.max),
            )
            rows.append(ValueRow(feature=feature, tensor=name, count=one.count * len(mean), spread=spread))
    return rows


def drift_figure(scan: CacheScan) -> DriftFigure | None:
    """How far each shard's latents lie from those of the cache; None for fewer than two shards."""
    shards = scan.statistics.get("latents", {})
    names = sorted({name for one in shards.values() for name in one})
    if not names:
        return None
    parts = {shard: one[names[0]] for shard, one in sorted(shards.items()) if names[0] in one}
    if len(parts) < 2:
        return None
    distances = _distances(parts, merge_statistics(shards.values())[names[0]])
    farthest = max(distances, key=lambda place: place[1])
    chart = line_chart(
        [Series(label="channel that is farthest off", points=distances, colour=0)],
        description=f"Distance of {len(parts)} shards from the whole cache, at most {farthest[1]:.2f}.",
        x_label="shard",
    )
    says = (
        "Mean of a shard less that of the cache, in standard deviations of the cache, in the channel where that is "
        f"most; the farthest is shard {farthest[0]:.0f} with {farthest[1]:.2f}. Shards are random samples, so they lie "
        "the closer together the more clips they have."
    )
    return DriftFigure(chart=chart, says=says)


def shards_unlike_others(storage: Storage, scan: CacheScan) -> list[ShardDrift]:
    """What `stats` blames, of the features that the page is about."""
    shown = {(feature, folder.fingerprint[:12]) for feature, folder in scan.features.items()}
    return [drift for drift in read_statistics(storage).drifts if (drift.feature, drift.fingerprint) in shown]


def _distances(parts: Mapping[int, TensorStatistics], whole: TensorStatistics) -> list[tuple[float, float]]:
    mean, std = np.array(whole.mean), np.sqrt(np.array(whole.variance))
    return [
        (float(shard), float((np.abs(np.array(part.mean) - mean) / np.maximum(std, 1e-12)).max()))
        for shard, part in parts.items()
    ]


def _spreads(statistics: TensorStatistics) -> tuple[Spread, ...]:
    columns: Sequence[Sequence[float]] = (statistics.mean, statistics.variance, statistics.min, statistics.max)
    return tuple(
        Spread(mean=mean, std=float(np.sqrt(variance)), min=lowest, max=highest)
        for mean, variance, lowest, highest in zip(*columns, strict=True)
    )
