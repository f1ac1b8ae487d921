"""What the model is trained for: v-prediction on CogVideoX's noise schedule, and the draws that a step makes.

    noisy_latents = sqrt(abar) * latents + sqrt(1 - abar) * noise
    v_target      = sqrt(abar) * noise   - sqrt(1 - abar) * latents
    loss          = mean (v_prediction - v_target)**2
The official loss weighs the error of the implied latents by 1/(1 - abar) (sat/sgm loss.py VideoDiffusionLoss). The
implied error is sqrt(1 - abar) times that of v, so the two are equal; this one does not divide by a number near zero.

Every draw is a pure function of (seed, step, position in the global batch): ranks, accumulation and interruptions
change nothing.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mimir_train.model.fuser import LlmFeatures

NUM_TRAIN_TIMESTEPS = 1000

Purpose = Literal["posterior", "noise", "timestep", "timestep-strata", "text-dropout"]
"""What a draw is for: part of its key, so that no two uses share their numbers."""


# --- keyed draws --------------------------------------------------------------------------------------------------


def keyed_bits(purpose: Purpose, *fields: int) -> int:
    """Hash the fields to 64 bits; unequal fields give unrelated bits."""
    key = ":".join([purpose, *map(str, fields)])
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def keyed_normal(
    purpose: Purpose,
    seed: int,
    step: int,
    positions: Sequence[int],
    shape: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw standard normal noise for some samples of a step's global batch.

    Drawn on the CPU, so that every device sees the same numbers. torch seeds a CPU generator from 32 bits alone: of a
    million draws about a hundred pairs are alike, which does noise no harm.

    Args:
        positions: of the samples in the global batch.
        shape: of one sample, for instance (C, T, h, w).
    Returns: (len(positions), *shape) float32 on `device`.
    """
    noise = torch.empty(len(positions), *shape, dtype=torch.float32, device="cpu")
    for row, position in zip(noise, positions, strict=True):
        row.normal_(generator=torch.Generator(device="cpu").manual_seed(keyed_bits(purpose, seed, step, position)))
    return noise.to(device, non_blocking=True)


def keyed_uniform(purpose: Purpose, seed: int, step: int, positions: Sequence[int]) -> Tensor:
    """Draw one number in [0, 1) for each of some samples of a step's global batch; (len(positions),) float64."""
    # 53 bits: as many as a float64 holds
    draws = [(keyed_bits(purpose, seed, step, position) >> 11) * 2.0**-53 for position in positions]
    return torch.tensor(draws, dtype=torch.float64, device="cpu")


# --- latents ------------------------------------------------------------------------------------------------------


def sample_latents(vae_moments: Tensor, scaling_factor: float, posterior_noise: Tensor) -> Tensor:
    """Draw latents from cached VAE moments and scale them to about unit variance.

    Args:
        vae_moments: (B, 2C, T, h, w), any float dtype: mean and log-variance stacked on channels, unscaled.
        scaling_factor: of the VAE's config: 1.15258426 (2B), 0.7 (5B).
        posterior_noise: (B, C, T, h, w) float32, from `keyed_normal("posterior", …)`.
    Returns: (B, C, T, h, w) float32.
    Source: diffusers models/autoencoders/vae.py DiagonalGaussianDistribution.
    """
    mean, log_variance = vae_moments.float().chunk(2, dim=1)  # float32 before exp: bfloat16 keeps 8 significant bits
    std = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
    return scale_latents(mean + std * posterior_noise, scaling_factor)


def scale_latents(unscaled_latents: Tensor, scaling_factor: float) -> Tensor:
    """Scale latents that the cache holds as `vae_mean` or `vae_sample`; float32 of the same shape."""
    return unscaled_latents.float() * scaling_factor


# --- noise schedule -----------------------------------------------------------------------------------------------


