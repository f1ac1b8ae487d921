"""Running averages of the weights: what they average, that they come back, and what reads them."""

import pytest
import torch
from torch import nn

from mimir_shared.errors import InputError
from mimir_train.ema_profile import LARGEST_SIGMA_REL, EmaProfile, parse_profile, power_exponent
from mimir_train.weights.ema import EmaWeights


def weights_at(step: int) -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(step))


def average_of(profile: EmaProfile, steps: int) -> torch.Tensor:
    parameter = nn.Parameter(weights_at(0))
    ema = EmaWeights(profile, {"weight": parameter})
    for step in range(1, steps + 1):
        with torch.no_grad():
            parameter.copy_(weights_at(step))
        ema.update(step)
    return ema.tensors()["weight"]


# --- profiles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (LARGEST_SIGMA_REL, 0.0)])
def test_exponents_are_those_of_the_paper(sigma_rel: float, gamma: float) -> None:
    assert power_exponent(sigma_rel) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.1, 0.25])
def test_a_power_profile_weighs_steps_by_a_power_of_their_time(sigma_rel: float) -> None:
    """beta is of continuous time, so the weights of whole steps follow t**gamma once there are some."""
    steps, gamma = 400, power_exponent(sigma_rel)
    profile = EmaProfile(kind="power", value=sigma_rel)
    shares = [1.0 - profile.kept_share(step) for step in range(1, steps + 1)]
    weights, kept = [], 1.0
    for share in reversed(shares):
        weights.append(share * kept)
        kept *= 1.0 - share
    weights.reverse()
    assert kept == 0.0  # nothing is left of the first weights
    time = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    found = torch.tensor(weights, dtype=torch.float64)
    assert float(found.sum()) == pytest.approx(1.0)
    expected = time**gamma / (time**gamma).sum()
    assert float((found - expected).abs().sum()) < 0.03
    mean = float((found * time).sum())
    assert float((found * (time - mean) ** 2).sum()) ** 0.5 == pytest.approx(sigma_rel, rel=0.02)


def test_the_widest_power_profile_is_the_mean_of_all_steps() -> None:
    found = average_of(EmaProfile(kind="power", value=LARGEST_SIGMA_REL), 12)
    mean = torch.stack([weights_at(step) for step in range(1, 13)]).mean(dim=0)
    torch.testing.assert_close(found, mean, rtol=0, atol=1e-6)


def test_a_fixed_profile_warms_up_and_then_forgets_at_its_pace() -> None:
    profile = EmaProfile(kind="fixed", value=0.5)
    assert [profile.kept_share(step) for step in (1, 2, 7, 8, 9)] == pytest.approx([2 / 11, 3 / 12, 8 / 17, 0.5, 0.5])
    expected = weights_at(0)
    for step in range(1, 21):
        share = profile.kept_share(step)
        expected = share * expected + (1 - share) * weights_at(step)
    torch.testing.assert_close(average_of(profile, 20), expected, rtol=0, atol=1e-6)
    assert EmaProfile(kind="fixed", value=0.9999).kept_share(10**6) == 0.9999


@pytest.mark.parametrize("text", ["power:0.05", "power:0.2", "fixed:0.9999", "fixed:0"])
def test_profiles_are_read_and_named_alike(text: str) -> None:
    assert parse_profile(text).name == text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("power", "expected power:SIGMA_REL, for instance power:0.05, or fixed:DECAY"),
        ("karras:0.05", "expected power:SIGMA_REL"),
        ("power:0.3", "power takes a number from 0.0001 to 0.2887"),
        ("power:0", "power takes a number from"),
        ("fixed:1", "fixed takes a number from 0 to below 1"),
        ("fixed:much", "fixed takes a number from"),
    ],
)
def test_a_profile_that_cannot_be_is_refused(text: str, problem: str) -> None:
    with pytest.raises(InputError, match=f"--ema {text}: {problem}"):
        parse_profile(text)


# --- averages -----------------------------------------------------------------------------------------------------


def test_frozen_parameters_have_no_average() -> None:
    trained, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    ema = EmaWeights(EmaProfile(kind="fixed", value=0.9), {"trained": trained, "frozen": frozen})
    assert ema.tensors().keys() == {"trained"}


def test_weights_give_way_to_averages_and_come_back_bit_for_bit() -> None:
    model = nn.Linear(4, 3, bias=False)
    parameter = model.weight
    ema = EmaWeights(EmaProfile(kind="fixed", value=0.9), dict(model.named_parameters()))
    with torch.no_grad():
        parameter.copy_(weights_at(1))
    ema.update(1)
    average = ema.tensors()["weight"].clone()
    with ema.in_place_of_weights(model):
        assert torch.equal(parameter, average)
        assert not torch.equal(parameter, weights_at(1))
    assert torch.equal(parameter, weights_at(1))
    assert torch.equal(ema.tensors()["weight"], average)
