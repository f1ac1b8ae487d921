"""The sampler against diffusers' CogVideoXPipeline: same weights, same noise, same text."""

import math
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor

from mimir_precompute.toy.models import load_toy_vae
from mimir_shared.errors import InputError
from mimir_train.model.config import DiTConfig
from mimir_train.model.dit import DiT
from mimir_train.objective import shifted_zero_snr_alphas
from mimir_train.sampling.choices import Guidance, GuidanceName, SchedulerName
from mimir_train.sampling.guidance import apply_guidance, guidance_scale_at
from mimir_train.sampling.sampler import denoise, initial_noise, sample_generator
from mimir_train.sampling.schedulers import build_scheduler, make_scheduler
from mimir_train.weights.transformer_folder import save_transformer

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
    """Random weights, none of them zero, that keep the size of what goes in, so that the text counts for something."""
    torch.manual_seed(0)
    model = DiT(CONFIG)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif "bias" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(model.proj_out.weight, std=0.3 * CONFIG.width**-0.5)
    return model.eval()


@pytest.fixture(scope="module")
def diffusers_twin(dit: DiT, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The official model with the same weights; diffusers has no types."""
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
    diffusers_twin: Any,
    scheduler: SchedulerName,
    snr_shift_scale: float,
    guidance: tuple[GuidanceName, float],
) -> None:
    name, scale = guidance
    got = ours(dit, scheduler, snr_shift_scale, Guidance(name=name, scale=scale))
    expected = theirs(diffusers_twin, scheduler, snr_shift_scale, scale, dynamic=name == "official")
    assert expected.shape == got.shape == (1, *LATENT_SHAPE)
    assert torch.isfinite(expected).all()
    error = relative_error(got, expected)
    assert error < 1e-4, f"relative error {error:.2e}"


@pytest.mark.parametrize("name", ["fixed", "ramp", "official"])
def test_each_guidance_moves_the_latents_by_far_more_than_the_tolerance(dit: DiT, name: GuidanceName) -> None:
    unguided = ours(dit, "ddim", 1.0, Guidance(name="fixed", scale=1.0))
    assert relative_error(ours(dit, "ddim", 1.0, Guidance(name=name, scale=6.0)), unguided) > 0.01


def test_guidance_of_one_asks_the_model_once_a_step_and_never_reads_the_unconditional_tokens(dit: DiT) -> None:
    generator = sample_generator(0, "", 0)
    noise = initial_noise(LATENT_SHAPE, generator)
    unread = torch.full(TEXT_SHAPE, math.nan)
    stepper = make_scheduler("ddim", 1.0, 2)
    got = denoise(dit, stepper, noise, texts()[0], unread, Guidance(name="fixed", scale=1.0), generator)
    assert torch.isfinite(got).all()


def test_fixed_guidance_is_the_same_at_every_step() -> None:
    assert {guidance_scale_at("fixed", 6.0, i, 999 - 20 * i, 50) for i in range(50)} == {6.0}


def test_ramp_rises_from_one_with_the_step_index() -> None:
    scales = [guidance_scale_at("ramp", 6.0, i, 999 - 20 * i, 50) for i in range(50)]
    assert scales[0] == 1.0
    assert scales == sorted(scales)
    assert scales[-1] == pytest.approx(1 + 6 * (1 - math.cos(math.pi * 0.98**5)) / 2)
    assert scales[-1] > 6.5


def test_official_guidance_reads_the_raw_timestep_and_so_jumps_about() -> None:
    scales = [guidance_scale_at("official", 6.0, i, 999 - 20 * i, 50) for i in range(50)]
    assert scales[-1] == pytest.approx(1 + 6 * (1 - math.cos(math.pi * ((50 - 19) / 50) ** 5)) / 2)
    assert scales != sorted(scales)
    assert all(1 <= scale <= 7 for scale in scales)


def test_guidance_of_one_is_the_prediction_with_text_and_of_zero_the_one_without() -> None:
    conditional, unconditional = torch.tensor([3.0]), torch.tensor([1.0])
    assert apply_guidance(unconditional, conditional, 1.0) == conditional
    assert apply_guidance(unconditional, conditional, 0.0) == unconditional
    assert apply_guidance(unconditional, conditional, 6.0) == torch.tensor([13.0])


def test_noise_depends_on_seed_prompt_and_index_alone() -> None:
    def noise(seed: int, prompt: str, index: int) -> Tensor:
        return initial_noise((2, 1, 2, 2), sample_generator(seed, prompt, index))

    assert torch.equal(noise(0, "a cat", 1), noise(0, "a cat", 1))
    others = [noise(1, "a cat", 1), noise(0, "a dog", 1), noise(0, "a cat", 0), noise(0, "a cat1", 1)]
    assert not any(torch.equal(noise(0, "a cat", 1), other) for other in others)


@pytest.mark.parametrize("name", ["dpm", "ddim"])
@pytest.mark.parametrize("snr_shift_scale", [3.0, 1.0])
def test_schedulers_have_the_noise_schedule_of_training(name: SchedulerName, snr_shift_scale: float) -> None:
    of_training = shifted_zero_snr_alphas(snr_shift_scale)
    torch.testing.assert_close(build_scheduler(name, snr_shift_scale).alphas_cumprod.double(), of_training.double())


def test_timesteps_are_trailing_so_the_first_step_sees_pure_noise() -> None:
    assert list(make_scheduler("dpm", 1.0, 4).timesteps) == [999, 749, 499, 249]


@pytest.mark.parametrize(("steps", "expected"), [(0, "expected 1 to 1000"), (1001, "1 to 1000"), (61, "62 steps")])
def test_numbers_of_steps_that_the_scheduler_cannot_do_are_refused(steps: int, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        make_scheduler("ddim", 1.0, steps)
    assert caught.value.exit_code == 2
