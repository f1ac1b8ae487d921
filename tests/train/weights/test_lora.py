"""Adapters beside a frozen transformer, and the file that diffusers and PEFT read them from."""

import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline

from mimir_shared.errors import InputError
from mimir_train.checkpoint.adapter_base import record_adapters
from mimir_train.config import LoraConfig
from mimir_train.model.dit import DiT
from mimir_train.weights.lora import (
    WEIGHTS_NAME,
    adapted_maps,
    adapter_parameters,
    add_adapters,
    first_adapter,
    merge_adapters,
    save_adapters,
)
from mimir_train.weights.transformer_folder import save_transformer
from tests.train.model.test_dit import CONFIG_2B, CONFIG_5B, diffusers_twin, random_dit, relative_error, run_twin

NEEDS_PEFT = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None or importlib.util.find_spec("accelerate") is None,
    reason="peft is not installed; diffusers reads adapters through it",
)
ATTENTION = LoraConfig(rank=3, alpha=6.0)


def adapted_dit(config: LoraConfig, *, trained: bool, base: DiT | None = None) -> DiT:
    """Adapters as they start, or as if training had moved them."""
    dit = random_dit(CONFIG_2B) if base is None else base
    add_adapters(dit, config)
    torch.manual_seed(1)
    for _, adapted in adapted_maps(dit):
        first = first_adapter(adapted.in_features, adapted.out_features, config.rank)
        adapted.lora_A.load_state_dict(first["lora_A"].state_dict())
        adapted.lora_B.load_state_dict(first["lora_B"].state_dict())
        if trained:
            torch.nn.init.normal_(adapted.lora_B.weight, std=0.3)
    return dit


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(2, 4, 3, 8, 12), torch.randn(2, 10, 20), torch.tensor([3, 800])


@torch.no_grad()
def output(dit: DiT) -> torch.Tensor:
    out: torch.Tensor = dit(*example())
    return out


def test_untrained_adapters_change_nothing_at_all() -> None:
    assert torch.equal(output(adapted_dit(ATTENTION, trained=False)), output(random_dit(CONFIG_2B)))
    assert relative_error(output(adapted_dit(ATTENTION, trained=True)), output(random_dit(CONFIG_2B))) > 1e-2


def test_only_adapters_are_trained_and_base_names_stay() -> None:
    dit = adapted_dit(ATTENTION, trained=False)
    trained = {name for name, parameter in dit.named_parameters() if parameter.requires_grad}
    assert trained == {
        f"transformer_blocks.{block}.attn1.{target}.lora_{part}.weight"
        for block in range(2) for target in ("to_q", "to_k", "to_v", "to_out.0") for part in "AB"
    }  # fmt: skip
    assert dit.state_dict().keys() - trained == random_dit(CONFIG_2B).state_dict().keys()
    adapter = dict(adapted_maps(dit))["transformer_blocks.1.attn1.to_out.0"]
    assert tuple(adapter.lora_A.weight.shape) == (3, CONFIG_2B.width)
    assert adapter.scaling == 2.0


def test_targets_may_be_any_linear_maps_and_unknown_ones_are_refused() -> None:
    dit = adapted_dit(LoraConfig(rank=1, targets=("ff.net.0.proj", "norm1.linear", "proj_out")), trained=False)
    assert [name for name, _ in adapted_maps(dit)] == [
        "transformer_blocks.0.norm1.linear", "transformer_blocks.0.ff.net.0.proj",
        "transformer_blocks.1.norm1.linear", "transformer_blocks.1.ff.net.0.proj", "proj_out",
    ]  # fmt: skip
    with pytest.raises(
        InputError, match=r"--lora-targets to_x: no linear map.*there are .*to_q, to_k, .*ff.net.2"
    ) as e:
        add_adapters(random_dit(CONFIG_2B), LoraConfig(rank=1, targets=("to_q", "to_x")))
    assert str(e.value).count("to_q") == 1


def test_merged_adapters_give_the_output_of_separate_ones() -> None:
    dit = adapted_dit(ATTENTION, trained=True)
    separate = output(dit)
    merge_adapters(dit)
    assert dit.state_dict().keys() == random_dit(CONFIG_2B).state_dict().keys()
    assert relative_error(output(dit), separate) <= 1e-5


def write_adapters(dit: DiT, config: LoraConfig, folder: Path) -> Path:
    save_adapters(config, adapter_parameters(dit), folder)
    return folder


@NEEDS_PEFT
@pytest.mark.parametrize("rotary", [False, True], ids=["2B", "5B"])
@pytest.mark.parametrize(
    "lora",
    [ATTENTION, LoraConfig(rank=2), LoraConfig(rank=2, alpha=1.0, targets=("to_q", "ff.net.0.proj", "proj_out"))],
    ids=["alpha", "plain", "others"],
)
def test_diffusers_reads_the_adapters_and_gives_our_output(tmp_path: Path, rotary: bool, lora: LoraConfig) -> None:
    base = random_dit(CONFIG_5B if rotary else CONFIG_2B)
    twin = diffusers_twin(base, tmp_path / "base", 10)
    dit = adapted_dit(lora, trained=True, base=base)
    folder = write_adapters(dit, lora, tmp_path / "lora")
    before = run_twin(twin, *example())
    twin.load_lora_adapter(folder, weight_name=WEIGHTS_NAME)
    assert relative_error(run_twin(twin, *example()), output(dit)) <= 1e-5
    assert relative_error(before, output(dit)) > 1e-3  # the adapters do something


@NEEDS_PEFT
def test_a_pipeline_loads_the_folder(tmp_path: Path) -> None:
    base = random_dit(CONFIG_2B)
    twin = diffusers_twin(base, tmp_path / "base", 10)
    folder = write_adapters(adapted_dit(ATTENTION, trained=True, base=base), ATTENTION, tmp_path / "lora")
    pipeline = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=twin, scheduler=None)
    pipeline.load_lora_weights(folder)
    config = twin.peft_config["default_0"]
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (3, 6.0, set(ATTENTION.targets))
    assert relative_error(run_twin(twin, *example()), output(base)) <= 1e-5
    pipeline.unload_lora_weights()
    assert relative_error(run_twin(twin, *example()), output(random_dit(CONFIG_2B))) <= 1e-5


def test_a_base_in_a_folder_is_recorded_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_transformer(CONFIG_2B, DiT(CONFIG_2B).state_dict(), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert record_adapters(ATTENTION, "base", tmp_path / "base").base.name == str(tmp_path / "base")
    assert record_adapters(ATTENTION, "some/hub-id", tmp_path / "base").base.name == "some/hub-id"
