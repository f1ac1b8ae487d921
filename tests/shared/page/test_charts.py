"""Where the bars and lines of a chart go."""

from hypothesis import given
from hypothesis import strategies as st

from mimir_shared.page.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Series,
    Spread,
    histogram,
    line_chart,
    nice_ticks,
    spread_chart,
)

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
