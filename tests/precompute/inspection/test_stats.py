"""`stats` adds up what the records say, and blames a shard only for what chance does not do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimir_precompute.encoders.base import Encoded
from mimir_precompute.inspection.stats import MIN_SHARDS, ShardDrift, ShardStatistics, find_drifts, read_statistics
from mimir_shared.feature_folder import find_features
from mimir_shared.features import FeatureName, FeatureTensor, float32_to_bf16_bits
from mimir_shared.statistics import StatisticsBuilder
from mimir_shared.storage.folder import LocalStorage
from tests.fake_encoders import FakeEncoders
from tests.precompute.cli.test_cli import call
from tests.precompute.test_pipeline import encode

CHANNELS = 8


def clips_of(random: np.random.Generator, count: int) -> np.ndarray:
    """(count, C, 12) latents of clips that differ in brightness and contrast, channel by channel and on the whole."""
    mean = 0.5 * random.standard_normal((count, CHANNELS, 1)) + np.arange(CHANNELS)[:, None] / 4
    contrast = np.exp(0.15 * random.standard_normal((count, CHANNELS, 1)) + 0.1 * random.standard_normal((count, 1, 1)))
    own = contrast * (1 + np.arange(CHANNELS)[:, None] / 8) * random.standard_normal((count, CHANNELS, 12))
    return np.asarray(mean + own, dtype=np.float32)


def shard_of(number: int, clips: np.ndarray) -> ShardStatistics:
    builder = StatisticsBuilder(channel_dim=0)
    # all clips of a shard in one tensor: the same sums as one by one
    builder.add(FeatureTensor(np.ascontiguousarray(np.moveaxis(clips, 0, 1)), "f32"))
    statistics = builder.result()
    assert statistics is not None
    return ShardStatistics(number, len(clips), {"vae_moments": statistics})


def cache_of(seed: int, num_shards: int, per_shard: int, last: int | None = None) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    sizes = [per_shard] * (num_shards - 1) + [last or per_shard]
    return [clips_of(random, size) for size in sizes]


def drifts_of(clips: list[np.ndarray]) -> list[ShardDrift]:
    return find_drifts("latents", "f" * 12, [shard_of(number, one) for number, one in enumerate(clips)])


@pytest.mark.parametrize("num_shards", [8, 12, 20, 60])
@pytest.mark.parametrize(("per_shard", "last"), [(5, 1), (32, 3), (128, 128)])
def test_clean_caches_are_not_blamed(num_shards: int, per_shard: int, last: int) -> None:
    blamed = [seed for seed in range(84) if drifts_of(cache_of(seed, num_shards, per_shard, last))]
    assert len(blamed) <= 1, blamed  # of twelve times 84 caches; at most one in a hundred is promised


@pytest.mark.parametrize("seed", range(5))
def test_a_shard_of_a_wrong_scale_is_flagged_and_no_other(seed: int) -> None:
    clips = cache_of(seed, 40, 256)
    clips[17] = clips[17] * 1.1
    drifts = drifts_of(clips)
    assert {drift.shard for drift in drifts} == {17}
    assert "std" in {drift.measure for drift in drifts}
    assert all(drift.score > drift.limit for drift in drifts)


@pytest.mark.parametrize("seed", range(5))
def test_a_shard_of_another_channel_order_is_flagged_with_a_channel(seed: int) -> None:
    clips = cache_of(seed, 20, 64)
    clips[3] = clips[3][:, ::-1]
    drifts = drifts_of(clips)
    assert {drift.shard for drift in drifts} == {3}
    assert {drift.channel for drift in drifts if drift.measure == "mean"} <= {0, 1, CHANNELS - 2, CHANNELS - 1}


def test_a_shifted_and_a_dead_channel_are_named() -> None:
    clips = cache_of(0, 24, 64)
    clips[5][:, 2] += 1.5
    clips[9][:, 6] = 0.25
    named = {(drift.shard, drift.measure): drift.channel for drift in drifts_of(clips)}
    assert named[5, "mean"] == 2
    assert named[9, "std"] == 6


def test_too_few_shards_are_not_judged_and_a_constant_tensor_is_no_drift() -> None:
    clips = cache_of(0, MIN_SHARDS - 1, 64)
    clips[0] *= 5
    assert drifts_of(clips) == []
    assert drifts_of([np.full((8, CHANNELS, 12), -6.0, np.float32)] * 20) == []


def test_statistics_of_the_cache_are_those_of_all_its_clips(toy_clips: Path, tmp_path: Path) -> None:
    encode(toy_clips, tmp_path)
    found = read_statistics(LocalStorage(tmp_path))
    assert set(found.features) == {"latents", "t5", "answers", "llm"}
    for folder in find_features(LocalStorage(tmp_path)):
        (one,) = found.features[folder.feature]
        assert (one.shards, one.clips) == (3, 12)
        if folder.feature == "latents":
            values = []
            for shard in range(3):
                record = folder.read_record(shard, 0)
                for sample in record.samples:
                    tensor = folder.read_sample(record, sample)[1]["vae_moments"]
                    values.append(tensor.to_float32().reshape(8, -1).astype(np.float64))
            everything = np.concatenate(values, axis=1)
            statistics = one.tensors["vae_moments"]
            assert statistics.count == everything.shape[1]
            np.testing.assert_allclose(statistics.mean, everything.mean(axis=1), rtol=1e-12)
            np.testing.assert_allclose(statistics.variance, everything.var(axis=1), rtol=1e-9, atol=1e-15)
            assert statistics.min == tuple(everything.min(axis=1))
            assert statistics.max == tuple(everything.max(axis=1))


class ScaledT5(FakeEncoders):
    """An encoder with the right spec whose embeddings are a tenth too large."""

    def build(self, feature: FeatureName) -> Any:
        encoder = super().build(feature)
        encode_well = encoder.encode

        def encode_badly(batch: Any) -> list[Encoded]:
            made = []
            for one in encode_well(batch):
                embeds = one.tensors["t5_embeds"].to_float32() * 1.1
                tensors = {**one.tensors, "t5_embeds": FeatureTensor(float32_to_bf16_bits(embeds), "bf16")}
                made.append(Encoded(tensors=tensors, document=one.document, valid_rows=one.valid_rows))
            return made

        encoder.encode = encode_badly  # type: ignore[method-assign]
        return encoder


def test_the_command_names_the_shard_that_a_broken_encoder_made(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    rows = [{"file_name": f"{n}.mp4", "text": f"clip {n} shows some seven words here ."} for n in range(960)]
    (clips / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (clips / "0.mp4").write_bytes(b"t5 reads no video")
    cache = tmp_path / "cache"
    encode(clips, cache, ScaledT5(batch=48), shard_size=48, features=("t5",), shards=(6,))
    encode(None, cache, FakeEncoders(batch=48), features=("t5",))
    capfd.readouterr()
    code, out, _ = call(capfd, "stats", cache)
    assert code == 0
    assert "t5_embeds" in out
    assert "shard 6 of t5 is unlike the others: the std of 't5_embeds' is 1.09" in out
    found = json.loads(call(capfd, "stats", cache, "--json")[1])
    assert {drift["shard"] for drift in found["drifts"]} == {6}
    assert found["features"]["t5"][0]["clips"] == 960
