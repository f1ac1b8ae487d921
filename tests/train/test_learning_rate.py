"""Learning rates: what each schedule does at its edges, and when a run may go on with another length."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimir_shared.errors import InputError
from mimir_train.config import OptimizerConfig, Schedule
from mimir_train.learning_rate import describe_rates, rate_factor
from mimir_train.loop import train
from tests.train.caches import losses_of, metrics_of, resumed_config, tiny_config

SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine", "linear", "wsd")


def rates(schedule: Schedule, max_train_steps: int, **settings: float) -> list[float]:
    """The factors of all steps and of the first that is not trained."""
    config = OptimizerConfig(learning_rate=1, fuser_learning_rate=1, schedule=schedule, **settings)  # type: ignore[arg-type]
    return [rate_factor(config, step, max_train_steps) for step in range(max_train_steps + 1)]


def test_a_constant_rate_rises_and_stays() -> None:
    assert rates("constant", 6, warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert rates("constant", 2) == [1.0, 1.0, 1.0]


def test_a_cosine_falls_to_its_floor() -> None:
    found = rates("cosine", 10, warmup_steps=2)
    assert found[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert found[6] == pytest.approx(0.5)
    assert found[10] == pytest.approx(0.0)
    floored = rates("cosine", 10, warmup_steps=2, final_rate_share=0.2)
    assert floored[6] == pytest.approx(0.6)
    assert floored[10] == pytest.approx(0.2)


def test_a_line_falls_evenly() -> None:
    assert rates("linear", 5, warmup_steps=1) == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25, 0.0])
    assert rates("linear", 4, final_rate_share=0.5) == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5])


def test_wsd_is_constant_and_falls_over_its_last_steps() -> None:
    assert rates("wsd", 10, decay_steps=4, warmup_steps=1) == pytest.approx([0.5, *[1.0] * 6, 0.75, 0.5, 0.25, 0.0])
    assert rates("wsd", 20)[15:] == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.25, 0.0])  # a fifth of the steps
    assert rates("wsd", 3, warmup_steps=5) == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6])  # all of it is warm-up


@given(
    schedule=st.sampled_from(SCHEDULES), steps=st.integers(1, 60), warmup=st.integers(0, 70), floor=st.floats(0, 0.9)
)
def test_rates_rise_once_then_fall_and_keep_within_floor_and_peak(
    schedule: Schedule, steps: int, warmup: int, floor: float
) -> None:
    found = rates(schedule, steps, warmup_steps=warmup, final_rate_share=floor)
    rising, falling = found[: warmup + 1], found[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(0 < rate <= 1 for rate in found[:steps])  # no step of the training is wasted
    assert all(rate >= floor for rate in falling)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"schedule": "constant", "warmup_steps": 1}, "rising over 1 step, constant"),
        ({"schedule": "cosine", "warmup_steps": 0, "final_rate_share": 0.1}, "half a cosine to 10% of it at step 20"),
        ({"schedule": "linear", "warmup_steps": 2}, "rising over 2 steps, falling in a line to zero at step 20"),
        ({"schedule": "wsd", "warmup_steps": 0}, "constant until step 16, falling in a line to zero at step 20"),
    ],
)  # fmt: skip
def test_rates_are_told_in_one_line(tmp_path: Path, settings: dict[str, object], told: str) -> None:
    named = {f"optimizer__{name}": value for name, value in settings.items()}
    config = tiny_config(tmp_path, tmp_path / "run", run__max_train_steps=20, **named)
    assert describe_rates(config).startswith("learning rate 0.003 (transformer), 0.003 (fuser), ")
    assert told in describe_rates(config)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"decay_steps": 5}, "--lr-decay-steps 5: only --lr-scheduler wsd takes it, not constant"),
        ({"schedule": "wsd", "decay_steps": 5, "warmup_steps": 6}, "does not fit into --max-train-steps 10"),
        ({"schedule": "wsd", "decay_steps": 0}, "optimizer.decay_steps must be at least 1, got 0"),
        ({"schedule": "cosine", "final_rate_share": 1.0}, "optimizer.final_rate_share must be from 0 to below 1"),
        ({"schedule": "sawtooth"}, "expected one of constant, cosine, linear, wsd"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(tmp_path: Path, settings: dict[str, object], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        tiny_config(tmp_path, tmp_path / "run", **{f"optimizer__{name}": value for name, value in settings.items()})


@pytest.mark.usefixtures("one_thread")
def test_wsd_may_be_trained_for_longer_until_its_decay_has_begun(small_cache: Path, tmp_path: Path) -> None:
    common = {"optimizer__schedule": "wsd", "optimizer__decay_steps": 4, "optimizer__warmup_steps": 1}
    whole = tiny_config(small_cache, tmp_path / "whole", run__max_train_steps=10, **common)
    train(whole)
    part = tiny_config(
        small_cache,
        tmp_path / "part",
        run__max_train_steps=8,
        run__checkpointing_steps=4,
        run__stop_at_step=6,
        **common,
    )
    train(part)
    with pytest.raises(InputError, match="of step 5 would have been others, and 6 steps are trained"):
        train(resumed_config(tmp_path / "part", run__max_train_steps=10), "latest")
    train(resumed_config(tmp_path / "part", "4", run__max_train_steps=10), "4")
    assert losses_of(tmp_path / "part") == losses_of(tmp_path / "whole")
    peak = 3e-3
    assert [line["lr"] / peak for line in metrics_of(tmp_path / "whole")] == pytest.approx(
        [0.5, *[1.0] * 6, 0.75, 0.5, 0.25]
    )


@pytest.mark.usefixtures("one_thread")
def test_a_cosine_may_not_become_another_length(small_cache: Path, tmp_path: Path) -> None:
    train(tiny_config(small_cache, tmp_path / "run", run__max_train_steps=1, optimizer__schedule="cosine"))
    with pytest.raises(InputError, match=r"run\.max_train_steps: 1 → 2"):
        train(resumed_config(tmp_path / "run", run__max_train_steps=2), "latest")
