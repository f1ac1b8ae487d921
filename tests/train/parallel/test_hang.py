"""When ranks are held to hang, and when they only wait for one that may take long."""

from mimir_train.parallel.hang import Standing, find_hang

TIMEOUT_S = 100.0


def standing(rank: int, *, watched: bool, age_s: float, silence_s: float = 0.5) -> Standing:
    phase = "step 7" if watched else "what follows step 6"
    return Standing(rank=rank, phase=phase, is_watched=watched, age_s=age_s, silence_s=silence_s)


def test_a_step_of_usual_length_is_no_hang() -> None:
    assert find_hang([standing(rank, watched=True, age_s=99.0) for rank in range(3)], TIMEOUT_S) is None


def test_a_step_that_takes_too_long_is_one_and_the_silent_rank_is_named_first() -> None:
    reason = find_hang(
        [standing(0, watched=True, age_s=101.0), standing(1, watched=True, age_s=100.5, silence_s=101.0)], TIMEOUT_S
    )
    assert reason == (
        "no step was done for 100 s (run.watchdog_s): rank 1 in step 7 for 100 s, silent for 101 s; "
        "rank 0 in step 7 for 101 s"
    )


def test_ranks_may_wait_for_one_that_reads_or_saves_and_still_speaks() -> None:
    waiting = [standing(0, watched=True, age_s=400.0), standing(2, watched=True, age_s=410.0)]
    assert find_hang([*waiting, standing(1, watched=False, age_s=405.0)], TIMEOUT_S) is None
    assert find_hang([*waiting, standing(1, watched=False, age_s=601.0)], TIMEOUT_S) is not None  # patience ends


def test_a_rank_that_fell_silent_excuses_nobody() -> None:
    waiting = standing(0, watched=True, age_s=101.0)
    stopped = standing(1, watched=False, age_s=101.0, silence_s=101.0)
    assert "rank 1 in what follows step 6" in str(find_hang([waiting, stopped], TIMEOUT_S))


def test_one_process_alone_is_judged_too() -> None:
    assert find_hang([standing(0, watched=False, age_s=500.0)], TIMEOUT_S) is None
    assert find_hang([standing(0, watched=True, age_s=500.0)], TIMEOUT_S) is not None
