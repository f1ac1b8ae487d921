"""Training of adapters: from the base's own output, the base untouched and outside of checkpoints, on any ranks."""

import shutil
from pathlib import Path

import pytest
import torch

from mimir_shared.errors import CacheError, InputError
from mimir_train.checkpoint.adapter_base import lora_config
from mimir_train.checkpoint.folder import read_checkpoint_info
from mimir_train.checkpoint.opened import open_checkpoint
from mimir_train.cli.commands import RunRequest, build_config
from mimir_train.config import TrainConfig
from mimir_train.loop import train
from mimir_train.model.dit import DiT
from mimir_train.weights.lora import add_adapters
from mimir_train.weights.transformer_folder import load_transformer
from tests.train.caches import losses_of, metrics_of, resumed_config, tiny_config
from tests.train.checkpoints import tensors_of
from tests.train.hand_made_checkpoint import flip_last_bit
from tests.train.initial_transformer import CONFIG, write_transformer
from tests.train.ranks import train_on_ranks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer without a zero, in a folder of a pipeline. Not to be written to."""
    folder = tmp_path_factory.mktemp("base")
    write_transformer(folder / "transformer")
    return folder


def lora_run(cache: Path, base: Path, run: Path, **settings: object) -> TrainConfig:
    return tiny_config(
        cache, run, model__init_from=str(base), model__fit_to_cache=False,
        **{"model__lora__rank": 2, "model__lora__alpha": 4.0, "data__validation_shards": 1, **settings},
    )  # fmt: skip


@pytest.fixture(scope="module")
def adapted(small_cache: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps of adapters, with an average. Not to be written to."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("adapted") / "run"
    train(lora_run(small_cache, base, run, ema__profiles=["power:0.2"], run__validation_steps=5))
    return run


LAST = "checkpoints/step-00000010"


def test_the_first_step_has_the_base_s_own_loss_and_the_following_learn(
    small_cache: Path, base: Path, tmp_path: Path, adapted: Path
) -> None:
    train(lora_run(small_cache, base, tmp_path / "full", model__lora=None, run__max_train_steps=1))
    assert losses_of(adapted)[0] == losses_of(tmp_path / "full")[0]
    train(lora_run(
        small_cache, base, tmp_path / "long", model__fuser="baseline", run__max_train_steps=60,
        optimizer__learning_rate=1e-2,
    ))  # fmt: skip
    losses = losses_of(tmp_path / "long")
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])  # adapters alone: the baseline fuser has nothing to train


def test_only_adapters_and_fuser_are_in_the_checkpoint_and_its_state_and_the_base_is_untouched(
    base: Path, adapted: Path
) -> None:
    wrapped = DiT(CONFIG)
    info = read_checkpoint_info(adapted / LAST)
    assert info.lora is not None
    add_adapters(wrapped, lora_config(info.lora))
    adapters = {f"dit.{name}" for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert len(adapters) == 2 * 4 * 2
    for part in ("model", "ema", "optimizer"):
        names = {name.partition(".")[2] for name in tensors_of(adapted / LAST, part)}
        names = {name.rpartition(".")[0] for name in names} if part == "optimizer" else names
        assert {name for name in names if name.startswith("dit.")} == adapters
        assert any(name.startswith("fuser.") for name in names)
    moved = tensors_of(adapted / LAST, "model")
    assert all(tensor.any() for name, tensor in moved.items() if "lora_B" in name)
    assert (info.lora.rank, info.lora.alpha, info.lora.base.name) == (2, 4.0, str(base))
    assert info.lora.base.files.keys() == {"diffusion_pytorch_model.safetensors"}
    assert not torch.equal(
        open_checkpoint(adapted, print).load_transformer().state_dict()["transformer_blocks.0.attn1.to_q.weight"],
        load_transformer(base).state_dict()["transformer_blocks.0.attn1.to_q.weight"],
    )


def test_ten_steps_of_adapters_are_five_and_five_more_bit_for_bit_wherever_the_base_has_gone(
    small_cache: Path, base: Path, tmp_path: Path, adapted: Path
) -> None:
    here = Path(shutil.copytree(base, tmp_path / "base"))
    settings = {"ema__profiles": ["power:0.2"], "run__validation_steps": 5, "run__stop_at_step": 5}
    train(lora_run(small_cache, here, tmp_path / "parts", **settings))
    here = here.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"--init-from .*base: expected a diffusers folder"):
        train(resumed_config(tmp_path / "parts"), "latest")
    train(resumed_config(tmp_path / "parts", model__init_from=str(here)), "latest")
    for part in ("model", "optimizer", "ema"):
        expected, found = (tensors_of(run / LAST, part) for run in (adapted, tmp_path / "parts"))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), name
    assert losses_of(tmp_path / "parts") == losses_of(adapted)

    flip_last_bit(here / "transformer/diffusion_pytorch_model.safetensors")
    with pytest.raises(CacheError, match=r"not the transformer that the adapters were trained on .* by --init-from"):
        train(resumed_config(tmp_path / "parts", run__max_train_steps=12), "latest")


def test_adapters_are_trained_alike_by_any_ranks(small_cache: Path, base: Path, tmp_path: Path, adapted: Path) -> None:
    settings = {"ema__profiles": ["power:0.2"], "run__validation_steps": 5}
    names = ("ddp", "fsdp")
    train_on_ranks(2, [
        lora_run(small_cache, base, tmp_path / name, parallel__strategy=name, **settings) for name in names
    ])  # fmt: skip
    for name in names:
        for line, other in zip(metrics_of(adapted), metrics_of(tmp_path / name), strict=True):
            for figure in ("loss", "validation/loss", "validation/ema_loss"):
                assert other.get(figure) == pytest.approx(line.get(figure), abs=1e-5), (name, line["step"], figure)
        for part in ("model", "ema"):
            for tensor_name, tensor in tensors_of(adapted / LAST, part).items():
                found = tensors_of(tmp_path / name / LAST, part)[tensor_name]
                torch.testing.assert_close(found, tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kept", ["selective", "full"])
def test_adapters_train_alike_when_activations_are_computed_again(
    small_cache: Path, base: Path, tmp_path: Path, adapted: Path, kept: str
) -> None:
    train(
        lora_run(small_cache, base, tmp_path / "run", parallel__activation_checkpointing=kept, run__max_train_steps=4)
    )
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(adapted)[:4], abs=1e-6)
    assert all(
        tensor.any() for name, tensor in tensors_of(tmp_path / "run/checkpoints/step-00000004", "model").items()
        if "lora_B" in name
    )  # fmt: skip


def test_adapters_on_nothing_or_on_what_is_not_there_are_refused(small_cache: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--lora-rank: adapters want a transformer that was trained"):
        tiny_config(small_cache, tmp_path / "run", model__lora__rank=2)
    with pytest.raises(InputError, match=r"--lora-rank must be at least 1, got 0"):
        lora_run(small_cache, base, tmp_path / "run", model__lora__rank=0)
    with pytest.raises(InputError, match=r"--lora-targets to_qkv: no linear map of the transformer"):
        train(lora_run(small_cache, base, tmp_path / "run", model__lora__targets=["to_qkv"]))
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(
    ("flags", "rate"),
    [
        ({}, 1e-5),
        ({"model.lora.rank": 8}, 1e-4),
        ({"model.lora.rank": 8, "optimizer.learning_rate": 3e-5}, 3e-5),
    ],
)
def test_adapters_have_a_rate_of_their_own_unless_one_is_given(
    tmp_path: Path, flags: dict[str, object], rate: float
) -> None:
    request = RunRequest(
        preset="cogvideox-5b", output_dir=tmp_path, config_file=None, assignments=("data.cache=c",), flags=flags,
        resume=None,
    )  # fmt: skip
    assert build_config(request).optimizer.learning_rate == rate
