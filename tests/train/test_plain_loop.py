"""Our loop against one written by hand with diffusers' model and scheduler: the same data and noise, the same losses.

The plain loop takes from ours only which clips a step sees and the numbers that are drawn (noise, timesteps, dropped
texts). Model, noise schedule, target, loss, gradient, clipping, groups and rates are diffusers' and torch's own.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from mimir_train.cache_reader import Cache, open_cache
from mimir_train.checkpoint.opened import open_checkpoint
from mimir_train.config import TrainConfig
from mimir_train.dataset import Batch
from mimir_train.loop import train
from mimir_train.model.fuser import LlmFeatures, TokenFuser
from mimir_train.objective import keyed_normal, sample_text_dropout, sample_timesteps
from mimir_train.reading.step_reader import ReadOptions
from tests.train.caches import NUM_INSTRUCTIONS, T5_ROWS, losses_of, tiny_config
from tests.train.initial_transformer import write_transformer

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, BATCH, SEED = 50, 8, 42
SCALING, DROPOUT = 0.9, 0.25
RATE, FUSER_RATE, WARMUP, CLIP, DECAY = 1e-3, 3e-3, 5, 0.5, 0.1
Scheduler = CogVideoXDDIMScheduler | CogVideoXDPMScheduler


def run_config(cache: Path, run: Path, transformer: Path, fuser: str, **settings: object) -> TrainConfig:
    return tiny_config(
        cache, run, model__fuser=fuser, model__init_from=str(transformer), model__fit_to_cache=False,
        model__latent_scaling_factor=SCALING, data__global_batch_size=BATCH, data__micro_batch_size=4,
        data__validation_shards=0, run__seed=SEED, objective__text_dropout=DROPOUT,
        **{"run__max_train_steps": STEPS, "run__checkpointing_steps": STEPS, "optimizer__learning_rate": RATE,
           "optimizer__fuser_learning_rate": FUSER_RATE, "optimizer__warmup_steps": WARMUP,
           "optimizer__clip_norm": CLIP, "optimizer__weight_decay": DECAY, **settings},
    )  # fmt: skip


def first_fuser(cache: Path, run: Path, transformer: Path, fuser: str) -> TokenFuser:
    """The fuser as our loop starts with it: after a step of no size."""
    still = {"optimizer__learning_rate": 1e-30, "optimizer__fuser_learning_rate": 1e-30, "run__max_train_steps": 1}
    train(run_config(cache, run, transformer, fuser, **still))
    return open_checkpoint(run, print).load_fuser().train().requires_grad_(True)


class PlainModel(nn.Module):
    """diffusers' transformer behind the text, with a fuser before it or none."""

    def __init__(self, transformer: CogVideoXTransformer3DModel, fuser: TokenFuser | None) -> None:
        super().__init__()
        self.transformer = transformer
        self.fuser = fuser

    def forward(self, noisy_latents: Tensor, t5_embeds: Tensor, llm: LlmFeatures, timesteps: Tensor) -> Tensor:
        condition_tokens = t5_embeds if self.fuser is None else self.fuser(t5_embeds, llm)
        frames_first = noisy_latents.transpose(1, 2)
        out: Tensor = self.transformer(frames_first, condition_tokens, timesteps, return_dict=False)[0]
        return out.transpose(1, 2)


def text_of(batch: Batch, kept: Tensor) -> tuple[Tensor, LlmFeatures]:
    """T5's and the LLM's features, zeros where the text is dropped."""

    def rows(name: str) -> Tensor:
        tensor = batch[name]
        assert isinstance(tensor, Tensor)
        return tensor.float() * kept[:, None, None]

    def mask(name: str) -> Tensor:
        lengths = batch[f"{name}_lengths"]
        assert isinstance(lengths, Tensor)
        return torch.arange(rows(name).shape[1])[None] < lengths[:, None]

    names = ("query_hidden", "answer_hidden_0")
    padded = [tensor for name in names for tensor in (rows(name), mask(name))]
    return rows("t5_embeds"), LlmFeatures(*padded, rows("instruction_hidden_0"))


def parameter_groups(model: PlainModel) -> list[dict[str, Any]]:
    """Matrices of each part with decay, vectors and the stabilizer's offsets without."""
    groups = []
    for part, rate in (("transformer", RATE), ("fuser", FUSER_RATE)):
        named = [(name, p) for name, p in model.named_parameters() if name.startswith(part)]
        for decays in (True, False):
            chosen = [p for name, p in named if decays == (p.ndim > 1 and "offsets" not in name)]
            groups.append({"params": chosen, "lr": rate, "peak": rate, "weight_decay": DECAY if decays else 0.0})
    return [group for group in groups if group["params"]]


def plain_losses(cache: Cache, model: PlainModel, scheduler: Scheduler) -> list[float]:
    """Train as one would by hand; the loss of every step."""
    optimizer = torch.optim.AdamW(parameter_groups(model), betas=(0.9, 0.95), eps=1e-8)
    dataset = cache.dataset(BATCH, SEED, options=ReadOptions(threads=1))
    epochs = (batch for _ in itertools.count() for batch in dataset)
    losses = []
    for step, batch in enumerate(itertools.islice(epochs, STEPS)):
        moments = batch["vae_moments"]
        assert isinstance(moments, Tensor)
        posterior = DiagonalGaussianDistribution(moments.float())
        shape, positions = posterior.mean.shape[1:], range(BATCH)
        drawn = keyed_normal("posterior", SEED, step, positions, shape)
        latents = SCALING * (posterior.mean + posterior.std * drawn)
        noise = keyed_normal("noise", SEED, step, positions, shape)
        timesteps = sample_timesteps(SEED, step, positions, BATCH)
        kept = ~sample_text_dropout(SEED, step, positions, DROPOUT)

        prediction = model(scheduler.add_noise(latents, noise, timesteps), *text_of(batch, kept), timesteps)
        loss = nn.functional.mse_loss(prediction, scheduler.get_velocity(latents, noise, timesteps))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min((step + 1) / (WARMUP + 1), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("fuser", "scheduler_class", "shift"),
    [("baseline", CogVideoXDDIMScheduler, 1.0), ("mimir", CogVideoXDPMScheduler, 3.0)],
)
def test_fifty_steps_have_the_losses_of_a_plain_loop_with_diffusers(
    small_cache: Path, tmp_path: Path, fuser: str, scheduler_class: type, shift: float
) -> None:
    text_tokens = T5_ROWS + (NUM_INSTRUCTIONS if fuser == "mimir" else 0)
    folder = write_transformer(tmp_path / "transformer", text_tokens=text_tokens)
    settings = {"objective__snr_shift_scale": shift}
    start = first_fuser(small_cache, tmp_path / "start", folder, fuser)
    train(run_config(small_cache, tmp_path / "run", folder, fuser, **settings))
    ours = losses_of(tmp_path / "run")

    transformer = CogVideoXTransformer3DModel.from_pretrained(folder, low_cpu_mem_usage=False).train()
    scheduler = scheduler_class(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=shift, beta_start=0.00085,
        beta_end=0.012, beta_schedule="scaled_linear",
    )  # fmt: skip
    model = PlainModel(transformer, None if fuser == "baseline" else start)
    theirs = plain_losses(open_cache(str(small_cache)), model, scheduler)

    assert len(ours) == len(theirs) == STEPS
    assert np.mean(ours[-10:]) < 0.9 * np.mean(ours[:10])  # they have gone somewhere
    assert ours == pytest.approx(theirs, abs=1e-4)
