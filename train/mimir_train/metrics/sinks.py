"""Who gets the figures of a run while it goes: metrics.jsonl, TensorBoard, wandb, and the person who watches."""

import importlib.util
import secrets
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from rich.console import Console

from mimir_shared.errors import InputError, MachineError
from mimir_shared.storage.folder import machine_faults
from mimir_train.config import Reporter, TrainConfig
from mimir_train.config_document import to_document
from mimir_train.json_lines import JsonLines
from mimir_train.metrics.console_line import ConsoleLine
from mimir_train.run_folder import METRICS_NAME, TENSORBOARD_NAME

Figures = Mapping[str, float | int | str]
"""One step's: step, epoch, loss and so on."""

WANDB_ID_NAME: Final = "wandb-id"
"""File of a run with its name at wandb, so that a run that goes on is the same one there."""

_NOT_PLOTTED = ("step", "bucket", "spike_clips")


class Sink(Protocol):
    """Someone who gets every step's figures."""

    def add(self, figures: Figures) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """RUN/tensorboard, read by `tensorboard --logdir RUN`."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step)

    def add(self, figures: Figures) -> None:
        for name, value in _plotted(figures).items():
            self._writer.add_scalar(name, value, figures["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases; with WANDB_MODE=offline in RUN/wandb, for `wandb sync` later."""

    def __init__(self, run: Path, config: TrainConfig) -> None:
        import wandb  # no dependency: who wants it installs it

        try:
            self._run: Any = wandb.init(
                project="mimir",
                name=run.name,
                dir=str(run),
                id=_wandb_id(run),
                resume="allow",
                config=to_document(config),
                settings=wandb.Settings(console="off"),  # what we print is no log of theirs
            )
        except wandb.errors.UsageError as fault:
            raise InputError(
                f"--report-to wandb: {' '.join(str(fault).split())}; or set WANDB_MODE=offline, and `wandb sync` later"
            ) from fault
        except wandb.Error as fault:
            raise MachineError(
                f"--report-to wandb: {' '.join(str(fault).split())}; run it again, or with WANDB_MODE=offline"
            ) from fault

    def add(self, figures: Figures) -> None:
        self._run.log(_plotted(figures), step=int(figures["step"]))

    def close(self) -> None:
        self._run.finish()


def check_reporters(reporters: Collection[Reporter]) -> None:
    """Raise InputError where someone is to get the figures who is not installed here."""
    if "wandb" in reporters and importlib.util.find_spec("wandb") is None:
        raise InputError("--report-to wandb: it is not installed; `pip install 'mimir-t2v[wandb]'`, or leave it out")


@contextmanager
def open_metrics(
    run: Path, config: TrainConfig, console: Console, *, first_step: int, is_first: bool
) -> Iterator[list[Sink]]:
    """Everyone who gets the figures; nobody on ranks but the first."""
    sinks: list[Sink] = []
    try:
        if is_first:
            sinks.append(JsonLines(run / METRICS_NAME, first_step))
            if "tensorboard" in config.run.report_to:
                sinks.append(TensorBoard(run / TENSORBOARD_NAME, first_step))
            if "wandb" in config.run.report_to:
                sinks.append(Wandb(run, config))
            sinks.append(ConsoleLine(console, first_step, config.run.last_step))
        yield sinks
    finally:
        for sink in sinks:
            sink.close()


def _plotted(figures: Figures) -> dict[str, float | int | str]:
    return {name: value for name, value in figures.items() if name not in _NOT_PLOTTED}


def _wandb_id(run: Path) -> str:
    """The run's own, made when it is first reported."""
    path = run / WANDB_ID_NAME
    with machine_faults(f"{path}: reading"):
        if path.is_file():
            return path.read_text(encoding="utf-8").strip()
    made = secrets.token_hex(4)
    with machine_faults(f"{path}: writing"):
        path.write_text(made + "\n", encoding="utf-8")
    return made
