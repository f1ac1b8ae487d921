"""What a run tells while it goes: metrics.jsonl, TensorBoard, wandb, and a line for the person who watches."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mimir_shared.errors import CacheError, InputError
from mimir_shared.storage import machine_faults
from mimir_train.config import Reporter

_LINE_EVERY_S = 10.0
_NOT_PLOTTED = ("step", "epoch", "bucket")

Figures = Mapping[str, float | int | str]
"""One step's: step, epoch, loss and so on."""


class Sink(Protocol):
    """Someone who gets every step's figures."""

    def add(self, figures: Figures) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one object a step. Lines of steps that are trained again are dropped first."""

    def __init__(self, path: Path, first_step: int) -> None:
        with machine_faults(f"{path}: writing"):
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in _read_lines(path) if line["step"] < first_step]
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            temporary.replace(path)
            self._path = path
            self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (open as long as the run)

    def add(self, figures: Figures) -> None:
        with machine_faults(f"{self._path}: writing"):
            self._file.write(json.dumps(figures, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step)

    def add(self, figures: Figures) -> None:
        for name, value in figures.items():
            if name not in _NOT_PLOTTED:
                self._writer.add_scalar(name, value, figures["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    def __init__(self, run: Path) -> None:
        try:
            import wandb  # type: ignore[import-not-found,unused-ignore]  # no dependency: who wants it installs it
        except ImportError as fault:
            raise InputError("--report-to wandb: it is not installed; `pip install wandb`, or leave it out") from fault
        self._run: Any = wandb.init(project="mimir", name=run.name, dir=str(run))

    def add(self, figures: Figures) -> None:
        self._run.log(dict(figures), step=figures["step"])

    def close(self) -> None:
        self._run.finish()


class ProgressLine:
    """A live bar on a terminal, a plain line now and then elsewhere. Writes to stderr."""

    def __init__(self, console: Console, first_step: int, last_step: int) -> None:
        self._console = console
        self._first, self._last = first_step, last_step
        self._started = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=last_step, completed=first_step, figures="")
        self._bar.start()

    def add(self, figures: Figures) -> None:
        done = int(figures["step"]) + 1
        told = f"loss {figures['loss']:.4f} · {figures['samples_per_s']:.1f} samples/s"
        self._bar.update(self._task, completed=done, figures=told)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._last_line >= _LINE_EVERY_S or done == self._last):
            self._last_line = now
            left_s = (self._last - done) * (now - self._started) / max(done - self._first, 1)
            self._console.print(f"step {done}/{self._last} · {told} · {left_s:.0f} s left", soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


@contextmanager
def open_metrics(
    run: Path, reporters: Iterable[Reporter], console: Console, *, first_step: int, last_step: int, is_first: bool
) -> Iterator[list[Sink]]:
    """Everyone who gets the figures; nobody on ranks but the first."""
    sinks: list[Sink] = []
    try:
        if is_first:
            sinks.append(JsonLines(run / "metrics.jsonl", first_step))
            if "tensorboard" in reporters:
                sinks.append(TensorBoard(run / "tensorboard", first_step))
            if "wandb" in reporters:
                sinks.append(Wandb(run))
            sinks.append(ProgressLine(console, first_step, last_step))
        yield sinks
    finally:
        for sink in sinks:
            sink.close()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl; a last line that was cut short by a kill is left out."""
    if not path.exists():
        return []
    texts = path.read_text(encoding="utf-8").splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as fault:
            if number < len(texts):
                raise CacheError(f"{path}: line {number} is no JSON; remove it, or begin anew elsewhere") from fault
    return lines
