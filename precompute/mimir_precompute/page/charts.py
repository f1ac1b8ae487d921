"""Where the lines of a chart go; `charts.html.j2` draws them as SVG, in the page's own colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

WIDTH, HEIGHT = 480, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 466, 14, 236

Look = Literal["line", "faint", "dots"]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int
    """Which of the page's chart colours."""
    look: Look = "line"
    """faint: the raw values behind a smoothed line; dots: values that are measured now and then."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    position: float
    label: str


@dataclass(frozen=True, kw_only=True)
class DrawnSeries:
    label: str
    colour: int
    look: Look
    path: str
    """SVG path data of the line."""
    dots: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """A chart, laid out in a box of WIDTH x HEIGHT."""

    description: str
    """For those who do not see it: what goes from where to where."""
    x_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[DrawnSeries, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    top: int = TOP
    bottom: int = BOTTOM


def line_chart(series: Sequence[Series], *, description: str, x_label: str) -> LineChart:
    """Lay out lines over a common x; y begins at zero, so that heights can be compared."""
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    x_values = nice_ticks(min(xs), max(xs))
    y_values = nice_ticks(0.0, max(max(ys), 1e-9))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_high = max(y_values[-1], max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (RIGHT - LEFT)
        up = BOTTOM - y / y_high * (BOTTOM - TOP)
        return round(across, 1), round(up, 1)

    drawn = []
    for one in series:
        places = [place(x, y) for x, y in one.points]
        path = "" if one.look == "dots" else "M" + " ".join(f"{x} {y}" for x, y in places)
        dots = tuple(places) if one.look == "dots" else ()
        drawn.append(DrawnSeries(label=one.label, colour=one.colour, look=one.look, path=path, dots=dots))
    return LineChart(
        description=description,
        x_label=x_label,
        x_ticks=tuple(Tick(position=place(x, 0)[0], label=f"{x:g}") for x in x_values if x_low <= x <= x_high),
        y_ticks=tuple(Tick(position=place(x_low, y)[1], label=f"{y:.6g}") for y in y_values),
        series=tuple(drawn),
    )


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, a step of 1, 2 or 5 times a power of ten apart."""
    span = max(high - low, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def smoothed(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """The mean of each value and up to `window` - 1 before it: it tells nothing of what comes later."""
    values = [y for _, y in points]
    means = [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]
    return [(x, mean) for (x, _), mean in zip(points, means, strict=True)]
