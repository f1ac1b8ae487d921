"""From noise to latents: the denoising loop, in plain torch. What a step of the scheduler does is diffusers'.

One video at a time, so that its numbers depend on nothing but itself: its noise is keyed by (seed, prompt, index).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mimir_train.model.dit import DiT
from mimir_train.sampling.choices import Guidance
from mimir_train.sampling.guidance import apply_guidance, guidance_scale_at


class Stepper(Protocol):
    """A noise schedule on its way through one video; a new one is needed for the next."""

    @property
    def timesteps(self) -> Sequence[int]:
        """From 999 (noise) downwards, one for each step."""
        ...

    def step(self, v_prediction: Tensor, noisy_latents: Tensor, generator: torch.Generator) -> Tensor:
        """Take the next step: (B, C, T, h, w) float32 twice to the less noisy latents."""
        ...


def sample_generator(seed: int, prompt: str, index: int) -> torch.Generator:
    """The random numbers of one video, on the CPU, so that every device sees the same: first its noise, then what
    the scheduler draws. They depend on nothing else: not on the other prompts, their order or their number.
    """
    key = json.dumps(["sample", seed, prompt, index])
    bits = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    return torch.Generator(device="cpu").manual_seed(bits)


def initial_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw what a video starts from: (1, C, T, h, w) float32 on the CPU, for a shape of (C, T, h, w).

    Drawn as diffusers draws it, frame by frame, so that one seed gives both the same noise.
    """
    channels, frames, height, width = shape
    return torch.randn((1, frames, channels, height, width), generator=generator).transpose(1, 2)


@torch.inference_mode()
def denoise(
    dit: DiT,
    stepper: Stepper,
    noise: Tensor,
    condition_tokens: Tensor,
    unconditional_tokens: Tensor,
    guidance: Guidance,
    generator: torch.Generator,
    after_step: Callable[[int], None] = lambda step_index: None,
) -> Tensor:
    """Follow the model from noise to latents.

    Args:
        dit: computes in the dtype of its weights; the latents stay float32.
        noise: (B, C, T, h, w) float32.
        condition_tokens: (B, L, D) of the prompt.
        unconditional_tokens: (B, L, D) of no text, or of what is to be avoided; unread where guidance is off.
        generator: for what the scheduler draws.
        after_step: told the index of each step that is done.
    Returns: scaled latents (B, C, T, h, w) float32.
    """
    dtype = dit.proj_out.weight.dtype
    noisy_latents = noise.float()
    timesteps = stepper.timesteps
    # the half without text comes first, as in diffusers: sums of a batched product depend on the place
    tokens = torch.cat([unconditional_tokens, condition_tokens]) if guidance.is_on else condition_tokens
    for step_index, timestep in enumerate(timesteps):
        model_input = torch.cat([noisy_latents] * 2) if guidance.is_on else noisy_latents
        timestep_batch = torch.full((len(model_input),), timestep, device=noise.device)
        v_prediction = dit(model_input.to(dtype), tokens, timestep_batch).float()
        if guidance.is_on:
            scale = guidance_scale_at(guidance.name, guidance.scale, step_index, timestep, len(timesteps))
            without_text, with_text = v_prediction.chunk(2)  # (B, C, T, h, w) each
            v_prediction = apply_guidance(without_text, with_text, scale)
        noisy_latents = stepper.step(v_prediction, noisy_latents, generator)
        after_step(step_index)
    return noisy_latents
