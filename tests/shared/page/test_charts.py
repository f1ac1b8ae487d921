"""Where the bars and lines of a chart go."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mimir_shared.page import charts
from mimir_shared.page.charts import (
    BOTTOM,
    LEFT,
    NUM_COLOURS,
    RIGHT,
    TOP,
    Series,
    Spread,
    histogram,
    line_chart,
    nice_ticks,
    smoothed,
    spread_chart,
    thinned,
)
from mimir_shared.page.render import chart_colours

REALS = st.floats(-1e6, 1e6, allow_nan=False, width=32)


@given(values=st.lists(st.one_of(st.integers(0, 100_000), REALS), min_size=1, max_size=60))
def test_a_histogram_counts_every_value_once_and_stays_in_its_box(values: list[float]) -> None:
    chart = histogram(values, unit="words", x_label="words", y_label="clips")
    counts = [int(bar.label.rpartition(": ")[2].replace(",", "")) for bar in chart.bars]
    assert sum(counts) == len(values)
    assert len(chart.bars) <= 26
    for bar in chart.bars:
        assert bar.x >= LEFT
        assert bar.x + bar.width <= RIGHT + 0.2
        assert bar.width > 0
        assert bar.y >= TOP
        assert round(bar.y + bar.height, 1) == BOTTOM
    tallest = max(range(len(counts)), key=counts.__getitem__)
    assert chart.bars[tallest].height == max(bar.height for bar in chart.bars)


def test_bins_of_whole_numbers_are_named_by_the_numbers_in_them() -> None:
    few = histogram([3, 3, 5], unit="words", x_label="words", y_label="clips")
    assert [bar.label for bar in few.bars] == ["3 words: 2", "4 words: 0", "5 words: 1"]
    assert [tick.label for tick in few.x_ticks] == ["3", "4", "5"]
    many = histogram([0, 4, 5, 99], unit="tokens", x_label="tokens", y_label="clips")
    assert [many.bars[0].label, many.bars[1].label] == ["0 to 4 tokens: 2", "5 to 9 tokens: 1"]
    assert "between 0 and 99 tokens" in many.description


def test_equal_values_make_one_bar() -> None:
    (bar,) = histogram([7.5] * 4, unit="MB", x_label="MB", y_label="clips").bars
    assert bar.label.endswith(": 4")
    assert bar.y == TOP


def test_spreads_stand_in_order_and_the_zero_line_only_where_zero_is() -> None:
    chart = spread_chart(
        [Spread(mean=0.0, std=1.0, min=-3.0, max=2.0), Spread(mean=1.0, std=9.0, min=0.0, max=2.0)],
        name="channel",
        x_label="channel",
    )
    first, second = chart.spreads
    assert first.lowest > first.low > first.middle > first.high > first.highest
    assert first.middle == chart.zero == second.lowest
    assert second.low == second.lowest, "a bar longer than what there is"
    assert second.label == "channel 1: mean 1, std 9, from 0 to 2"
    far = spread_chart([Spread(mean=-9.0, std=0.1, min=-10.0, max=-8.0)], name="channel", x_label="channel")
    assert far.zero is None
    assert far.y_ticks[0].label == "−10"


def test_shards_have_whole_numbers_below_them() -> None:
    points = [(float(shard), 0.1 * shard) for shard in range(3)]
    chart = line_chart([Series(label="a", points=points, colour=0)], description="d", x_label="shard")
    assert [tick.label for tick in chart.x_ticks] == ["0", "1", "2"]


@given(low=REALS, span=st.floats(0, 1e6))
def test_ticks_enclose_their_range(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    slack = 1e-6 * (abs(low) + span + 1)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack
    assert ticks == sorted(ticks)


# --- lines --------------------------------------------------------------------------------------------------------

POINTS = st.lists(st.tuples(st.integers(0, 10_000), REALS), min_size=1, max_size=40, unique_by=lambda point: point[0])


@given(lines=st.lists(POINTS, min_size=1, max_size=3), y_range=st.one_of(st.none(), st.tuples(REALS, REALS)))
def test_lines_stay_in_their_box(lines: list[list[tuple[int, float]]], y_range: tuple[float, float] | None) -> None:
    series = [Series(label="a", points=sorted(points), colour=0, look="marked") for points in lines]
    seen = None if y_range is None else (min(y_range), max(y_range))
    chart = line_chart(series, description="", x_label="step", y_range=seen)
    for drawn in chart.series:
        assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in drawn.dots)
        assert len(drawn.dots) == len(drawn.path.removeprefix("M").split()) / 2
    assert all(TOP <= tick.position <= BOTTOM for tick in chart.y_ticks)


def test_a_line_of_one_point_is_a_dot_and_lines_past_the_colours_are_dashed() -> None:
    one, seventh = Series(label="a", points=[(3, 1.0)], colour=0), Series(label="b", points=[(3, 1), (4, 2)], colour=6)
    first, last = line_chart([one, seventh], description="", x_label="step").series
    assert len(first.dots) == 1
    assert (last.colour, last.is_dashed, last.dots) == (0, True, ())


@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=300),
    window=st.integers(1, 40),
    most=st.integers(4, 60),
)
@example(values=[-0.5, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 1.0, 0.0], window=1, most=5)
def test_means_look_back_alone_and_thinning_loses_no_extreme(values: list[float], window: int, most: int) -> None:
    points = list(enumerate(values))
    for index, mean in smoothed(points, window):
        expected = values[max(0, int(index) + 1 - window) : int(index) + 1]
        assert math.isclose(mean, sum(expected) / len(expected), abs_tol=1e-6)
    kept = thinned(points, most)
    assert len(kept) <= max(most, 4)
    assert set(kept) <= set(points)
    assert kept == sorted(kept)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert {min(values), max(values)} <= {value for _, value in kept}


MACHADO = {
    "all colours": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no green": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "no blue": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}
"""What is left of linear RGB. Source: Machado, Oliveira and Fernandes 2009, severity 1."""


def lab(colour: str, eyes: str) -> np.ndarray:
    """CIELAB of a colour as such eyes see it."""
    encoded = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(MACHADO[eyes]) @ linear, 0, 1)
    to_xyz = np.array([(0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505)])
    xyz = to_xyz @ seen / (0.9505, 1.0, 1.089)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eyes", MACHADO)
@pytest.mark.parametrize("ground", ["light", "dark"])
def test_colours_of_lines_stay_apart_for_eyes_that_see_fewer(eyes: str, ground: str) -> None:
    style = (Path(charts.__file__).parent / "style.css").read_text()
    colours = re.findall(r"--c\d: (#[0-9a-f]{6})", style)
    assert len(colours) == 2 * NUM_COLOURS
    assert chart_colours() == colours[:NUM_COLOURS]
    chosen = colours[:NUM_COLOURS] if ground == "light" else colours[NUM_COLOURS:]
    distances = [np.linalg.norm(lab(a, eyes) - lab(b, eyes)) for a, b in itertools.combinations(chosen, 2)]
    assert min(distances) > 15  # 2 can just be told apart side by side
