"""Checkpoints of several ranks: each writes its part, and any number of ranks goes on from them. Gloo on the CPU."""

import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from mimir_train.batch import BatchLoader, find_layout
from mimir_train.cache_reader import open_cache
from mimir_train.checkpoint.folder import check_checkpoint, find_checkpoint, list_checkpoints
from mimir_train.checkpoint.opened import open_checkpoint
from mimir_train.config_document import write_document
from mimir_train.loop import train
from mimir_train.objective import keyed_normal, sample_timesteps
from mimir_train.order.clip_order import TrainingOrder
from tests.train.caches import losses_of, metrics_of, resumed_config, tiny_config
from tests.train.checkpoints import tensors_of
from tests.train.ranks import start_ranks, train_on_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

FSDP: Mapping[str, object] = {"parallel__strategy": "fsdp"}
LEGS = ((4, 3, "fsdp"), (2, 6, "ddp"), (1, 8, "fsdp"), (2, 10, "fsdp"))
"""Ranks, the step at which they stop, and how they share the model."""


@pytest.fixture(scope="module")
def alone(small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train(tiny_config(small_cache, run))
    return run


def test_two_sharded_ranks_go_on_bit_for_bit_and_each_writes_its_part(small_cache: Path, tmp_path: Path) -> None:
    settings = {**FSDP, "ema__profiles": ["fixed:0.9"]}
    train_on_ranks(2, [
        tiny_config(small_cache, tmp_path / "whole", **settings),
        tiny_config(small_cache, tmp_path / "parts", run__stop_at_step=5, **settings),
    ])  # fmt: skip
    train_on_ranks(2, [resumed_config(tmp_path / "parts")], "latest")
    whole, rest = (tmp_path / name / "checkpoints/step-00000010" for name in ("whole", "parts"))
    for part in ("model", "optimizer", "ema", "random"):
        expected, found = tensors_of(whole, part), tensors_of(rest, part)
        assert expected.keys() == found.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
        sizes = [(whole / f"{part}/{rank:05d}.safetensors").stat().st_size for rank in (0, 1)]
        assert min(sizes) > 0.8 * max(sizes)
    assert set(tensors_of(whole, "random")) == {"random.rank00000.cpu", "random.rank00001.cpu"}
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")
    # and one process reads it whole, for sampling
    for weights, part in (("raw", "model"), ("fixed:0.9", "ema")):
        dit = open_checkpoint(whole, print, weights=weights).load_transformer()
        assert torch.equal(dit.proj_out.weight, tensors_of(whole, part)[f"{part}.dit.proj_out.weight"])


def test_four_then_two_then_one_then_two_ranks_train_as_one_process_does(
    small_cache: Path, tmp_path: Path, alone: Path
) -> None:
    run = tmp_path / "run"
    for world_size, stop, strategy in LEGS:
        settings = {"parallel__strategy": strategy, "run__stop_at_step": stop}
        goes_on = bool(list_checkpoints(run))
        config = resumed_config(run, **settings) if goes_on else tiny_config(small_cache, run, **settings)
        train_on_ranks(world_size, [config], "latest" if goes_on else None)
    assert losses_of(run) == pytest.approx(losses_of(alone), abs=1e-5)
    expected, found = (tensors_of(folder / "checkpoints/step-00000010", "model") for folder in (alone, run))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3)


def test_the_legs_of_any_number_of_ranks_see_the_same_clips_timesteps_and_noise(small_cache: Path) -> None:
    cache = open_cache(str(small_cache))
    order = TrainingOrder(cache.buckets(), seed=42, global_batch_size=8)
    layout = find_layout(cache, llm=True)

    def drawn(world_size: int, first: int, last: int) -> list[tuple[object, ...]]:
        """Of each step, in the order of the global batch."""
        loaders = [BatchLoader(cache, order, layout, rank=r, world_size=world_size) for r in range(world_size)]
        steps = []
        for batches in zip(*(loader.batches(first, last) for loader in loaders), strict=True):
            keys = [clip.key for batch in batches for clip in batch.clips]
            timesteps = [sample_timesteps(42, b.step, b.positions, 8).tolist() for b in batches]
            noise = [keyed_normal("noise", 42, b.step, b.positions, (3, 4), torch.device("cpu")) for b in batches]
            steps.append((keys, [t for rank in timesteps for t in rank], torch.cat(noise).tolist()))
        return steps

    whole = drawn(1, 0, 10)
    assert len({str(step) for step in whole}) == 10
    legs, start = [], 0
    for world_size, stop, _ in LEGS:
        legs += drawn(world_size, start, stop)
        start = stop
    assert legs == whole


def test_sigterm_to_one_rank_saves_on_all_and_ends_each_with_143(small_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny_config(small_cache, run, run__max_train_steps=100_000, run__checkpointing_steps=50_000, **FSDP)
    (tmp_path / "asked.yaml").write_text(write_document(config))
    ranks = start_ranks(2, "-m", "mimir_train", "run", "--preset", "tiny", "--config", str(tmp_path / "asked.yaml"),
                        "--output-dir", str(run))  # fmt: skip
    deadline = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and len(metrics_of(run)) >= 3):
        assert time.monotonic() < deadline
        assert [rank.poll() for rank in ranks] == [None, None], [rank.communicate() for rank in ranks]
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGTERM)
    told = [rank.communicate(timeout=30) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [143, 143], told
    assert [path.name for path in list_checkpoints(run)] == [f"step-{len(metrics_of(run)):08d}"]
    assert check_checkpoint(find_checkpoint(run)) is None
    assert str(find_checkpoint(run)) in told[0][0]
    assert told[1][0] == ""
