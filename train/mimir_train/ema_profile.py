"""How fast a running average of the weights forgets: profiles, as settings name them. No torch here.

power:SIGMA_REL   its memory is a fixed share of the training so far: an average over about the last SIGMA_REL of
                  it, at any step (Karras et al., EDM2, arXiv 2312.02696 section 3.1)
fixed:DECAY       the weights of each step count DECAY times as much as those of the next; a faster average in the
                  first steps, so that where training began is soon forgotten
"""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from mimir_shared.errors import InputError

ProfileKind = Literal["power", "fixed"]

RAW: Final = "raw"
"""The weights themselves, where an average could be named."""

LARGEST_SIGMA_REL: Final = 12**-0.5
"""Of an exponent of zero, the plain mean of all steps: the widest profile that there is."""
_SMALLEST_SIGMA_REL: Final = 1e-4


@dataclass(frozen=True, kw_only=True)
class EmaProfile:
    """One average that is kept."""

    kind: ProfileKind
    value: float
    """Relative standard deviation of a power profile, or decay of a fixed one."""

    @property
    def name(self) -> str:
        """As it is written in settings, checkpoints and options."""
        return f"{self.kind}:{self.value:g}"

    def kept_share(self, steps_done: int) -> float:
        """How much of the average stays when the weights after `steps_done` (1 or more) come in; the paper's beta.

        Source: power, arXiv 2312.02696 equation 3; fixed, (1 + n) / (10 + n) as a bound while training is young, n
        steps done (TensorFlow's ExponentialMovingAverage).
        """
        assert steps_done >= 1, f"{steps_done}"
        if self.kind == "power":
            return float((1.0 - 1.0 / steps_done) ** (power_exponent(self.value) + 1.0))
        return min(self.value, (1.0 + steps_done) / (10.0 + steps_done))


def parse_profile(text: str) -> EmaProfile:
    """Read "power:0.05" or "fixed:0.9999". Raises InputError."""
    kind, colon, number = text.partition(":")
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    for known in get_args(ProfileKind):
        if colon and kind == known:
            low, high = (_SMALLEST_SIGMA_REL, LARGEST_SIGMA_REL) if known == "power" else (0.0, 1.0)
            if low <= value <= high and value < 1.0:
                return EmaProfile(kind=known, value=value)
            bounds = f"{low:g} to {high:.4f}" if known == "power" else "0 to below 1"
            raise InputError(f"--ema {text}: {known} takes a number from {bounds}")
    raise InputError(
        f"--ema {text}: expected power:SIGMA_REL, for instance power:0.05, or fixed:DECAY, as fixed:0.9999"
    )


def power_exponent(sigma_rel: float) -> float:
    """gamma of the power profile t**gamma whose standard deviation is so large a share of the training.

    Source: sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)), arXiv 2312.02696 section 3.1; it falls with
    gamma, so that bisection finds it.
    """
    low, high = 0.0, 2.0 / sigma_rel
    for _ in range(100):
        middle = (low + high) / 2
        if (middle + 1) ** 0.5 / ((middle + 2) * (middle + 3) ** 0.5) > sigma_rel:
            low = middle
        else:
            high = middle
    return low
