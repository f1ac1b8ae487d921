"""Steps whose loss or gradient stands far above those before: recorded with their clips, and trained all the same."""

import statistics
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Final

from mimir_shared.clip_table import Clip
from mimir_train.metrics.step_report import StepReport

WINDOW: Final = 100
"""Steps that a step is compared with: those right before it."""
_FEWEST: Final = 20
"""Steps before which nothing is judged."""
_TIMES_MEDIAN: Final = 2.0
_TIMES_SPREAD: Final = 8.0
"""Of the median absolute deviation, brought to the scale of a standard deviation."""
_SHOWN: Final = 4


class SpikeWatch:
    """Keeps the losses and gradient norms of the last steps."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._before: dict[str, deque[float]] = {"loss": deque(maxlen=WINDOW), "grad_norm": deque(maxlen=WINDOW)}

    def note(
        self, report: StepReport, step: int, find_clips: Callable[[Sequence[int]], Sequence[Clip]]
    ) -> dict[str, float | int | str]:
        """Judge a step, and say so where it is a spike.

        Args:
            find_clips: gives the clips of the global batch, by position, from how many stand-ins each took.
        Returns: for metrics.jsonl: loss_spike and grad_norm_spike, times the median of the steps before, and
            spike_clips, the keys of the clips with the largest losses; {} where nothing stands out.
        """
        figures: dict[str, float | int | str] = {}
        told = []
        for name, value in (("loss", report.loss), ("grad_norm", report.grad_norm)):
            before = self._before[name]
            if is_spike(value, before):
                median = statistics.median(before)
                figures[f"{name}_spike"] = value / median
                told.append(f"{name} {value:.4g} is {value / median:.1f} times the median of {len(before)} steps")
            before.append(value)
        if figures:
            losses = [loss for rank in report.ranks for loss in rank.clip_losses]
            worst = sorted(zip(losses, find_clips(report.attempts), strict=True), key=lambda pair: -pair[0])[:_SHOWN]
            figures["spike_clips"] = ", ".join(clip.key for _, clip in worst)
            shown = ", ".join(f"{loss:.4g} for clip {clip}" for loss, clip in worst)
            self._say(f"step {step}: {' and '.join(told)}; the largest losses: {shown}")
        return figures


def is_spike(value: float, before: Collection[float]) -> bool:
    """Whether a value lies far above those before it, by their median and spread."""
    if len(before) < _FEWEST:
        return False
    median = statistics.median(before)
    spread = 1.4826 * statistics.median(abs(other - median) for other in before)  # of a normal: its deviation
    return value > _TIMES_MEDIAN * median and value > median + _TIMES_SPREAD * spread
