"""`mimir-train plot`: runs side by side, as PNG and as a page that stands alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mimir_shared.page.charts import LineChart, line_chart
from mimir_shared.page.render import render_page
from mimir_shared.storage.folder import machine_faults
from mimir_shared.wording import describe_duration
from mimir_train.plot.panels import DrawnGroup, Panel, panel_groups, smoothing_window
from mimir_train.plot.pictures import write_pictures
from mimir_train.plot.runs import PlottedRun, differing_settings, read_runs

PAGE_NAME: Final = "plot.html"
_TEMPLATE = Path(__file__).parent / "plot.html.j2"
_X_LABEL = "training step"


@dataclass(frozen=True, kw_only=True)
class PlottedFiles:
    """What `plot_runs` wrote."""

    page: Path
    pictures: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run in the page's table."""

    name: str
    colour: int
    steps_done: int
    time: str
    """Spent in steps."""
    loss: float
    """Mean over the last steps."""
    validation: tuple[float, int] | None
    """The lowest, and after how many steps."""
    samples_per_s: float | None
    mfu: float | None
    data_wait_share: float | None


def plot_runs(paths: Sequence[Path], out: Path, window: int | None = None) -> PlottedFiles:
    """Draw what runs have recorded into a folder, over what was drawn there before.

    Args:
        window: steps that noisy figures are averaged over; None: one in twenty.
    Raises: InputError for a folder that is no run, CacheError for damaged lines, MachineError where it cannot write.
    """
    runs = read_runs(paths)
    window = window or smoothing_window(runs)
    groups = panel_groups(runs, window)
    with machine_faults(f"{out}: writing"):
        out.mkdir(parents=True, exist_ok=True)
    pictures = write_pictures(out, groups, _X_LABEL)
    page = out / PAGE_NAME
    text = build_page(runs, groups, window)
    with machine_faults(f"{page}: writing"):
        temporary = page.with_name(f".{page.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(page)
    return PlottedFiles(page=page, pictures=tuple(pictures))


def build_page(runs: Sequence[PlottedRun], groups: Sequence[DrawnGroup], window: int) -> str:
    """The page as HTML; equal records of equal names give equal pages."""
    values = {
        "rows": [_row(run, number, window) for number, run in enumerate(runs)],
        "settings": differing_settings(runs),
        "groups": [(group, [(panel, _chart(panel)) for panel in group.panels]) for group in groups],
        "window": window,
    }
    return render_page(_TEMPLATE, values)


def _chart(panel: Panel) -> LineChart:
    return line_chart(panel.series(), description=panel.description(), x_label=_X_LABEL, y_range=panel.y_range)


def _row(run: PlottedRun, number: int, window: int) -> RunRow:
    losses = [value for _, value in run.points("loss")][-window:]
    validation = min(((value, int(step)) for step, value in run.points("validation/loss")), default=None)
    waits = [value for _, value in run.points("data_wait_s")]
    return RunRow(
        name=run.name,
        colour=number,
        steps_done=run.steps_done,
        time=describe_duration(run.seconds),
        loss=sum(losses) / len(losses),
        validation=validation,
        samples_per_s=run.median_of("samples_per_s"),
        mfu=run.median_of("mfu"),
        data_wait_share=sum(waits) / run.seconds if run.seconds else None,
    )
