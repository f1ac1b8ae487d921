"""Latents sampled while training from the cached text of held-out clips: `mimir-train decode` makes them videos.

No encoder and no scheduler of another library: the text lies in the cache, and a deterministic DDIM step is short.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mimir_train.batch import read_batch
from mimir_train.objective import NUM_TRAIN_TIMESTEPS, NoiseSchedule
from mimir_train.sampling.choices import Guidance
from mimir_train.sampling.sampler import denoise, initial_noise, sample_generator
from mimir_train.trained_model import Objective, TrainedModel
from mimir_train.validation.latents import ValidationLatents, validation_folder, write_validation_latents
from mimir_train.validation.loss import ValidationSet

NUM_INFERENCE_STEPS = 20


class DdimStepper:
    """Deterministic DDIM over the schedule of training, with trailing timesteps.

    Source: diffusers' CogVideoXDDIMScheduler at eta 0, to which a test compares it.
    """

    def __init__(self, schedule: NoiseSchedule, num_steps: int) -> None:
        spaced = np.round(np.arange(NUM_TRAIN_TIMESTEPS, 0, -NUM_TRAIN_TIMESTEPS / num_steps)).astype(int) - 1
        self._timesteps = [int(timestep) for timestep in spaced]
        self._schedule = schedule
        self._index = 0

    @property
    def timesteps(self) -> Sequence[int]:
        return self._timesteps

    def step(self, v_prediction: Tensor, noisy_latents: Tensor, generator: torch.Generator) -> Tensor:
        """(B, C, T, h, w) float32 twice to the latents at the next timestep; nothing is drawn."""
        timestep = self._timesteps[self._index]
        following = self._timesteps[self._index + 1] if self._index + 1 < len(self._timesteps) else None
        self._index += 1
        signal, noise_level = self._levels(timestep, noisy_latents)
        latents = signal * noisy_latents - noise_level * v_prediction
        noise = signal * v_prediction + noise_level * noisy_latents
        if following is None:
            return latents
        next_signal, next_noise_level = self._levels(following, noisy_latents)
        return next_signal * latents + next_noise_level * noise

    def _levels(self, timestep: int, like: Tensor) -> tuple[Tensor, Tensor]:
        timesteps = torch.full((len(like),), timestep, device=like.device)
        return self._schedule.levels(timesteps)


@torch.no_grad()
def write_validation_samples(
    run: Path,
    validation: ValidationSet,
    model: TrainedModel,
    objective: Objective,
    *,
    steps_done: int,
    limit: int,
    weights: str,
    is_first: bool,
) -> None:
    """Sample the captions of the first `limit` held-out clips, from the same noise each time; in RUN/validation.

    Args:
        weights: what the model holds: `RAW`, or the profile of an average.

    All ranks go through the model alike, for the parts of a sharded one are fetched by all at once; one writes.
    """
    numbers = sorted(number for group in validation.groups for _, number in group)[:limit]
    guidance = Guidance(name="fixed", scale=1.0)
    device = next(model.dit.parameters()).device
    prompts, tensors = [], []
    for number in numbers:
        (clip,), _, text = read_batch(validation.cache, validation.layout, [number], verify=True)
        generator = sample_generator(objective.seed, clip.caption, 0)
        sizes = validation.layout.latent_sizes[clip.bucket]
        noise = initial_noise((validation.layout.latent_channels, *sizes), generator).to(device)
        append = model.fuser_config.appends_stabilizer(steps_done - 1)
        llm = None if text.llm is None else type(text.llm)(*(tensor.to(device) for tensor in text.llm))
        with objective.autocast(device):
            condition_tokens = model.fuser(text.t5_embeds.to(device), llm, append_stabilizer=append)  # (1, L+K, D)
            stepper = DdimStepper(objective.schedule, NUM_INFERENCE_STEPS)
            latents = denoise(
                model.dit, stepper, noise, condition_tokens, condition_tokens, guidance, generator
            )  # (1, C, T, h, w)
        prompts.append(clip.caption)
        tensors.append(latents[0])
    if not is_first:
        return
    snapshot = validation.cache.snapshot
    write_validation_latents(
        validation_folder(run, steps_done),
        ValidationLatents(
            step=steps_done,
            prompts=tuple(prompts),
            tensors=tuple(tensors),
            fps=snapshot.fps,
            weights=weights,
            latent_scaling_factor=objective.latent_scaling_factor,
            latents_identity=snapshot.features["latents"].identity,
        ),
    )
