"""Where the lines and bars of a chart go; `charts.html.j2` draws them as SVG, in the page's own colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

WIDTH, HEIGHT = 480, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 466, 14, 236

NUM_COLOURS = 6
"""Of lines, told apart by eyes that see no red, green or blue as well; further lines are dashed."""

Look = Literal["line", "faint", "dots", "marked"]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int
    """Which of the page's chart colours; from NUM_COLOURS on they begin again, dashed."""
    look: Look = "line"
    """faint: the raw values behind a smoothed line; dots: values that are measured now and then; marked: such values
    joined by a line."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    position: float
    label: str


@dataclass(frozen=True, kw_only=True)
class DrawnSeries:
    label: str
    colour: int
    is_dashed: bool
    look: Look
    path: str
    """SVG path data of the line."""
    dots: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What all charts have, laid out in a box of WIDTH x HEIGHT."""

    description: str
    """For those who do not see it: what goes from where to where."""
    x_label: str
    y_label: str = ""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    top: int = TOP
    bottom: int = BOTTOM


@dataclass(frozen=True, kw_only=True)
class LineChart(Chart):
    series: tuple[DrawnSeries, ...]


@dataclass(frozen=True, kw_only=True)
class Bar:
    x: float
    y: float
    width: float
    height: float
    label: str
    """What it counts, for whoever points at it."""


@dataclass(frozen=True, kw_only=True)
class Histogram(Chart):
    bars: tuple[Bar, ...]


@dataclass(frozen=True, kw_only=True)
class DrawnSpread:
    """One distribution as heights of the box: its ends, one standard deviation about its mean, and the mean."""

    x: float
    lowest: float
    low: float
    middle: float
    high: float
    highest: float
    label: str


@dataclass(frozen=True, kw_only=True)
class SpreadChart(Chart):
    zero: float | None
    """Height of the zero line; None where it lies outside."""
    spreads: tuple[DrawnSpread, ...]


def line_chart(
    series: Sequence[Series],
    *,
    description: str,
    x_label: str,
    y_range: tuple[float, float] | None = None,
) -> LineChart:
    """Lay out lines over a common x.

    Args:
        series: at least one, each with at least one point.
        y_range: what is to be seen; values outside are drawn at the edge. None: all, from zero, so that heights can
            be compared.
    """
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    whole = all(float(x).is_integer() for x in xs)
    x_values = [x for x in nice_ticks(min(xs), max(xs)) if x.is_integer() or not whole]
    y_low, y_high = y_range or (min(0.0, *ys), max(0.0, *ys))
    y_values = nice_ticks(y_low, max(y_high, y_low + 1e-9))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = min(y_values[0], y_low), max(y_values[-1], y_high)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (RIGHT - LEFT)
        up = BOTTOM - (min(max(y, y_low), y_high) - y_low) / (y_high - y_low) * (BOTTOM - TOP)
        return round(across, 1), round(up, 1)

    return LineChart(
        description=description,
        x_label=x_label,
        x_ticks=tuple(Tick(position=place(x, 0)[0], label=_tick_name(x)) for x in x_values if x_low <= x <= x_high),
        y_ticks=tuple(Tick(position=place(x_low, y)[1], label=_tick_name(y)) for y in y_values),
        series=tuple(_draw(one, [place(x, y) for x, y in one.points]) for one in series),
    )


def _draw(series: Series, places: list[tuple[float, float]]) -> DrawnSeries:
    # a line of one point would not be seen
    has_dots = series.look in ("dots", "marked") or len(places) == 1
    return DrawnSeries(
        label=series.label,
        colour=series.colour % NUM_COLOURS,
        is_dashed=series.colour >= NUM_COLOURS,
        look=series.look,
        path="" if series.look == "dots" else "M" + " ".join(f"{x} {y}" for x, y in places),
        dots=tuple(places) if has_dots else (),
    )


