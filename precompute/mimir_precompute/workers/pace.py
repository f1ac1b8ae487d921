"""How fast, and how long still: the arithmetic of progress."""

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

RATE_WINDOW_S: Final = 120.0


class RecentRate:
    """Clips a second over the last two minutes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counted: deque[tuple[float, int]] = deque()
        """(when, clips until then), oldest first."""

    def add(self, clips: int) -> None:
        """Tell how many clips there are by now, in all."""
        now_s = self._clock()
        if len(self._counted) >= 2 and now_s - self._counted[-2][0] < 1.0:
            self._counted.pop()  # so that a fast feature is not remembered clip by clip
        self._counted.append((now_s, clips))
        while len(self._counted) > 2 and now_s - self._counted[1][0] >= RATE_WINDOW_S:
            self._counted.popleft()

    def per_s(self) -> float | None:
        """None before there are two counts that differ in time. Falls while nothing is added."""
        if len(self._counted) < 2:
            return None
        begin_s, begin = self._counted[0]
        elapsed_s = self._clock() - begin_s
        return (self._counted[-1][1] - begin) / elapsed_s if elapsed_s > 0 else None


def rate_together(rates: Iterable[float | None]) -> float | None:
    """Clips a second of several workers; None where none of them has been measured."""
    measured = [rate for rate in rates if rate is not None]
    return sum(measured) if measured else None


def time_left_s(clips_left: int, clips_per_s: float | None) -> float | None:
    """Seconds until so many clips are done at this rate; None where it cannot be said."""
    if clips_left <= 0:
        return 0.0
    return clips_left / clips_per_s if clips_per_s else None
