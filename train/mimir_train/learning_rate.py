"""Learning rates as pure functions of the step: a run that goes on needs no state for them."""

import math
from typing import Final

from mimir_shared.errors import InputError
from mimir_shared.wording import noun_for
from mimir_train.config import OptimizerConfig, Schedule, TrainConfig

ENDS_WITH_THE_RUN: Final[tuple[Schedule, ...]] = ("cosine", "linear")
"""Schedules of which every step depends on `run.max_train_steps`."""


def rate_factor(config: OptimizerConfig, step: int, max_train_steps: int) -> float:
    """What the learning rates of step `step` (0 is the first) are multiplied by.

    The warm-up rises in equal parts, the first of them above zero. What falls arrives at `final_rate_share` with step
    `max_train_steps`, which is the first that is not trained, and stays there.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    first = decay_start(config, max_train_steps)
    progress = min(max(step - first, 0) / max(max_train_steps - first, 1), 1.0)
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
    return config.final_rate_share + (1.0 - config.final_rate_share) * remaining


def decay_start(config: OptimizerConfig, max_train_steps: int) -> int:
    """The first step of the fall; of no meaning for a constant rate."""
    if config.schedule != "wsd":
        return config.warmup_steps
    steps = max_train_steps // 5 if config.decay_steps is None else config.decay_steps
    return max(max_train_steps - steps, config.warmup_steps)


def describe_rates(config: TrainConfig) -> str:
    """What a person should know of the rates before the run, in one line."""
    optimizer, last = config.optimizer, config.run.max_train_steps
    what = "transformer" if config.model.lora is None else "adapters"
    parts = [f"learning rate {optimizer.learning_rate:g} ({what}), {optimizer.fuser_learning_rate:g} (fuser)"]
    if optimizer.warmup_steps:
        parts.append(f"rising over {optimizer.warmup_steps} {noun_for(optimizer.warmup_steps, 'step')}")
    if optimizer.schedule == "constant":
        return ", ".join([*parts, "constant"])
    if optimizer.schedule == "wsd":
        parts.append(f"constant until step {decay_start(optimizer, last)}")
    shape = "along half a cosine" if optimizer.schedule == "cosine" else "in a line"
    end = f"to {optimizer.final_rate_share:.0%} of it" if optimizer.final_rate_share else "to zero"
    return ", ".join([*parts, f"falling {shape} {end} at step {last}"])


def refuse_other_rates(began_with: TrainConfig, config: TrainConfig, steps_done: int, where: str) -> None:
    """Raise InputError where steps already trained would have had other rates under the settings that go on.

    A constant rate that decays at the end may be trained for longer or shorter than was planned, as long as its decay
    has not begun.
    """
    old, new = began_with.run.max_train_steps, config.run.max_train_steps
    for step in range(steps_done):
        if rate_factor(began_with.optimizer, step, old) != rate_factor(config.optimizer, step, new):
            raise InputError(
                f"{where}: with --max-train-steps {new} in place of {old} the learning rates of step {step} would have "
                f"been others, and {steps_done} steps are trained; go on from a checkpoint at or before step {step}, "
                f"or with --max-train-steps {old}"
            )
