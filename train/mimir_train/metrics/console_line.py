"""What the person who watches a run sees: a live bar on a terminal, elsewhere a line now and then. On stderr."""

import time
from collections.abc import Callable, Mapping
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mimir_shared.wording import describe_duration

LINE_EVERY_S: Final = 10.0
"""Between two lines, where there is no terminal."""
BAR_EVERY_S: Final = 0.5
"""Between two changes of the figures beside the bar: a person reads no faster, and steps may be short."""

Figures = Mapping[str, float | int | str]
"""One step's; see step_figures.py."""


class StepWindow:
    """Means and rates of the steps since it was last emptied, so that a line tells of all of them and not of one."""

    def __init__(self) -> None:
        self._steps: list[Figures] = []

    def add(self, figures: Figures) -> None:
        self._steps.append(figures)

    def clear(self) -> None:
        self._steps.clear()

    def describe(self) -> str:
        """loss 0.1234 · 7.9 samples/s · 2,812 tokens/s · MFU 41 % · data wait 0.2 % · 30.1 GB"""
        seconds = sum(float(step["step_s"]) for step in self._steps)

        def over_time(name: str) -> float:
            return sum(float(step[name]) * float(step["step_s"]) for step in self._steps) / seconds

        loss = sum(float(step["loss"]) for step in self._steps) / len(self._steps)
        samples_per_s = over_time("samples_per_s")
        newest = self._steps[-1]
        parts = [
            f"loss {loss:.4f}",
            f"{samples_per_s:,.0f} samples/s" if samples_per_s >= 100 else f"{samples_per_s:.3g} samples/s",
            f"{over_time('tokens_per_s'):,.0f} tokens/s",
            *([f"MFU {over_time('mfu'):.1%}"] if "mfu" in newest else []),
            f"data wait {over_time('data_wait_share'):.1%}",
            f"{newest['memory_gb']:.1f} GB",
        ]
        return " · ".join(parts)


class ConsoleLine:
    """A sink of figures that speaks to a person."""

    def __init__(
        self, console: Console, first_step: int, last_step: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._first, self._last = first_step, last_step
        self._clock = clock
        self._started_s = clock()
        self._told_s: float | None = None
        self._window = StepWindow()
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=last_step, completed=first_step, figures="")
        self._bar.start()

    def add(self, figures: Figures) -> None:
        done = int(figures["step"]) + 1
        self._window.add(figures)
        now_s = self._clock()
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done)
        # the first step is told at once: it says that the run has begun, and how long a step is
        every_s = BAR_EVERY_S if self._console.is_terminal else LINE_EVERY_S
        if self._told_s is None or now_s - self._told_s >= every_s or done == self._last:
            self._told_s = now_s
            self._tell(done, now_s)
            self._window.clear()
        if "validation/loss" in figures:
            self._console.print(describe_validation(done, figures), soft_wrap=True)

    def _tell(self, done: int, now_s: float) -> None:
        if self._console.is_terminal:
            self._bar.update(self._task, figures=self._window.describe())
            return
        left_s = (self._last - done) * (now_s - self._started_s) / (done - self._first)
        left = f" · {describe_duration(left_s)} left" if done < self._last else ""
        self._console.print(f"step {done}/{self._last} · {self._window.describe()}{left}", soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


def describe_validation(steps_done: int, figures: Figures) -> str:
    """validation after 500 steps: loss 0.1234 (t100 0.21, t300 0.12, …), of the average 0.1200"""
    prefix = "validation/loss_"
    parts = [f"{name.removeprefix(prefix)} {value:.4f}" for name, value in figures.items() if name.startswith(prefix)]
    average = f", of the average {figures['validation/ema_loss']:.4f}" if "validation/ema_loss" in figures else ""
    return f"validation after {steps_done} steps: loss {figures['validation/loss']:.4f} ({', '.join(parts)}){average}"
