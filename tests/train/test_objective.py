"""The objective against diffusers' schedulers and posterior, and the official formula of the loss."""

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from mimir_train.model.config import FUSERS, FuserConfig
from mimir_train.model.fuser import LlmFeatures, TokenFuser
from mimir_train.objective import (
    NoiseSchedule,
    TextFeatures,
    drop_text,
    keyed_bits,
    keyed_normal,
    keyed_uniform,
    sample_latents,
    sample_text_dropout,
    sample_timesteps,
    scale_latents,
    shifted_zero_snr_alphas,
    v_loss,
)

SHIFTS = pytest.mark.parametrize("snr_shift_scale", [pytest.param(3.0, id="2B"), pytest.param(1.0, id="5B")])
SCHEDULERS = pytest.mark.parametrize("scheduler_class", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
TIMESTEPS = torch.tensor([0, 1, 250, 500, 998, 999])


def official(scheduler_class: type, snr_shift_scale: float) -> CogVideoXDDIMScheduler | CogVideoXDPMScheduler:
    return scheduler_class(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=snr_shift_scale)


def latents_and_noise(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    shape = (len(TIMESTEPS), 4, 3, 6, 8)
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


@SHIFTS
@SCHEDULERS
def test_schedule_equals_the_diffusers_schedulers(scheduler_class: type, snr_shift_scale: float) -> None:
    alphas_cumprod = shifted_zero_snr_alphas(snr_shift_scale)
    assert alphas_cumprod.shape == (1000,)
    torch.testing.assert_close(
        alphas_cumprod, official(scheduler_class, snr_shift_scale).alphas_cumprod, rtol=1e-12, atol=0
    )
    assert alphas_cumprod[-1] == 0, "the last timestep is noise alone"
    assert (alphas_cumprod.diff() < 0).all()


@SHIFTS
@SCHEDULERS
def test_noise_and_v_target_equal_the_diffusers_schedulers(scheduler_class: type, snr_shift_scale: float) -> None:
    latents, noise = latents_and_noise()
    schedule, scheduler = NoiseSchedule.cogvideox(snr_shift_scale), official(scheduler_class, snr_shift_scale)
    noisy_latents = schedule.add_noise(latents, noise, TIMESTEPS)
    v_target = schedule.v_target(latents, noise, TIMESTEPS)
    # diffusers rounds abar to float32 before 1 - abar
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(noisy_latents, scheduler.add_noise(latents, noise, TIMESTEPS), **close)
    torch.testing.assert_close(v_target, scheduler.get_velocity(latents, noise, TIMESTEPS), **close)
    # what the official training script calls get_velocity for: the latents that a prediction implies
    implied = schedule.predict_latents(v_target, noisy_latents, TIMESTEPS)
    torch.testing.assert_close(implied, scheduler.get_velocity(v_target, noisy_latents, TIMESTEPS), **close)
    torch.testing.assert_close(implied, latents, **close)


def test_the_last_timestep_is_noise_and_predicts_the_latents() -> None:
    latents, noise = latents_and_noise()
    schedule, last = NoiseSchedule.cogvideox(3.0), torch.full((len(TIMESTEPS),), 999)
    assert torch.equal(schedule.add_noise(latents, noise, last), noise)
    assert torch.equal(schedule.v_target(latents, noise, last), -latents)


@SHIFTS
def test_loss_equals_the_official_weighting(snr_shift_scale: float) -> None:
    latents, noise = latents_and_noise()
    schedule = NoiseSchedule.cogvideox(snr_shift_scale)
    v_prediction = torch.randn_like(latents)
    loss = v_loss(v_prediction, schedule.v_target(latents, noise, TIMESTEPS))
    assert loss.shape == (len(TIMESTEPS),)
    assert loss.dtype == torch.float32
    # sat/sgm loss.py: the latents implied by the prediction, weighted by 1 / (1 - abar); here in float64
    alphas_cumprod = schedule.alphas_cumprod[TIMESTEPS].reshape(-1, 1, 1, 1, 1)
    signal, noise_level = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    implied = signal * (signal * latents.double() + noise_level * noise.double()) - noise_level * v_prediction.double()
    weighted = (implied - latents.double()).square() / (1 - alphas_cumprod)
    torch.testing.assert_close(loss.double(), weighted.mean(dim=(1, 2, 3, 4)), rtol=1e-5, atol=0)


def test_loss_is_float32_whatever_the_model_computes_in() -> None:
    prediction = torch.full((1, 1, 1, 64, 64), 1.0, dtype=torch.bfloat16)
    target = torch.full((1, 1, 1, 64, 64), 1.001)
    assert v_loss(prediction, target).item() == pytest.approx(1e-6, rel=1e-3)


# --- latents ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_equal_the_diffusers_posterior_given_the_same_noise(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    moments = torch.randn(2, 8, 3, 4, 6)
    moments[:, 4:] *= 5
    moments[0, 4, 0, 0, :2] = torch.tensor([-100.0, 100.0])  # beyond the clamp on both sides
    moments = moments.to(dtype)
    noise = torch.randn(2, 4, 3, 4, 6, generator=torch.Generator().manual_seed(7))
    wanted = DiagonalGaussianDistribution(moments.float()).sample(torch.Generator().manual_seed(7)) * 0.7
    latents = sample_latents(moments, 0.7, noise)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, wanted)
    assert torch.equal(scale_latents(moments[:, :4], 0.7), moments[:, :4].float() * 0.7)


# --- keyed draws --------------------------------------------------------------------------------------------------


def test_draws_do_not_depend_on_who_makes_them() -> None:
    whole = keyed_normal("noise", 42, 5, range(4), (2, 3))
    assert whole.shape == (4, 2, 3)
    assert torch.equal(torch.cat([keyed_normal("noise", 42, 5, [0, 1], (2, 3)), whole[2:]]), whole)
    assert torch.equal(keyed_normal("noise", 42, 5, [3, 1], (2, 3)), whole[[3, 1]])
    assert torch.equal(sample_timesteps(42, 5, [6, 2], 8), sample_timesteps(42, 5, range(8), 8)[[6, 2]])
    assert torch.equal(sample_text_dropout(42, 5, [6, 2], 0.5), sample_text_dropout(42, 5, range(8), 0.5)[[6, 2]])
    state = torch.random.get_rng_state()
    keyed_normal("noise", 42, 5, range(4), (2, 3))
    sample_timesteps(42, 5, range(8), 8)
    assert torch.equal(torch.random.get_rng_state(), state), "torch's own generator was touched"


def test_draws_differ_in_every_field_of_their_key() -> None:
    draws = [
        keyed_normal(purpose, seed, step, [position], (4,))
        for purpose, seed, step, position in [
            ("noise", 0, 0, 0),
            ("posterior", 0, 0, 0),
            ("noise", 1, 0, 0),
            ("noise", 0, 1, 0),
            ("noise", 0, 0, 1),
            ("noise", 1, 0, 1),
            ("noise", 11, 1, 1),
            ("noise", 1, 11, 1),
        ]
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)


def test_draws_are_those_of_earlier_releases() -> None:
    # a checkpoint resumed under a new release must see the same noise
    assert keyed_bits("noise", 42, 0, 0) == 11660295128649122518
    assert sample_timesteps(42, 0, range(4), 4).tolist() == [555, 268, 859, 212]
    assert sample_text_dropout(42, 0, range(20), 0.1).nonzero().flatten().tolist() == [12, 13, 14]


def test_noise_is_standard_normal() -> None:
    noise = keyed_normal("noise", 0, 0, range(8), (16, 5, 20, 20))
    assert noise.dtype == torch.float32
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(8)
    assert correlation.abs().max() < 0.03, "samples share their noise"


@pytest.mark.parametrize("global_batch_size", [1, 3, 8, 64, 2000])
def test_timesteps_are_spread_evenly_over_the_global_batch(global_batch_size: int) -> None:
    timesteps = sample_timesteps(0, 7, range(global_batch_size), global_batch_size)
    assert timesteps.dtype == torch.int64
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    if global_batch_size in (8, 64):
        strata = (timesteps * global_batch_size) // 1000
        # an interval's end may fall inside a timestep
        lower_or_same = torch.stack([strata, ((timesteps + 1) * global_batch_size - 1) // 1000])
        for interval in range(global_batch_size):
            assert (lower_or_same == interval).any(), f"nothing in interval {interval}"


def test_each_position_draws_every_timestep_alike() -> None:
    draws = torch.stack([sample_timesteps(1, step, [0, 3], 4) for step in range(4000)])  # (steps, 2)
    for position in range(2):
        counts = torch.histc(draws[:, position].float(), bins=10, min=0, max=1000)
        assert (counts - 400).abs().max() < 5 * 400**0.5
    correlation = torch.corrcoef(draws.float().T)[0, 1]
    assert correlation < 0, "positions of one step must not share an interval"


# --- text dropout -------------------------------------------------------------------------------------------------


def text_of(batch_size: int, query_rows: int, answer_rows: int, value: float) -> TextFeatures:
    llm = LlmFeatures(
        query_hidden=torch.full((batch_size, query_rows, 6), value),
        query_mask=torch.ones(batch_size, query_rows, dtype=torch.bool),
        answer_hidden=torch.full((batch_size, answer_rows, 6), value),
        answer_mask=torch.ones(batch_size, answer_rows, dtype=torch.bool),
        instruction_hidden=torch.full((batch_size, 4, 6), value),
    )
    return TextFeatures(torch.full((batch_size, 5, 8), value), llm)


def test_a_tenth_of_the_texts_is_dropped() -> None:
    dropped = torch.cat([sample_text_dropout(0, step, range(64), 0.1) for step in range(100)])
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.012)
    assert not sample_text_dropout(0, 0, range(64), 0.0).any()
    assert sample_text_dropout(0, 0, range(64), 1.0).all()
    assert keyed_uniform("text-dropout", 0, 0, []).shape == (0,)


def test_dropped_text_is_zero_in_t5_and_llm_together() -> None:
    dropped = torch.tensor([False, True, False])
    out = drop_text(text_of(3, 4, 2, 1.0), dropped)
    assert out.llm is not None
    for tensor in (out.t5_embeds, *out.llm):
        assert tensor[[0, 2]].bool().all()
        assert not tensor[1].any()
    assert drop_text(TextFeatures(torch.ones(3, 5, 8), None), dropped).llm is None
    fuser = TokenFuser(FuserConfig(switches=FUSERS["mimir"], t5_rms=0.2, text_width=8, llm_width=6))
    condition_tokens = fuser(*out)
    assert not condition_tokens[1, :5].any()
    assert fuser.stabilizer_offsets is not None
    assert torch.equal(condition_tokens[1, 5:], fuser.stabilizer_offsets)


@pytest.mark.parametrize("empty_rows", [1, 9])
def test_dropped_text_may_be_the_empty_prompt(empty_rows: int) -> None:
    text, empty = text_of(3, 4, 2, 1.0), text_of(1, empty_rows, empty_rows, 2.0)
    out = drop_text(text, torch.tensor([False, True, False]), empty)
    assert out.llm is not None
    assert (out.t5_embeds[1] == 2).all()
    assert (out.t5_embeds[[0, 2]] == 1).all()
    assert (out.llm.instruction_hidden[1] == 2).all()
    for hidden, mask, rows in (
        (out.llm.query_hidden, out.llm.query_mask, 4),
        (out.llm.answer_hidden, out.llm.answer_mask, 2),
    ):
        assert mask.sum(dim=1).tolist() == [rows, empty_rows, rows]
        assert (hidden[1][mask[1]] == 2).all()
        assert (hidden[0][mask[0]] == 1).all()
        assert not hidden[~mask].any()


def test_dropout_leaves_no_trace_of_nan_in_pad_rows() -> None:
    text = text_of(2, 4, 2, 1.0)
    assert text.llm is not None
    text.llm.query_hidden[1, 3] = torch.nan
    out = drop_text(text, torch.tensor([False, True]))
    assert out.llm is not None
    assert not out.llm.query_hidden[1].any()
