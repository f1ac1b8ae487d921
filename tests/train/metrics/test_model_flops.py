"""What MFU is made of: the operations of our transformer as torch counts them, and the peaks of devices."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mimir_shared.transformer_flops import COGVIDEOX_2B, COGVIDEOX_5B, forward_flops, training_flops
from mimir_train.config import LoraConfig
from mimir_train.metrics.model_flops import device_peak_tflops, transformer_sizes
from mimir_train.model.config import DiTConfig
from mimir_train.model.dit import DiT
from mimir_train.presets import preset_document
from mimir_train.weights.lora import add_adapters

BATCH, TEXT_TOKENS, LATENT_SIZE = 2, 11, (3, 8, 12)


def _config(*, rotary: bool) -> DiTConfig:
    return DiTConfig(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        in_channels=8,
        out_channels=8,
        time_embed_dim=24,
        text_embed_dim=40,
        use_rotary_positional_embeddings=rotary,
    )


def _run(config: DiTConfig, *, backward: bool, lora: LoraConfig | None = None) -> int:
    """Operations of forward (and backward) of a batch, as torch counts matrix products."""
    model = DiT(config)
    if lora is not None:
        add_adapters(model, lora)
    latents = torch.randn(BATCH, config.in_channels, *LATENT_SIZE, requires_grad=True)
    text = torch.randn(BATCH, TEXT_TOKENS, config.text_embed_dim, requires_grad=True)
    # as plain products: torch's fused kernels compute the scores again in backward, and are counted so
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        predicted = model(latents, text, torch.tensor([10, 900]))
        if backward:
            predicted.sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("rotary", [False, True], ids=["2b-like", "5b-like"])
def test_the_formula_counts_a_forward_as_torch_does(rotary: bool) -> None:
    config = _config(rotary=rotary)
    expected = BATCH * forward_flops(transformer_sizes(config), LATENT_SIZE, TEXT_TOKENS).total
    assert _run(config, backward=False) == expected


def test_backward_takes_twice_the_forward_but_for_the_gradient_of_the_timesteps() -> None:
    config = _config(rotary=False)
    expected = BATCH * training_flops(transformer_sizes(config), LATENT_SIZE, TEXT_TOKENS)
    without = 2 * BATCH * config.width * config.time_embed_dim  # timesteps are numbers: nothing learns from them
    assert _run(config, backward=True) == expected - without


def test_frozen_weights_have_no_gradient_to_count() -> None:
    config = replace(_config(rotary=True), num_attention_heads=12)
    expected = BATCH * training_flops(transformer_sizes(config), LATENT_SIZE, TEXT_TOKENS, frozen=True)
    assert _run(config, backward=True, lora=LoraConfig(rank=1)) == pytest.approx(expected, rel=0.02)
    assert _run(config, backward=True) > 1.3 * expected


def test_sizes_of_the_presets_are_those_that_the_estimates_use() -> None:
    for name, sizes in (("cogvideox-2b", COGVIDEOX_2B), ("cogvideox-5b", COGVIDEOX_5B)):
        document = preset_document(name)["model"]
        assert isinstance(document, dict)
        assert transformer_sizes(DiTConfig(**document["transformer"])) == sizes


def test_without_a_known_peak_there_is_none_unless_it_is_stated() -> None:
    cpu = torch.device("cpu")
    assert device_peak_tflops(cpu, "bfloat16", None) is None
    assert device_peak_tflops(cpu, "float32", 1.5) == 1.5
    assert device_peak_tflops(torch.device("cuda"), "float32", None) is None
