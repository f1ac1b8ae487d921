"""Our training loop at tiny size, against the bare model's step, and against diffusers' model bare and in a plain loop.

All four train on clips of the same size and number. In turns, each for some steps, so that all meet the same machine:
    ours        `mimir_train.loop.train` as the program runs it: reading, checksums, draws, clipping, metrics.jsonl,
                tensorboard, console; wall time from step to step
    bare        forward, backward and optimizer step of the same model, on tensors that lie ready
    plain       diffusers' CogVideoXTransformer3DModel in a loop by hand: clips in memory, noise, timesteps, diffusers'
                scheduler, clipping, optimizer; no fuser, as many text tokens
    diffusers   forward, backward and optimizer step of that model, on tensors that lie ready
"""

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
from benchmarks.synthetic_cache import INSTRUCTIONS, TINY, build_cache
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from torch import Tensor, nn

from mimir_train import loop
from mimir_train.batch import BatchLoader, TrainingBatch
from mimir_train.cache_reader import open_cache
from mimir_train.config import TrainConfig
from mimir_train.config_document import nest, overlay, train_config
from mimir_train.fit import FittedRun, fit
from mimir_train.json_lines import read_steps
from mimir_train.model.dit import DiT
from mimir_train.model.fuser import TokenFuser
from mimir_train.optimizer import build_optimizer
from mimir_train.order.clip_order import TrainingOrder
from mimir_train.presets import preset_document
from mimir_train.run_folder import METRICS_NAME
from mimir_train.trained_model import TrainedModel

BATCH: Final = 8
NUM_CLIPS: Final = 256
WARM_STEPS: Final = 8
"""Not timed: memory is not there yet, and the first batch is waited for."""

WAYS: Final = ("ours", "bare", "plain", "diffusers")


