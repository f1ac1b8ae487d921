"""The model that is trained, transformer and fuser as one module, and what one micro-batch costs it."""

from collections.abc import Sequence
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
        self,
        noisy_latents: Tensor | Sequence[Tensor],
        text: TextFeatures,
        timesteps: Tensor,
        *,
        append_stabilizer: bool,
    ) -> Tensor | tuple[Tensor, ...]:
        """Noisy latents (B, C, T, h, w), or a pack of B clips (C, T, h, w), and the text of the B → predicted v."""
        condition_tokens = self.fuser(text.t5_embeds, text.llm, append_stabilizer=append_stabilizer)  # (B, L+K, D)
        v_prediction: Tensor | tuple[Tensor, ...] = self.dit(noisy_latents, condition_tokens, timesteps)
        return v_prediction


@dataclass(frozen=True, kw_only=True)
class Objective:
    """All that the loss of a micro-batch depends on besides batch and weights."""

    schedule: NoiseSchedule
    seed: int
    latent_scaling_factor: float
    text_dropout: float
    empty_text: TextFeatures | None
    """Put in place of dropped text; None: zeros."""
    precision: Precision

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """Compute in bfloat16, where so set, on weights that stay float32."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16")


def draw_latents(objective: Objective, batch: TrainingBatch) -> Tensor:
    """The clean latents of clips of one size, sampled anew at every step where the cache holds moments; float32."""
    stored = batch.latents  # (B, 2C, T, h, w) or (B, C, T, h, w)
    assert isinstance(stored, Tensor), "a pack"
    if batch.holds_moments:
        shape = (stored.shape[1] // 2, *stored.shape[2:])
        noise = keyed_normal("posterior", objective.seed, batch.step, batch.positions, shape, stored.device)
        return sample_latents(stored, objective.latent_scaling_factor, noise)
    return scale_latents(stored, objective.latent_scaling_factor)


def add_noise(objective: Objective, batch: TrainingBatch, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """The noisy latents of clips of one size and what is to be predicted of them: (B, C, T, h, w) float32 each."""
    latents = draw_latents(objective, batch)  # (B, C, T, h, w)
    noise = keyed_normal("noise", objective.seed, batch.step, batch.positions, latents.shape[1:], latents.device)
    schedule = objective.schedule
    return schedule.add_noise(latents, noise, timesteps), schedule.v_target(latents, noise, timesteps)


def clip_losses(model: nn.Module, fuser: FuserConfig, objective: Objective, batch: TrainingBatch) -> Tensor:
    """The v-loss of each clip of a micro-batch or pack: (B,) float32. All draws follow from (seed, step, position).

    Each is a mean over the clip's own values: a clip counts alike however long it is, and a pack has the losses that
    its clips have alone.

    Args:
        model: a TrainedModel, or what wraps it.
    """
    seed, step, positions = objective.seed, batch.step, batch.positions
    timesteps = sample_timesteps(seed, step, positions, batch.step_clips).to(batch.device)  # (B,)
    dropped = sample_text_dropout(seed, step, positions, objective.text_dropout)  # (B,)
    text = drop_text(batch.text, dropped, objective.empty_text)
    parts = batch.of_one_size()
    timesteps_of_parts = timesteps.split([len(part.clips) for part in parts])  # type: ignore[no-untyped-call]
    drawn = [add_noise(objective, part, of_part) for part, of_part in zip(parts, timesteps_of_parts, strict=True)]
    noisy_latents = [noisy[0] for noisy, _ in drawn] if batch.packs else drawn[0][0]
    with objective.autocast(batch.device):
        v_prediction = model(noisy_latents, text, timesteps, append_stabilizer=fuser.appends_stabilizer(step))
    if not batch.packs:
        return v_loss(v_prediction, drawn[0][1])
    return torch.cat([v_loss(of_clip[None], target) for of_clip, (_, target) in zip(v_prediction, drawn, strict=True)])
