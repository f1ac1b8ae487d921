"""The sampler against diffusers' CogVideoXPipeline: same weights, same noise, same text."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor

from mimir_precompute.toy.models import load_toy_vae
from mimir_shared.errors import InputError
from mimir_train.guidance import GuidanceName, apply_guidance, guidance_scale_at
from mimir_train.model.config import DiTConfig
from mimir_train.model.dit import DiT
from mimir_train.objective import shifted_zero_snr_alphas
from mimir_train.sampler import Guidance, SchedulerName, denoise, initial_noise, sample_generator
from mimir_train.schedulers import build_scheduler, make_scheduler
from mimir_train.transformer_folder import save_transformer

NUM_STEPS = 8
LATENT_SHAPE = (8, 3, 8, 12)
"""(C, T, h, w) of 9 frames of 32 x 48 in the toy VAE."""
TEXT_SHAPE = (1, 20, 24)
CONFIG = DiTConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    in_channels=8,
    out_channels=8,
    time_embed_dim=24,
    text_embed_dim=24,
    sample_height=8,
    sample_width=12,
    sample_frames=9,
    max_text_seq_length=20,
    use_rotary_positional_embeddings=True,
)


@pytest.fixture(scope="module")
def dit() -> DiT:
    """Random weights, none of them zero, of a size that keeps 8 guided steps finite."""
    torch.manual_seed(0)
    model = DiT(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def pipeline_class_and_twin(dit: DiT, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("transformer")
    save_transformer(CONFIG, dit.state_dict(), folder)
    return CogVideoXTransformer3DModel.from_pretrained(folder, low_cpu_mem_usage=False)


def texts() -> tuple[Tensor, Tensor]:
    """Condition and unconditional tokens."""
    torch.manual_seed(1)
    return torch.randn(TEXT_SHAPE), torch.zeros(TEXT_SHAPE)


def ours(dit: DiT, scheduler: SchedulerName, snr_shift_scale: float, guidance: Guidance) -> Tensor:
    generator = sample_generator(0, "a red ball", 0)
    noise = initial_noise(LATENT_SHAPE, generator)
    return denoise(dit, make_scheduler(scheduler, snr_shift_scale, NUM_STEPS), noise, *texts(), guidance, generator)


def theirs(twin: Any, scheduler: SchedulerName, snr_shift_scale: float, scale: float, *, dynamic: bool) -> Tensor:
    """The pipeline draws its own noise, from the same generator; (C, T, h, w) after the swap of its frames."""
    pipeline = CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=load_toy_vae(),
        transformer=twin,
        scheduler=build_scheduler(scheduler, snr_shift_scale),
    )
    # it takes a VAE without a text encoder to be of another compression: this one's is 4
    pipeline.vae_scale_factor_spatial = 4
    pipeline.set_progress_bar_config(disable=True)
    condition, unconditional = texts()
    latents: Tensor = pipeline(
        prompt_embeds=condition,
        negative_prompt_embeds=unconditional,
        height=LATENT_SHAPE[2] * 4,
        width=LATENT_SHAPE[3] * 4,
        num_frames=9,
        num_inference_steps=NUM_STEPS,
        guidance_scale=scale,
        use_dynamic_cfg=dynamic,
        generator=sample_generator(0, "a red ball", 0),
        output_type="latent",
    ).frames
    return latents.transpose(1, 2)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("guidance", [("fixed", 6.0), ("official", 6.0), ("fixed", 1.0)], ids=str)
@pytest.mark.parametrize("snr_shift_scale", [3.0, 1.0])
@pytest.mark.parametrize("scheduler", ["dpm", "ddim"])
def test_final_latents_equal_those_of_the_diffusers_pipeline(
    dit: DiT,
    pipeline_class_and_twin: Any,
    scheduler: SchedulerName,
    snr_shift_scale: float,
    guidance: tuple[GuidanceName, float],
) -> None:
    name, scale = guidance
    got = ours(dit, scheduler, snr_shift_scale, Guidance(name=name, scale=scale))
    expected = theirs(pipeline_class_and_twin, scheduler, snr_shift_scale, scale, dynamic=name == "official")
    assert expected.shape == got.shape == (1, *LATENT_SHAPE)
    assert torch.isfinite(expected).all()
    error = relative_error(got, expected)
    print(scheduler, snr_shift_scale, guidance, error, float(expected.std()))
    assert error < 1e-4, f"relative error {error:.2e}"
