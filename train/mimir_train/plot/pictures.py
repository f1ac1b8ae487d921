"""Panels as PNG, one file a group, in the colours of the page."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from mimir_shared.page.charts import NUM_COLOURS
from mimir_shared.page.render import chart_colours
from mimir_shared.storage.folder import machine_faults
from mimir_train.plot.panels import DrawnGroup, Panel

_COLUMNS: Final = 3
_PANEL_INCHES: Final = (4.6, 3.1)
_DPI: Final = 150
_INK, _SOFT, _RULE = "#1c1e21", "#5c6169", "#dcdee2"

Axes = Any
"""matplotlib's; the library has no types."""


def write_pictures(folder: Path, groups: Sequence[DrawnGroup], x_label: str) -> list[Path]:
    """Draw each group to folder/<name>.png; an unfinished one is never seen under its name."""
    return [_write_group(folder / f"{group.name}.png", group, x_label) for group in groups]


def _write_group(path: Path, group: DrawnGroup, x_label: str) -> Path:
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(group.panels))
    rows = math.ceil(len(group.panels) / columns)
    figure: Any = Figure(
        figsize=(columns * _PANEL_INCHES[0], rows * _PANEL_INCHES[1] + 0.5), layout="constrained", facecolor="white"
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # inches
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, panel in zip(grid.flat, group.panels, strict=False):
        _draw_panel(axes, panel, x_label)
    for axes in list(grid.flat)[len(group.panels) :]:
        axes.set_axis_off()
    handles = {line.get_label(): line for axes in grid.flat for line in axes.get_lines() if line.get_gid() == "run"}
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower left", ncols=min(len(handles), 6), frameon=False,
        fontsize=9, labelcolor=_INK,
    )  # fmt: skip
    temporary = path.with_name(f".{path.name}.tmp")
    with machine_faults(f"{path}: writing"):
        figure.savefig(temporary, format="png", dpi=_DPI)
        temporary.replace(path)
    return path


def _draw_panel(axes: Axes, panel: Panel, x_label: str) -> None:
    colours = chart_colours()
    for line in panel.lines:
        colour = colours[line.colour % NUM_COLOURS]
        if line.raw:
            axes.plot(*zip(*line.raw, strict=True), color=colour, linewidth=0.6, alpha=0.35)
        axes.plot(
            *zip(*line.points, strict=True),
            color=colour,
            linewidth=1.7,
            linestyle="--" if line.colour >= NUM_COLOURS else "-",
            marker="o" if (not panel.kind.is_smoothed and len(line.points) <= 60) or len(line.points) == 1 else None,
            markersize=3.5,
            label=_plain(line.run),
            gid="run",
        )
    low, high = panel.y_range
    axes.set_ylim(low, high + 0.05 * (high - low))
    axes.set_title(_plain(panel.kind.title), loc="left", fontsize=10, color=_INK)
    axes.set_xlabel(x_label, fontsize=8, color=_SOFT)
    axes.tick_params(labelsize=8, colors=_SOFT, length=0)
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)


def _plain(text: str) -> str:
    """A text that matplotlib takes as it is: no formula between dollars, and no label hidden for its underscore."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
