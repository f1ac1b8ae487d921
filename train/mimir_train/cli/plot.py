"""`mimir-train plot`: what is typed, and handed on. Nothing heavy up here."""

from pathlib import Path
from typing import Annotated

import typer

from mimir_shared.command_line import echo


def add_command(app: typer.Typer) -> None:
    app.command()(plot)


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Folders of runs, finished or not.",
                                               show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default: RUN/plots, for several ./plots",
                                             show_default=False)] = None,
    smooth: Annotated[int | None, typer.Option(help="Steps that noisy figures are averaged over; default: one in 20 of "
                                               "the longest run, at most 200", min=1, show_default=False)] = None,
) -> None:  # fmt: skip
    """Compare runs: losses, rates, fuser and throughput, as PNG and as one HTML page."""
    from mimir_train.plot.command import plot_runs

    folder = out if out is not None else (runs[0] / "plots" if len(runs) == 1 else Path("plots"))
    written = plot_runs(runs, folder, smooth)
    echo(f"{written.page}: and {', '.join(path.name for path in written.pictures)} beside it")
