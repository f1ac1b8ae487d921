"""Mean, variance, minimum and maximum of cached tensors, per channel, mergeable over samples and shards."""

from collections.abc import Iterable

import numpy as np

from mimir_shared.features import FeatureTensor
from mimir_shared.manifest import TensorStatistics


class StatisticsBuilder:
    """Adds up one tensor over the samples of a shard, in float64 and in a fixed order.

    Merging by Chan et al. (1979): no large sums are subtracted, so the variance keeps its digits.
    """

    def __init__(self, channel_dim: int | None) -> None:
        self._channel_dim = channel_dim
        self._total: TensorStatistics | None = None

    def add(self, tensor: FeatureTensor, valid_rows: int | None = None) -> None:
        """Add one sample; of a tensor with pad rows at its end only the leading `valid_rows`."""
        values = tensor.to_float32()
        if valid_rows is not None:
            values = values[:valid_rows]
        if self._channel_dim is None:
            values = values.reshape(1, -1)
        else:
            values = np.moveaxis(values, self._channel_dim, 0)
            values = values.reshape(values.shape[0], -1)
        if values.shape[1] == 0:
            return
        wide = values.astype(np.float64)
        sample = TensorStatistics(
            count=values.shape[1],
            mean=tuple(wide.mean(axis=1).tolist()),
            variance=tuple(wide.var(axis=1).tolist()),
            min=tuple(wide.min(axis=1).tolist()),
            max=tuple(wide.max(axis=1).tolist()),
        )
        self._total = sample if self._total is None else _merge(self._total, sample)

    def result(self) -> TensorStatistics | None:
        """None where no value was added."""
        return self._total


def _merge(first: TensorStatistics, second: TensorStatistics) -> TensorStatistics:
    count = first.count + second.count
    share = second.count / count
    first_mean, second_mean = np.array(first.mean), np.array(second.mean)
    delta = second_mean - first_mean
    variance = (
        np.array(first.variance) * (1 - share) + np.array(second.variance) * share + delta**2 * share * (1 - share)
    )
    return TensorStatistics(
        count=count,
        mean=tuple((first_mean + delta * share).tolist()),
        variance=tuple(variance.tolist()),
        min=tuple(np.minimum(first.min, second.min).tolist()),
        max=tuple(np.maximum(first.max, second.max).tolist()),
    )


def merge_statistics(parts: Iterable[dict[str, TensorStatistics]]) -> dict[str, TensorStatistics]:
    """Merge the statistics of many shards, in the order given."""
    merged: dict[str, TensorStatistics] = {}
    for part in parts:
        for name, statistics in part.items():
            merged[name] = _merge(merged[name], statistics) if name in merged else statistics
    return merged