def shifted_zero_snr_alphas(
    snr_shift_scale: float,
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
) -> Tensor:
    """Compute abar, the share of signal power at each timestep: close to 1 at 0 (data), 0 at the last (noise).

    Args:
        snr_shift_scale: divides the signal-to-noise ratio; 3.0 for 2B, 1.0 (no shift) for 5B.
    Returns: (num_train_timesteps,) float64.
    Source: diffusers schedulers/scheduling_ddim_cogvideox.py with rescale_betas_zero_snr; the shift comes first, then
        the rescaling, as in sat/sgm discretizer.py ZeroSNRDDPMDiscretization.
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
    alphas_cumprod = alphas_cumprod / (snr_shift_scale + (1.0 - snr_shift_scale) * alphas_cumprod)
    signal_level = alphas_cumprod.sqrt()
    first, last = signal_level[0], signal_level[-1]
    return ((signal_level - last) * (first / (first - last))) ** 2


@dataclass(frozen=True)
class NoiseSchedule:
    """How much signal and noise a timestep has. Works in float32, whatever goes in."""

    alphas_cumprod: Tensor
    """abar: (1000,) float64."""

    @classmethod
    def cogvideox(cls, snr_shift_scale: float) -> "NoiseSchedule":
        """The schedule of CogVideoX: snr_shift_scale 3.0 for 2B, 1.0 for 5B."""
        return cls(shifted_zero_snr_alphas(snr_shift_scale))

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """The same schedule on another device."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar) and sqrt(1 - abar) of the timesteps (B,): signal and noise levels, (B, 1, 1, 1, 1) float32."""
        alphas_cumprod = self.alphas_cumprod[timesteps][:, None, None, None, None]
        return alphas_cumprod.sqrt().float(), (1.0 - alphas_cumprod).sqrt().float()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t of z_0 and epsilon: (B, C, T, h, w) float32."""
        signal_level, noise_level = self.levels(timesteps)
        return signal_level * latents.float() + noise_level * noise.float()

    def v_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model is to predict: (B, C, T, h, w) float32.

        diffusers' `get_velocity(latents, noise, timesteps)` is this; its training examples call it with (prediction,
        noisy latents) instead, which gives the implied latents (`predict_latents`).
        """
        signal_level, noise_level = self.levels(timesteps)
        return signal_level * noise.float() - noise_level * latents.float()

    def predict_latents(self, v_prediction: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The latents that a predicted v implies: (B, C, T, h, w) float32."""
        signal_level, noise_level = self.levels(timesteps)
        return signal_level * noisy_latents.float() - noise_level * v_prediction.float()


def sample_timesteps(
    seed: int,
    step: int,
    positions: Sequence[int],
    global_batch_size: int,
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
) -> Tensor:
    """Draw timesteps spread evenly over the global batch: each sample has its own of B equal intervals.

    Which interval is whose is drawn anew at every step, so each sample's timestep is uniform by itself.

    Args:
        positions: of the samples in the global batch, each below `global_batch_size`.
    Returns: (len(positions),) int64 on the CPU.
    Source: CogVideoX section 3.3 "explicit uniform sampling", over samples in place of ranks.
    """
    assert all(0 <= position < global_batch_size for position in positions), f"{positions} of {global_batch_size}"
    strata = keyed_uniform("timestep-strata", seed, step, range(global_batch_size)).argsort()
    within = keyed_uniform("timestep", seed, step, positions)
    fraction = (strata[list(positions)] + within) / global_batch_size
    # the clamp is for rounding alone: the largest `within` may round the sum up to a whole number
    return (fraction * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


def v_loss(v_prediction: Tensor, v_target: Tensor) -> Tensor:
    """Mean squared error of v for each sample: (B, C, T, h, w) twice to (B,) float32. A step's loss is its mean."""
    return (v_prediction.float() - v_target.float()).square().flatten(1).mean(dim=1)


# --- text dropout -------------------------------------------------------------------------------------------------


class TextFeatures(NamedTuple):
    """All that a batch of captions gives the fuser."""

    t5_embeds: Tensor
    """(B, L, D)."""
    llm: LlmFeatures | None
    """None where the fuser does not read it."""


def sample_text_dropout(seed: int, step: int, positions: Sequence[int], rate: float) -> Tensor:
    """Draw which samples are trained without their text: (len(positions),) bool on the CPU."""
    return keyed_uniform("text-dropout", seed, step, positions) < rate


def drop_text(text: TextFeatures, dropped: Tensor, empty: TextFeatures | None = None) -> TextFeatures:
    """Replace the text of some samples by the unconditional one, T5 and LLM together.

    With all of `dropped` True this is the unconditional half of classifier-free guidance.

    Args:
        text: of B captions.
        dropped: (B,) bool.
        empty: features of the empty prompt, with B = 1; None puts zeros in place of every embedding and hidden state
            (sat's `ucg_rate`), of which the fuser leaves only its stabilizer offsets.
    Returns: features of B captions; query and answer may be longer than they came, where the empty prompt's are.
    """
    dropped = dropped.to(text.t5_embeds.device)
    empty = TextFeatures(text.t5_embeds.new_zeros(1, 1, 1), None) if empty is None else empty
    t5_embeds = _replace_rows(text.t5_embeds, dropped, empty.t5_embeds)
    if text.llm is None:
        return TextFeatures(t5_embeds, None)
    if empty.llm is None:
        zeros = (tensor.new_zeros(1, 1, *(1,) * (tensor.ndim - 2)) for tensor in text.llm)
        empty_llm = LlmFeatures(*zeros)
    else:
        empty_llm = empty.llm
    fields = (_replace_rows(of_text, dropped, of_empty) for of_text, of_empty in zip(text.llm, empty_llm, strict=True))
    return TextFeatures(t5_embeds, LlmFeatures(*fields))


def _replace_rows(values: Tensor, dropped: Tensor, empty: Tensor) -> Tensor:
    """Put `empty` (1, R', …) in the dropped samples of `values` (B, R, …), both padded with zeros to one R."""
    num_rows = max(values.shape[1], empty.shape[1])
    values, empty = (
        F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, num_rows - tensor.shape[1])) for tensor in (values, empty)
    )
    where = dropped.reshape(-1, *(1,) * (values.ndim - 1))
    return torch.where(where, empty.to(values), values)
