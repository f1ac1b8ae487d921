"""When ranks that train together have come to a stand: judged from what each last said of itself. No clock in here.

A rank is in one phase at a time. A watched one (a step: forward, backward, exchange) takes its usual time or something
is wrong. Others may take long by design: reading from a slow bucket, saving, validating, compiling in the first step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

PATIENCE: Final = 6.0
"""How many times the timeout a phase may take that may take long."""
SILENCE_S: Final = 10.0
"""A rank that has not spoken for so long may be stopped, and excuses nobody by what it last said."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What is known of a rank."""

    rank: int
    phase: str
    is_watched: bool
    age_s: float
    """How long it has been in this phase."""
    silence_s: float
    """How long it has not been heard of."""

    def describe(self) -> str:
        silent = f", silent for {self.silence_s:.0f} s" if self.silence_s > SILENCE_S else ""
        return f"rank {self.rank} in {self.phase} for {self.age_s:.0f} s{silent}"


def find_hang(standings: Sequence[Standing], timeout_s: float) -> str | None:
    """Why the ranks are held to hang; None while there is hope.

    Ranks wait for the slowest: while one that still speaks is in a phase that may take long, the others may wait
    for it in theirs.
    """
    excused = any(
        not standing.is_watched and standing.silence_s <= SILENCE_S and standing.age_s <= PATIENCE * timeout_s
        for standing in standings
    )
    stuck = [s for s in standings if s.age_s > timeout_s * (1.0 if s.is_watched else PATIENCE)]
    if excused or not stuck:
        return None
    # the silent first: they are likelier the cause than those that wait for them
    worst = sorted(standings, key=lambda s: (-s.silence_s if s.silence_s > SILENCE_S else 0.0, -s.age_s))
    shown = "; ".join(standing.describe() for standing in worst[:4])
    more = f"; and {len(worst) - 4} more" if len(worst) > 4 else ""
    return f"no step was done for {timeout_s:g} s (run.watchdog_s): {shown}{more}"
