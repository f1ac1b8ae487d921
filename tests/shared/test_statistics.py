"""Statistics that are added up sample by sample equal those of all values at once."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mimir_shared.features import FeatureTensor
from mimir_shared.manifest import TensorStatistics
from mimir_shared.statistics import StatisticsBuilder, merge_statistics


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 2**32 - 1), st.floats(-1e4, 1e4))
def test_merged_statistics_equal_those_of_all_values_together(lengths: list[int], seed: int, centre: float) -> None:
    generator = np.random.default_rng(seed)
    samples = [(generator.standard_normal((3, n)) + centre).astype(np.float32) for n in lengths]
    builder = StatisticsBuilder(channel_dim=0)
    for sample in samples:
        builder.add(FeatureTensor(sample, "f32"))
    shards = []
    for part in (samples[: len(samples) // 2], samples[len(samples) // 2 :]):
        shard = StatisticsBuilder(channel_dim=0)
        for sample in part:
            shard.add(FeatureTensor(sample, "f32"))
        result = shard.result()
        shards.append({"x": result} if result else {})
    everything = np.concatenate(samples, axis=1).astype(np.float64)
    for got in (builder.result(), merge_statistics(shards)["x"]):
        assert isinstance(got, TensorStatistics)
        assert got.count == everything.shape[1]
        np.testing.assert_allclose(got.mean, everything.mean(axis=1), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(got.variance, everything.var(axis=1), rtol=1e-7, atol=1e-7)
        assert got.min == tuple(everything.min(axis=1))
        assert got.max == tuple(everything.max(axis=1))


def test_pad_rows_are_not_counted_and_a_tensor_without_channels_has_one_entry() -> None:
    builder = StatisticsBuilder(channel_dim=None)
    builder.add(FeatureTensor(np.array([[1, 3], [100, 100]], np.float32), "f32"), valid_rows=1)
    result = builder.result()
    assert result is not None
    assert (result.count, result.mean, result.max) == (2, (2.0,), (3.0,))


def test_no_values_give_no_statistics() -> None:
    builder = StatisticsBuilder(channel_dim=None)
    builder.add(FeatureTensor(np.zeros((0, 4), np.float32), "f32"))
    assert builder.result() is None
