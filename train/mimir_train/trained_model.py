"""The model that is trained, transformer and fuser as one module, and what one micro-batch costs it."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mimir_train.batch import TrainingBatch
from mimir_train.config import Precision
from mimir_train.model.config import FuserConfig
from mimir_train.model.dit import DiT
from mimir_train.model.fuser import TokenFuser
from mimir_train.objective import (
    NoiseSchedule,
    TextFeatures,
    drop_text,
    keyed_normal,
    sample_latents,
    sample_text_dropout,
    sample_timesteps,
    scale_latents,
    v_loss,
)


class TrainedModel(nn.Module):
    """Text features and noisy latents in, v out: one forward, so that gradients of both parts are averaged at once."""

    def __init__(self, dit: DiT, fuser: TokenFuser) -> None:
        super().__init__()
        self.dit = dit
        self.fuser = fuser

    @property
    def fuser_config(self) -> FuserConfig:
        return self.fuser.config

    def forward(
        self, noisy_latents: Tensor, text: TextFeatures, timesteps: Tensor, *, append_stabilizer: bool
    ) -> Tensor:
        """(B, C, T, h, w) noisy latents and the text of B clips → predicted v, (B, C, T, h, w)."""
        condition_tokens = self.fuser(text.t5_embeds, text.llm, append_stabilizer=append_stabilizer)  # (B, L+K, D)
        v_prediction: Tensor = self.dit(noisy_latents, condition_tokens, timesteps)
        return v_prediction


@dataclass(frozen=True, kw_only=True)
class Objective:
    """All that the loss of a micro-batch depends on besides batch and weights."""

    schedule: NoiseSchedule
    seed: int
    global_batch_size: int
    latent_scaling_factor: float
    text_dropout: float
    empty_text: TextFeatures | None
    """Put in place of dropped text; None: zeros."""
    precision: Precision

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """Compute in bfloat16, where so set, on weights that stay float32."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16")


def draw_latents(objective: Objective, batch: TrainingBatch) -> Tensor:
    """The clean latents of a batch, sampled anew at every step where the cache holds moments; float32."""
    stored = batch.latents  # (B, 2C, T, h, w) or (B, C, T, h, w)
    if batch.holds_moments:
        shape = (stored.shape[1] // 2, *stored.shape[2:])
        noise = keyed_normal("posterior", objective.seed, batch.step, batch.positions, shape, stored.device)
        return sample_latents(stored, objective.latent_scaling_factor, noise)
    return scale_latents(stored, objective.latent_scaling_factor)


def clip_losses(model: nn.Module, fuser: FuserConfig, objective: Objective, batch: TrainingBatch) -> Tensor:
    """The v-loss of each clip of a micro-batch: (B,) float32. All draws follow from (seed, step, position).

    Args:
        model: a TrainedModel, or what `Parallel.wrap` made of it.
    """
    device, seed, step, positions = batch.latents.device, objective.seed, batch.step, batch.positions
    latents = draw_latents(objective, batch)  # (B, C, T, h, w)
    noise = keyed_normal("noise", seed, step, positions, latents.shape[1:], device)
    timesteps = sample_timesteps(seed, step, positions, objective.global_batch_size).to(device)  # (B,)
    dropped = sample_text_dropout(seed, step, positions, objective.text_dropout)  # (B,)
    text = drop_text(batch.text, dropped, objective.empty_text)
    noisy_latents = objective.schedule.add_noise(latents, noise, timesteps)
    with objective.autocast(device):
        v_prediction = model(noisy_latents, text, timesteps, append_stabilizer=fuser.appends_stabilizer(step))
    return v_loss(v_prediction, objective.schedule.v_target(latents, noise, timesteps))
