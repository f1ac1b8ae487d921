"""However the ranks share the model, they train what one process trains. Gloo on the CPU."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mimir_train.config import TrainConfig
from mimir_train.loop import train
from mimir_train.parallel.sharding import state_bytes
from tests.train.caches import metrics_of, tiny_config
from tests.train.checkpoints import tensors_of
from tests.train.ranks import train_on_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: Mapping[str, object] = {
    "run__max_train_steps": 20,
    "run__validation_steps": 10,
    "run__validation_clips": 5,
    "run__validation_samples": 1,
    "run__fuser_figures_steps": 10,
    "data__validation_shards": 1,
    "data__micro_batch_size": 1,
}

VARIANTS: Mapping[int, Mapping[str, Mapping[str, object]]] = {
    1: {"fsdp": {"parallel__strategy": "fsdp"}},
    2: {
        "ddp": {"parallel__strategy": "ddp"},
        "fsdp": {"parallel__strategy": "fsdp", "parallel__activation_checkpointing": "selective"},
        "hsdp-2x1": {
            "parallel__strategy": "hsdp",
            "parallel__shard_size": 1,
            "parallel__activation_checkpointing": "full",
        },
    },
    4: {
        "ddp": {"parallel__strategy": "ddp"},
        "fsdp": {"parallel__strategy": "fsdp"},
        "hsdp-2x2": {"parallel__strategy": "hsdp", "parallel__shard_size": 2},
    },
}


@pytest.fixture(scope="module")
def runs(small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run by one process, and one for each way of sharing: name → folder."""
    folder = tmp_path_factory.mktemp("runs")

    def config(name: str, settings: Mapping[str, object]) -> TrainConfig:
        return tiny_config(small_cache, folder / name, **{**SETTINGS, **settings})

    train(config("alone", {}))
    found = {"alone": folder / "alone"}
    for world_size, variants in VARIANTS.items():
        names = {f"{name} on {world_size}": settings for name, settings in variants.items()}
        train_on_ranks(world_size, [config(name, settings) for name, settings in names.items()])
        found |= {name: folder / name for name in names}
    return found


@pytest.mark.parametrize("name", [f"{name} on {size}" for size, variants in VARIANTS.items() for name in variants])
def test_every_strategy_gives_the_losses_and_weights_of_one_process(runs: dict[str, Path], name: str) -> None:
    alone, shared = metrics_of(runs["alone"]), metrics_of(runs[name])
    assert [line["step"] for line in shared] == list(range(20))
    for line, other in zip(alone, shared, strict=True):
        figures = {key for key in line if key.startswith(("loss", "validation/", "fuser/"))} - {"fuser/t5_share"}
        assert figures <= other.keys()
        for figure in ("loss", "validation/loss"):
            assert other.get(figure) == pytest.approx(line.get(figure), abs=1e-5), f"{figure} of step {line['step']}"
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-3)
    found, expected = (tensors_of(runs[run] / "checkpoints/step-00000020", "model") for run in (name, "alone"))
    assert found.keys() == expected.keys()
    for weight, tensor in expected.items():
        # the sum over ranks is another order of addition; AdamW divides small gradients by their own size
        torch.testing.assert_close(found[weight], tensor, rtol=1e-3, atol=1e-3)


def test_validation_samples_of_a_sharded_model_are_those_of_a_whole_one(runs: dict[str, Path]) -> None:
    def sampled(name: str) -> torch.Tensor:
        return load_file(runs[name] / "validation/step-00000020/latents.safetensors")["0"]

    alone = sampled("alone")
    for name in ("fsdp on 1", "fsdp on 2", "hsdp-2x2 on 4"):
        torch.testing.assert_close(sampled(name), alone, rtol=1e-3, atol=1e-3)


def test_states_of_frozen_parameters_are_themselves_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, 10, bias=False))
    assert state_bytes(model, 0) == 2 * 100 * 16  # parameter, gradient, two moments
    model[0].requires_grad_(False)
    assert state_bytes(model, 0) == 100 * 16 + 100 * 4
    assert state_bytes(model, 2) == 100 * (16 + 2 * 4) + 100 * 4


def test_bfloat16_computes_the_same_whole_and_sharded(small_cache: Path, tmp_path: Path) -> None:
    def losses(name: str) -> list[float]:
        config = tiny_config(small_cache, tmp_path / name, run__precision="bfloat16", parallel__strategy=name)
        train(config)
        return [line["loss"] for line in metrics_of(tmp_path / name)]

    whole, sharded = losses("ddp"), losses("fsdp")  # one process: ddp is the plain model
    # until scales of norms have moved from 1, which is one in any dtype, even the rounding is the same
    assert sharded[:2] == whole[:2]
    assert sharded == pytest.approx(whole, abs=2e-3)
