"""The noise schedules that videos are sampled with: diffusers' own, behind what the sampler asks of one.

The only module of stage two that imports diffusers, and it does so when a scheduler is made.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mimir_shared.errors import InputError
from mimir_train.sampling.choices import SchedulerName
from mimir_train.sampling.sampler import Stepper

DiffusersScheduler = Any
"""CogVideoXDPMScheduler or CogVideoXDDIMScheduler; diffusers has no types."""


def make_scheduler(
    name: SchedulerName, snr_shift_scale: float, num_inference_steps: int, device: torch.device | str = "cpu"
) -> "SchedulerStepper":
    """Set up diffusers' scheduler as CogVideoX is sampled: trailing spacing, v-prediction, zero terminal SNR.

    Raises: InputError for a number of steps that the scheduler cannot do.
    """
    scheduler = build_scheduler(name, snr_shift_scale)
    num_train_timesteps = int(scheduler.config.num_train_timesteps)
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise InputError(f"--num-inference-steps {num_inference_steps}: expected 1 to {num_train_timesteps}")
    scheduler.set_timesteps(num_inference_steps, device=device)
    if len(scheduler.timesteps) != num_inference_steps:
        # rounding in diffusers' set_timesteps; the last of them is -1, which reads the level of pure noise
        raise InputError(
            f"--num-inference-steps {num_inference_steps}: diffusers' scheduler makes {len(scheduler.timesteps)} "
            f"steps of it, the last one wrong; take {num_inference_steps - 1}, or better a divisor of 1000"
        )
    return SchedulerStepper(scheduler, takes_previous=name == "dpm")


def build_scheduler(name: SchedulerName, snr_shift_scale: float) -> DiffusersScheduler:
    """diffusers' scheduler object; `save_pretrained` writes its scheduler_config.json."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

    scheduler_class: Any = CogVideoXDPMScheduler if name == "dpm" else CogVideoXDDIMScheduler
    return scheduler_class(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=snr_shift_scale,
        timestep_spacing="trailing",
    )


class SchedulerStepper(Stepper):
    """diffusers' scheduler for one video; it draws its noise in diffusers' layout, (B, T, C, h, w)."""

    def __init__(self, scheduler: DiffusersScheduler, *, takes_previous: bool) -> None:
        """
        Args:
            takes_previous: DPM-Solver++ (2M): each step reads the latents that the step before predicted.
        """
        self._scheduler = scheduler
        self._takes_previous = takes_previous
        self._timesteps = [int(timestep) for timestep in scheduler.timesteps]
        self._predicted_before: Tensor | None = None
        self._done = 0

    @property
    def timesteps(self) -> Sequence[int]:
        return self._timesteps

    def step(self, v_prediction: Tensor, noisy_latents: Tensor, generator: torch.Generator) -> Tensor:
        """(B, C, T, h, w) float32 twice to the less noisy latents."""
        v_prediction, noisy_latents = v_prediction.transpose(1, 2), noisy_latents.transpose(1, 2)  # (B, T, C, h, w)
        timestep = self._timesteps[self._done]
        if self._takes_previous:
            timestep_before = self._timesteps[self._done - 1] if self._done else None
            less_noisy, self._predicted_before = self._scheduler.step(
                v_prediction,
                self._predicted_before,
                timestep,
                timestep_before,
                noisy_latents,
                generator=generator,
                return_dict=False,
            )
        else:
            less_noisy = self._scheduler.step(v_prediction, timestep, noisy_latents, return_dict=False)[0]
        self._done += 1
        latents: Tensor = less_noisy.transpose(1, 2)
        return latents  # (B, C, T, h, w)