def histogram(values: Sequence[float], *, unit: str, x_label: str, y_label: str, most_bins: int = 24) -> Histogram:
    """Count values in bins of equal, round width.

    Args:
        values: at least one; whole numbers get bins of whole numbers.
        unit: of the values, plural.
        y_label: what is counted, plural.
    """
    whole = all(float(value).is_integer() for value in values)
    low, high = min(values), max(values)
    step = max(_nice_step(high - low, most_bins), 1.0 if whole else 0.0)
    first, last = math.floor(low / step + 1e-9), math.floor(high / step + 1e-9)
    counts = [0] * (last - first + 1)
    for value in values:
        counts[math.floor(value / step + 1e-9) - first] += 1
    band = (RIGHT - LEFT) / len(counts)
    y_values = nice_ticks(0.0, max(counts), min(4, max(counts)))

    def height(count: float) -> float:
        return round(BOTTOM - count / y_values[-1] * (BOTTOM - TOP), 1)

    bars = tuple(
        Bar(
            x=round(LEFT + index * band + min(1.0, band / 8), 1),
            y=height(count),
            width=round(band - 2 * min(1.0, band / 8), 1),
            height=round(BOTTOM - height(count), 1),
            label=f"{_bin_name((first + index) * step, step, whole)} {unit}: {count:,}",
        )
        for index, count in enumerate(counts)
    )
    # a bin of one whole number is named at its middle, a wider one at its ends
    single = whole and step == 1
    every = next(many for many in (1, 2, 5, 10) if len(counts) <= 8 * many)
    marks = [mark for mark in range(len(counts) + (not single)) if (first + mark) % every == 0]
    return Histogram(
        description=(
            f"Histogram of {len(values):,} values between {low:g} and {high:g} {unit}; most, {max(counts):,}, at "
            f"{_bin_name((first + counts.index(max(counts))) * step, step, whole)}."
        ),
        x_label=x_label,
        y_label=y_label,
        x_ticks=tuple(
            Tick(
                position=round(LEFT + (mark + (0.5 if single else 0)) * band, 1),
                label=_tick_name((first + mark) * step),
            )
            for mark in marks
        ),
        y_ticks=tuple(Tick(position=height(count), label=f"{count:,.0f}") for count in y_values),
        bars=bars,
    )


def _tick_name(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")


def _bin_name(begin: float, step: float, whole: bool) -> str:
    if not whole:
        return f"{begin:g} to {begin + step:g}"
    return f"{begin:g}" if step == 1 else f"{begin:g} to {begin + step - 1:g}"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One distribution, in the units of its values."""

    mean: float
    std: float
    min: float
    max: float


def spread_chart(spreads: Sequence[Spread], *, name: str, x_label: str) -> SpreadChart:
    """Lay out distributions side by side, numbered from 0.

    Args:
        name: of one of them.
    """
    low, high = min(one.min for one in spreads), max(one.max for one in spreads)
    y_values = nice_ticks(low, high)
    bottom_value, top_value = min(y_values[0], low), max(y_values[-1], high)
    band = (RIGHT - LEFT) / len(spreads)

    def height(value: float) -> float:
        share = (value - bottom_value) / max(top_value - bottom_value, 1e-12)
        return round(BOTTOM - share * (BOTTOM - TOP), 1)

    drawn = tuple(
        DrawnSpread(
            x=round(LEFT + (index + 0.5) * band, 1),
            lowest=height(one.min),
            low=height(max(one.mean - one.std, one.min)),
            middle=height(one.mean),
            high=height(min(one.mean + one.std, one.max)),
            highest=height(one.max),
            label=f"{name} {index}: mean {one.mean:.3g}, std {one.std:.3g}, from {one.min:.3g} to {one.max:.3g}",
        )
        for index, one in enumerate(spreads)
    )
    means = [one.mean for one in spreads]
    every = max(1, -(-len(spreads) // 16))
    return SpreadChart(
        description=(
            f"{len(spreads)} {name}s; means from {min(means):.3g} to {max(means):.3g}, values from {low:.3g} to "
            f"{high:.3g}."
        ),
        x_label=x_label,
        x_ticks=tuple(Tick(position=drawn[i].x, label=str(i)) for i in range(0, len(drawn), every)),
        y_ticks=tuple(Tick(position=height(value), label=_tick_name(value)) for value in y_values),
        zero=height(0.0) if bottom_value <= 0 <= top_value else None,
        spreads=drawn,
    )


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, a step of 1, 2 or 5 times a power of ten apart."""
    step = _nice_step(high - low, most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _nice_step(span: float, most: int) -> float:
    span = max(span, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= most)


def smoothed(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """The mean of each value and up to `window` - 1 before it: it tells nothing of what comes later."""
    totals = [0.0, *accumulate(y for _, y in points)]
    return [
        (x, (totals[i + 1] - totals[max(0, i + 1 - window)]) / min(i + 1, window)) for i, (x, _) in enumerate(points)
    ]


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """As many points as can be told apart: of each stretch the lowest and the highest, so that no spike is lost.

    Args:
        most: points to keep, at least 4; fewer than that are kept as they are.
    """
    if len(points) <= most:
        return list(points)
    num_stretches = (most - 2) // 2  # two points each, and both ends
    stretch = -(-len(points) // num_stretches)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), stretch):
        indices = range(start, min(start + stretch, len(points)))
        kept |= {min(indices, key=lambda i: points[i][1]), max(indices, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]
