"""The validation loss: clips of held-out shards, at fixed timesteps, with the same noise every time."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from mimir_shared.errors import NonFiniteLossError
from mimir_train.batch import FeatureLayout, TrainingBatch, read_batch
from mimir_train.cache_reader import Cache
from mimir_train.objective import NUM_TRAIN_TIMESTEPS, v_loss
from mimir_train.parallel.processes import Parallel
from mimir_train.trained_model import Objective, TrainedModel, add_noise

QUANTILES: Final = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Of the timesteps; CogVideoX reports its losses at these (table 9)."""

_STEP: Final = -1
"""Keys the draws: no training step has this number, so no draw is shared with training."""


@dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """Which clips are judged, fixed for the whole run."""

    cache: Cache
    layout: FeatureLayout
    groups: tuple[tuple[tuple[int, int], ...], ...]
    """Batches of one bucket: (position in the set, index number) of each clip."""

    @property
    def num_clips(self) -> int:
        return sum(len(group) for group in self.groups)


def find_validation_set(
    cache: Cache, layout: FeatureLayout, held_out: tuple[int, ...], *, limit: int, batch_size: int
) -> ValidationSet:
    """Take up to `limit` clips of the held-out shards, first rows first, and batch them by bucket.

    Shards are random samples of the data, so every bucket has about its share among the first rows.
    """
    training = set(range(cache.num_shards)) - set(held_out)
    bucket_of = {n: bucket.name for bucket in cache.buckets(held_out=training) for n in cache.clip_numbers(bucket)}
    judged = sorted(bucket_of)[:limit]
    groups: list[tuple[tuple[int, int], ...]] = []
    position = 0
    for bucket in sorted({bucket_of[number] for number in judged}):
        numbers = [number for number in judged if bucket_of[number] == bucket]
        numbered = [(position + i, number) for i, number in enumerate(numbers)]
        groups += [tuple(numbered[start : start + batch_size]) for start in range(0, len(numbered), batch_size)]
        position += len(numbered)
    return ValidationSet(cache=cache, layout=layout, groups=tuple(groups))


@torch.no_grad()
def validate(
    validation: ValidationSet, model: TrainedModel, objective: Objective, parallel: Parallel, step: int
) -> dict[str, float]:
    """The mean v-loss at each quantile, and their mean. The ranks share the batches, and each goes through the model
    equally often, for the parts of a sharded model are fetched by all at once.

    Args:
        step: that was trained last: decides whether stabilizer tokens are there.
    Raises: NonFiniteLossError.
    """
    sums = [0.0] * len(QUANTILES)
    groups = validation.groups
    for first in range(0, len(groups), parallel.world_size):
        index = first + parallel.rank
        batch = _read(validation, groups[min(index, len(groups) - 1)]).to(parallel.device)
        for i, quantile in enumerate(QUANTILES):
            loss_sum = float(_losses(model, objective, batch, _timestep(quantile), step).sum())
            sums[i] += loss_sum if index < len(groups) else 0.0  # one more only to go along with the others
    totals = [sum(values) for values in zip(*parallel.gather(sums), strict=True)]
    losses = [total / validation.num_clips for total in totals]
    figures = {
        f"validation/loss_t{_timestep(quantile)}": loss for quantile, loss in zip(QUANTILES, losses, strict=True)
    }
    figures["validation/loss"] = sum(losses) / len(losses)
    if not all(torch.isfinite(torch.tensor(losses))):
        raise NonFiniteLossError(f"step {step}: the validation loss is {figures}; lower the learning rates")
    return figures


def _timestep(quantile: float) -> int:
    return int(quantile * NUM_TRAIN_TIMESTEPS)


def _read(validation: ValidationSet, group: tuple[tuple[int, int], ...]) -> TrainingBatch:
    clips, latents, text = read_batch(validation.cache, validation.layout, [number for _, number in group], verify=True)
    return TrainingBatch(
        step=_STEP,
        epoch=0,
        bucket=clips[0].bucket,
        clips=clips,
        positions=tuple(position for position, _ in group),
        step_clips=validation.num_clips,
        latents=latents,
        holds_moments=validation.layout.latents == "vae_moments",
        text=text,
    )


def _losses(model: TrainedModel, objective: Objective, batch: TrainingBatch, timestep: int, step: int) -> Tensor:
    """(B,) at one timestep, the text never dropped."""
    timesteps = torch.full((len(batch.clips),), timestep, device=batch.device)
    noisy_latents, v_target = add_noise(objective, batch, timesteps)
    append_stabilizer = model.fuser_config.appends_stabilizer(step)
    with objective.autocast(batch.device):
        v_prediction = model(noisy_latents, batch.text, timesteps, append_stabilizer=append_stabilizer)
    return v_loss(v_prediction, v_target)
