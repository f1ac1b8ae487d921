"""Which worker makes what: read from options, in an order in which nobody waits for himself."""

import itertools

import pytest

from mimir_precompute.team.placement import features_of, parse_placement, share_decoders
from mimir_shared.errors import InputError
from mimir_shared.features import DEPENDENCIES, FEATURES


def test_every_worker_makes_every_feature_unless_placed() -> None:
    placement = parse_placement([], 3, FEATURES)
    assert [features_of(worker, placement) for worker in range(3)] == [FEATURES] * 3


def test_answers_go_where_llm_goes_and_few_come_before_many() -> None:
    placement = parse_placement(["latents=all", "t5=0", "llm=0"], 4, FEATURES)
    assert placement == {"latents": (0, 1, 2, 3), "t5": (0,), "answers": (0,), "llm": (0,)}
    assert features_of(0, placement) == ("t5", "answers", "llm", "latents")
    assert features_of(3, placement) == ("latents",)


def test_one_option_may_name_several_features_and_ranges() -> None:
    placement = parse_placement(["latents=0-2,4,llm=3", "t5=3"], 5, FEATURES)
    assert placement == {"latents": (0, 1, 2, 4), "t5": (3,), "answers": (3,), "llm": (3,)}


def test_a_feature_that_is_not_made_needs_no_place() -> None:
    assert parse_placement(["llm=1"], 2, ("latents", "t5")) == {"latents": (0, 1), "t5": (0, 1)}


def test_in_every_placement_a_worker_makes_what_a_feature_needs_before_it() -> None:
    some = [workers for size in (1, 2, 3) for workers in itertools.combinations(range(3), size)]
    for latents, answers, llm in itertools.product(some, repeat=3):
        placement = {"latents": latents, "t5": (0, 1, 2), "answers": answers, "llm": llm}
        for worker in range(3):
            order = features_of(worker, placement)
            assert sorted(order) == sorted(f for f in FEATURES if worker in placement[f])
            for place, feature in enumerate(order):
                assert all(needed in order[:place] for needed in DEPENDENCIES[feature] if needed in order)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["vae=all"], r"--place 'vae=all': expected FEATURE=WORKERS"),
        (["latents"], r"--place 'latents': expected FEATURE=WORKERS"),
        (["t5=2"], r"--place t5='2': no worker 2; there are workers 0 to 1"),
        (["t5=two"], r"--place t5='two': 'two' is not understood"),
        (["latents=0", "t5=0", "llm=0"], r"worker 1 of 2 has nothing to make; give it a feature, or fewer --workers"),
    ],
)
def test_a_placement_that_cannot_be_is_told(texts: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_placement(texts, 2, FEATURES)


@pytest.mark.parametrize(
    ("total", "cores", "shares"),
    [(None, 64, [2, 2, 2]), (None, 4, [1, 1, 1]), (None, 2, [1, 1, 1]), (8, 2, [3, 3, 2]), (1, 64, [1, 1, 1])],
)
def test_decoders_are_divided_among_workers_that_decode(total: int | None, cores: int, shares: list[int]) -> None:
    placement = parse_placement(["latents=0-2", "llm=3", "t5=3"], 4, FEATURES)
    assert [share_decoders(total, worker, placement, cores) for worker in range(4)] == [*shares, 1]
