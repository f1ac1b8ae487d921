"""MAIN PATH of stage two: `train` reads a cache, and trains transformer and fuser from it.

Steps are counted from 0. A checkpoint named step-00000020 holds what 20 steps made of the model, steps 0 to 19; the
next to be trained is step 20, and `mimir-train order --start-step 20` says of which clips.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from torch import Tensor, nn

from mimir_shared.device_faults import device_faults
from mimir_train.attention_choice import check_attention
from mimir_train.batch import BatchLoader, TrainingBatch, clips_of_step
from mimir_train.cache_reader import Cache, newer_plan, open_cache
from mimir_train.checkpoint.folder import MODEL, OPTIMIZER, RANDOM, Share, ema_part
from mimir_train.checkpoint.parts import CheckpointPart, ModelPart, OptimizerPart, RandomPart, trained_parameters
from mimir_train.checkpoint.resume import adapters_of, checkpoint_info, initial_of, load_checkpoint, starting_point
from mimir_train.checkpoint.saver import CheckpointSaver, Kept
from mimir_train.config import TrainConfig
from mimir_train.ema_profile import RAW
from mimir_train.fit import FittedRun, describe_fit, fit
from mimir_train.learning_rate import describe_rates, rate_factor
from mimir_train.metrics.sinks import check_reporters, open_metrics
from mimir_train.metrics.spikes import SpikeWatch
from mimir_train.metrics.step_figures import StepMeter, fuser_figures
from mimir_train.metrics.step_report import RankReport, exchange, refuse_non_finite
from mimir_train.objective import NoiseSchedule
from mimir_train.optimizer import build_optimizer, set_rates
from mimir_train.order.answer_variants import VariantChoice
from mimir_train.order.build import build_order, order_settings
from mimir_train.order.clip_order import ClipOrder
from mimir_train.parallel.agreement import refuse_unlike_ranks
from mimir_train.parallel.processes import Parallel, peer_faults, start_parallel
from mimir_train.parallel.sharding import Sharing, average_gradients, clip_gradients
from mimir_train.reading.bad_samples import BadSampleLog
from mimir_train.reading.step_reader import ReadOptions
from mimir_train.run_folder import BAD_SAMPLES_NAME, RunFolder, open_run
from mimir_train.trained_model import Objective, TrainedModel, clip_losses
from mimir_train.validation.loss import ValidationSet, find_validation_set, validate
from mimir_train.validation.samples import write_validation_samples
from mimir_train.weights.build_model import build_model
from mimir_train.weights.ema import EmaWeights

_WITH_LESS_MEMORY: Final = "give a smaller --micro-batch-size, --activation-checkpointing full, or --parallel fsdp"


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """How a run ended."""

    steps_done: int
    """Of the whole training."""
    checkpoint: Path | None
    """Written last; None where there was nothing left to train."""
    steps_trained: int
    """In this call."""
    stopped_by_signal: bool
    is_first: bool
    """Whether this is the rank that speaks."""


def train(config: TrainConfig, resume: str | None = None) -> TrainOutcome:
    """Train until config.run.last_step, or until SIGTERM, and leave a checkpoint.

    Args:
        resume: "latest", the number of a step, or the path of a checkpoint or run; None: begin anew.
    Raises: InputError and CacheError before anything is built; NonFiniteLossError before the optimizer's step;
        MachineError for faults of disk, device and peers.
    """
    of_device = device_faults("training on this rank", for_want_of_memory=_WITH_LESS_MEMORY)
    with of_device, start_parallel(config) as parallel, catch_sigterm() as stop:
        console = Console(stderr=True, highlight=False, quiet=not parallel.is_first)
        say = partial(console.print, markup=False, soft_wrap=True)
        check_reporters(config.run.report_to)
        share = Share(number=parallel.rank, count=parallel.world_size, tell=parallel.gather)
        run = open_run(config, resume, say, share)
        data = config.data
        cache = open_cache(
            data.cache, data.features, snapshot=data.snapshot, local_cache_dir=data.local_cache_dir,
            local_cache_gb=data.local_cache_gb,
        )  # fmt: skip
        fitted = fit(config, cache, initial_of(run, config, verify_base=parallel.is_first))
        refuse_unlike_ranks(parallel, starting_point(run, fitted))
        check_attention(fitted.config.model, parallel.device, config.run.precision)
        order = build_order(
            cache, order_settings(fitted.config), held_out=fitted.held_out, world_size=parallel.world_size,
            micro_batch_size=data.micro_batch_size,
        )  # fmt: skip
        say_what_is_trained(console, fitted, cache, order, goes_on=run.checkpoint is not None)

        trainer = build_trainer(fitted, cache, order, parallel, goes_on=run.checkpoint is not None)
        say(trainer.sharing.describe(parallel.world_size))
        first_step = load_checkpoint(run, checkpoint_parts(trainer), order, fitted)
        last_step = fitted.config.run.last_step
        if parallel.is_first:
            run.write_config(fitted.config)

        steps_done, stopped, spikes = first_step, False, SpikeWatch(say)
        with (
            closing(open_bad_samples(trainer, run, first_step, say)) as bad_samples,
            open_metrics(run.path, fitted.config, console, first_step=first_step, is_first=parallel.is_first) as sinks,
            open_saver(trainer, run) as saver,
        ):
            for batch, data_wait_s in timed(trainer.loader.batches(first_step, last_step)):
                started = time.perf_counter() - data_wait_s
                factor = rate_factor(config.optimizer, batch.step, config.run.max_train_steps)
                rates = set_rates(trainer.optimizer, factor)

                with parallel.watched(f"step {batch.step}"):
                    clip_losses, forward_s = accumulate_gradients(trainer, batch)
                    grad_norm = clip_gradients(trainer.model.parameters(), fitted.config.optimizer.clip_norm)
                    report = exchange(
                        parallel,
                        RankReport(
                            clip_losses=clip_losses,
                            attempts=batch.attempts,
                            grad_norm=grad_norm,
                            stop_requested=stop.requested,
                            load=trainer.meter.load(batch, data_wait_s=data_wait_s, forward_s=forward_s),
                            save_failed=saver.has_failed,
                        ),
                        order.most_clips(parallel.world_size),
                    )
                num_bad = bad_samples.note(batch.step, report.attempts)
                find_clips = partial(clips_of_step, cache, order, batch.step)
                refuse_non_finite(report, batch.step, find_clips)
                trainer.optimizer.step()
                trainer.optimizer.zero_grad(set_to_none=True)

                steps_done = batch.step + 1
                for average in trainer.averages:
                    average.update(steps_done)
                figures = trainer.meter.figures(batch, report, rates, time.perf_counter() - started)
                figures |= {"bad_samples": num_bad} if num_bad else {}
                figures |= spikes.note(report, batch.step, find_clips)
                if batch.step % config.run.fuser_figures_steps == 0:
                    figures |= fuser_figures(trainer.model.fuser, batch, parallel)
                stopped = report.stop_requested  # who sends SIGTERM waits for a checkpoint, not for a judgement
                if trainer.validation and not stopped and is_due(steps_done, config.run.validation_steps, last_step):
                    figures |= judge(trainer, trainer.validation, batch.step)
                    sample_validation(trainer, trainer.validation, run, steps_done)
                for sink in sinks:
                    sink.add(figures)

                if report.save_failed:
                    saver.wait()  # raises, on all ranks at the same step
                if stopped or is_due(steps_done, config.run.checkpointing_steps, last_step):
                    saver.start(steps_done)
                if stopped:
                    break
            checkpoint = saver.wait()
        return TrainOutcome(
            steps_done=steps_done, checkpoint=checkpoint if parallel.is_first else None,
            steps_trained=steps_done - first_step, stopped_by_signal=stopped, is_first=parallel.is_first,
        )  # fmt: skip


@dataclass(kw_only=True)
class Trainer:
    """What the steps of a run work with."""

    fitted: FittedRun
    cache: Cache
    order: ClipOrder
    parallel: Parallel
    model: TrainedModel
    wrapped: nn.Module
    """The model as its gradients are averaged over ranks."""
    sharing: Sharing
    optimizer: torch.optim.Optimizer
    averages: tuple[EmaWeights, ...]
    objective: Objective
    loader: BatchLoader
    validation: ValidationSet | None
    meter: StepMeter


def build_trainer(fitted: FittedRun, cache: Cache, order: ClipOrder, parallel: Parallel, *, goes_on: bool) -> Trainer:
    """Model (with its first weights, unless it goes on), optimizer, objective, reader and validation set."""
    config, layout = fitted.config, fitted.layout
    built = build_model(fitted, parallel, filled_later=goes_on)
    torch.manual_seed(config.run.seed + parallel.rank)  # no step draws from it, but what others put into a model may
    model = built.model
    model.dit.use_attention(config.model.attention)
    assert config.model.latent_scaling_factor is not None, "fit leaves nothing open"
    objective = Objective(
        schedule=NoiseSchedule.cogvideox(config.objective.snr_shift_scale).to(parallel.device),
        seed=config.run.seed,
        latent_scaling_factor=config.model.latent_scaling_factor,
        text_dropout=config.objective.text_dropout,
        empty_text=fitted.empty_text,
        precision=config.run.precision,
    )
    loader = BatchLoader(
        cache,
        order,
        layout,
        rank=parallel.rank,
        world_size=parallel.world_size,
        options=ReadOptions(
            verify=config.data.verify_reads,
            prefetch=config.data.prefetch_batches,
            threads=config.data.reader_threads,
            on_bad_sample=config.data.on_bad_sample,
            borrow=True,  # a step is done with its batch when it asks for the next
        ),
        variants=VariantChoice(
            policy=config.data.answer_variant, seed=config.run.seed, num_variants=layout.num_variants
        ),
        device=parallel.device,
    )
    validation = None
    if fitted.held_out:
        size = config.data.micro_batch_size or config.data.global_batch_size // parallel.world_size
        limit = config.run.validation_clips
        validation = find_validation_set(cache, layout, fitted.held_out, limit=limit, batch_size=size)
    return Trainer(
        fitted=fitted,
        cache=cache,
        order=order,
        parallel=parallel,
        model=model,
        wrapped=built.wrapped,
        sharing=built.sharing,
        optimizer=build_optimizer(config.optimizer, model.dit, model.fuser),
        averages=tuple(EmaWeights(profile, trained_parameters(model)) for profile in config.ema.parsed),
        objective=objective,
        loader=loader,
        validation=validation,
        meter=StepMeter(config, layout, fitted.fuser, parallel),
    )


def open_bad_samples(trainer: Trainer, run: RunFolder, first_step: int, say: Callable[[str], None]) -> BadSampleLog:
    """Where clips that could not be read are written down; the file is there only if others may stand in."""
    data = trainer.fitted.config.data
    writes = trainer.parallel.is_first and data.on_bad_sample == "substitute"
    path = run.path / BAD_SAMPLES_NAME if writes else None
    return BadSampleLog(
        trainer.cache, trainer.order, max_share=data.max_bad_share, path=path, first_step=first_step, say=say
    )


def accumulate_gradients(trainer: Trainer, batch: TrainingBatch) -> tuple[tuple[float, ...], float]:
    """Forward and backward over this rank's clips, a micro-batch at a time.

    Returns: the loss of each clip, and the seconds until the last forward was done. Gradients are of the losses' mean
        over the global batch, once ranks are averaged.
    """
    losses: list[Tensor] = []
    started, forward_s = time.perf_counter(), 0.0
    parts = list(batch.micro_batches(trainer.fitted.config.data.micro_batch_size))
    for part in parts:
        with average_gradients(trainer.wrapped, now=part is parts[-1]), peer_faults():
            clip_loss = clip_losses(
                trainer.wrapped, trainer.model.fuser_config, trainer.objective, part.to(trainer.parallel.device)
            )
            forward_s = time.perf_counter() - started
            # of packs, ranks have more and fewer clips, and all clips of the step count alike
            (clip_loss.sum() / (batch.step_clips / trainer.parallel.world_size)).backward()  # type: ignore[no-untyped-call]
        losses.append(clip_loss.detach())
    return tuple(torch.cat(losses).tolist()), forward_s


def judge(trainer: Trainer, validation: ValidationSet, step: int) -> dict[str, float]:
    """The validation losses of the weights, and of the first average of them where there is one."""
    run_validation = partial(validate, validation, trainer.model, trainer.objective, trainer.parallel, step)
    figures = run_validation()
    average = judged_average(trainer)
    if average is not None:
        with average.in_place_of_weights(trainer.model):
            figures |= {name.replace("/", "/ema_", 1): loss for name, loss in run_validation().items()}
    return figures


def judged_average(trainer: Trainer) -> EmaWeights | None:
    """The average that validation looks at: the first, unless settings or the lack of any say otherwise."""
    return trainer.averages[0] if trainer.averages and trainer.fitted.config.ema.validation else None


def sample_validation(trainer: Trainer, validation: ValidationSet, run: RunFolder, steps_done: int) -> None:
    """Write latents for `mimir-train decode`, where that is asked for; by the average that `sample` would take too."""
    limit = trainer.fitted.config.run.validation_samples
    if not limit:
        return
    average = judged_average(trainer)
    with nullcontext() if average is None else average.in_place_of_weights(trainer.model):
        write_validation_samples(
            run.path, validation, trainer.model, trainer.objective, steps_done=steps_done, limit=limit,
            weights=RAW if average is None else average.profile.name, is_first=trainer.parallel.is_first,
        )  # fmt: skip


def checkpoint_parts(trainer: Trainer) -> dict[str, CheckpointPart]:
    """What of the run goes into its checkpoints; the rest follows from seed, step and settings."""
    averages = {ema_part(index): average for index, average in enumerate(trainer.averages)}
    return {
        **averages,
        MODEL: ModelPart(trainer.model),
        OPTIMIZER: OptimizerPart(trainer.optimizer, trainer.model),
        RANDOM: RandomPart(trainer.parallel.rank, trainer.parallel.device),
    }


def open_saver(trainer: Trainer, run: RunFolder) -> CheckpointSaver:
    settings = trainer.fitted.config.run
    adapters = adapters_of(run, trainer.fitted) if trainer.parallel.is_first else None  # who writes checkpoint.json
    return CheckpointSaver(
        run.path,
        checkpoint_parts(trainer),
        partial(checkpoint_info, trainer.fitted, trainer.cache, trainer.order, adapters),
        trainer.parallel,
        kept=Kept(newest=settings.checkpoints_total_limit, every=settings.checkpoints_keep_every),
        background=settings.checkpoints_in_background,
    )


def is_due(steps_done: int, every: int, last_step: int) -> bool:
    return steps_done % every == 0 or steps_done == last_step


def say_what_is_trained(console: Console, fitted: FittedRun, cache: Cache, order: ClipOrder, *, goes_on: bool) -> None:
    newer = newer_plan(cache)
    notes = [f"note: {newer}"] if newer else []
    fit_lines = describe_fit(fitted, cache, goes_on=goes_on)
    for line in [*notes, *fit_lines, describe_rates(fitted.config), *order.describe()]:
        console.print(line, soft_wrap=True)


def timed(batches: Iterator[TrainingBatch]) -> Iterator[tuple[TrainingBatch, float]]:
    """Each batch with the seconds that were waited for it."""
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - started


@dataclass
class StopRequest:
    """Whether SIGTERM came; a step that has begun is finished."""

    requested: bool = field(default=False)


@contextmanager
def catch_sigterm() -> Iterator[StopRequest]:
    """Take note of SIGTERM in place of dying by it. A second one ends the process as usual."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may install handlers
        return

    def take_note(number: int, frame: object) -> None:
        request.requested = True
        signal.signal(signal.SIGTERM, previous)
        sys.stderr.write("SIGTERM: finishing this step, then saving\n")

    previous = signal.signal(signal.SIGTERM, take_note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, previous)