def measure_loop(rounds: int, steps: int) -> dict[str, Any]:
    """Seconds a step of each way, in every round; ratios of ours to the others; the data-wait share of ours.

    Wall time is what counts. The processor time of the thread that trains tells the same where other programs want
    the machine too; with one thread of torch, all computing is in it.
    """
    with tempfile.TemporaryDirectory(prefix="mimir-train-step-") as folder:
        root = Path(folder)
        build_cache(root / "cache", NUM_CLIPS, shard_size=64, data_format="webdataset", sizes=TINY)
        config = tiny_config(root, WARM_STEPS + steps)
        cache = open_cache(config.data.cache)
        fitted = fit(config, cache)
        order = TrainingOrder(cache.buckets(), seed=0, global_batch_size=BATCH)
        batches = list(BatchLoader(cache, order, fitted.layout).batches(0, 4))
        step_of = {
            "bare": bare_step(fitted, batches[0]),
            "plain": plain_step(fitted, batches),
            "diffusers": diffusers_step(fitted, batches[0]),
        }
        times: dict[str, list[StepTime]] = {way: [] for way in WAYS}
        for number in range(rounds):
            for way in WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]:
                if way == "ours":
                    time_of = run_ours(tiny_config(root, WARM_STEPS + steps, run=f"run-{number}"))
                else:
                    time_of = time_steps(step_of[way], steps)
                times[way].append(time_of)
    ours = times["ours"]
    return {
        "threads": torch.get_num_threads(),
        "rounds": {way: [asdict(one) for one in of_way] for way, of_way in times.items()},
        "median_s": {way: statistics.median(one.wall_s for one in of_way) for way, of_way in times.items()},
        "median_thread_s": {way: statistics.median(one.thread_s for one in of_way) for way, of_way in times.items()},
        "ours_over": {
            way: {
                "wall": statistics.median(a.wall_s / b.wall_s for a, b in zip(ours, of_way, strict=True)),
                "thread": statistics.median(a.thread_s / b.thread_s for a, b in zip(ours, of_way, strict=True)),
            }
            for way, of_way in times.items()
        },
        "data_wait_share": statistics.median(one.wait_s / one.wall_s for one in ours),
    }


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Means over the steps of one round."""

    wall_s: float
    thread_s: float
    """Processor time of the thread that trains."""
    wait_s: float = 0.0
    """For the batch."""


def tiny_config(root: Path, steps: int, run: str = "run") -> TrainConfig:
    """The preset `tiny` as it is, for so many steps."""
    document = preset_document("tiny")
    for name, value in {
        "data.cache": str(root / "cache"),
        "data.global_batch_size": BATCH,
        "model.latent_scaling_factor": 1.0,
        "run.output_dir": str(root / run),
        "run.device": "cpu",
        "run.max_train_steps": steps,
        "run.checkpointing_steps": 10 * steps,
        "run.validation_steps": 10 * steps,
    }.items():
        document = overlay(document, nest(name, value))
    return train_config(document)


def run_ours(config: TrainConfig) -> StepTime:
    """Our loop, from step to step; validation and checkpoints are not among the steps."""
    asked: list[tuple[float, float]] = []
    timed = loop.timed

    def noted(batches: Iterator[TrainingBatch]) -> Iterator[tuple[TrainingBatch, float]]:
        asked.append((time.perf_counter(), time.thread_time()))
        for batch, wait_s in timed(batches):
            yield batch, wait_s
            asked.append((time.perf_counter(), time.thread_time()))  # a step is done, and the next batch asked for

    with patch.object(loop, "timed", noted), redirect_stderr(io.StringIO()):
        loop.train(config)
    lines = read_steps(Path(config.run.output_dir) / METRICS_NAME)[WARM_STEPS:]
    begin, end = asked[WARM_STEPS], asked[-2]  # behind the last step there is a checkpoint
    steps = len(asked) - 2 - WARM_STEPS
    return StepTime(
        wall_s=(end[0] - begin[0]) / steps,
        thread_s=(end[1] - begin[1]) / steps,
        wait_s=sum(line["data_wait_s"] for line in lines[:steps]) / steps,
    )


def time_steps(step: Callable[[], None], steps: int) -> StepTime:
    for _ in range(WARM_STEPS):
        step()
    started = time.perf_counter(), time.thread_time()
    for _ in range(steps):
        step()
    wall_s, thread_s = time.perf_counter() - started[0], time.thread_time() - started[1]
    return StepTime(wall_s=wall_s / steps, thread_s=thread_s / steps)


def bare_step(fitted: FittedRun, batch: TrainingBatch) -> Callable[[], None]:
    """Of our model, with our optimizer."""
    torch.manual_seed(0)
    model = TrainedModel(DiT(fitted.initial.config), TokenFuser(fitted.fuser))
    optimizer = build_optimizer(fitted.config.optimizer, model.dit, model.fuser)
    noisy_latents = _moments(batch)[0].contiguous()
    target, timesteps = torch.randn_like(noisy_latents), torch.randint(0, 1000, (BATCH,))

    def step() -> None:
        v_prediction = model(noisy_latents, batch.text, timesteps, append_stabilizer=True)
        _learn((v_prediction.float() - target).square().mean(), optimizer)

    return step


def diffusers_step(fitted: FittedRun, batch: TrainingBatch) -> Callable[[], None]:
    """Of diffusers' model, with torch's AdamW as ours is set up."""
    model, tokens = diffusers_model(fitted), _text_tokens(batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    noisy_latents = _moments(batch)[0].transpose(1, 2).contiguous()  # (B, T, C, h, w)
    target, timesteps = torch.randn_like(noisy_latents), torch.randint(0, 1000, (BATCH,))

    def step() -> None:
        v_prediction = model(noisy_latents, tokens, timesteps, return_dict=False)[0]
        _learn((v_prediction.float() - target).square().mean(), optimizer)

    return step


def plain_step(fitted: FittedRun, batches: list[TrainingBatch]) -> Callable[[], None]:
    """A loop as one writes it by hand: its clips lie in memory, and nothing is recorded."""
    model = diffusers_model(fitted)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    scheduler: Any = CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, snr_shift_scale=3.0,
    )  # fmt: skip
    numbers = iter(range(10**9))

    def step() -> None:
        batch = batches[next(numbers) % len(batches)]
        mean, log_variance = _moments(batch)
        latents = (mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)).transpose(1, 2)  # (B, T, C, h, w)
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (BATCH,))
        kept = torch.rand(BATCH) >= 0.1
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        v_prediction = model(noisy_latents, _text_tokens(batch) * kept[:, None, None], timesteps, return_dict=False)[0]
        loss = (v_prediction - scheduler.get_velocity(latents, noise, timesteps)).square().mean()
        _learn(loss, optimizer, list(model.parameters()))

    return step


def diffusers_model(fitted: FittedRun) -> nn.Module:
    """diffusers' transformer of the same sizes, for T5's tokens and four more."""
    sizes: dict[str, Any] = asdict(fitted.initial.config)
    sizes["max_text_seq_length"] = fitted.layout.t5_rows + INSTRUCTIONS
    model: nn.Module = CogVideoXTransformer3DModel(**sizes)
    return model


def _learn(loss: Tensor, optimizer: torch.optim.Optimizer, clipped: list[nn.Parameter] | None = None) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    if clipped is not None:
        torch.nn.utils.clip_grad_norm_(clipped, 1.0)
        loss.item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _moments(batch: TrainingBatch) -> tuple[Tensor, Tensor]:
    """Mean and log-variance: (B, C, T, h, w) float32 twice."""
    assert isinstance(batch.latents, Tensor), "of one bucket"
    mean, log_variance = batch.latents.float().chunk(2, dim=1)
    return mean, log_variance


def _text_tokens(batch: TrainingBatch) -> Tensor:
    """T5's rows and as many more as the stabilizer has: (B, L+K, D)."""
    return nn.functional.pad(batch.text.t5_embeds.float(), (0, 0, 0, INSTRUCTIONS))
