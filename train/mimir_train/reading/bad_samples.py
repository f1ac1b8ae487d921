"""Clips that cannot be read, and those that stand in for them: which, how many, and when it is too many.

What stands in follows from (seed, epoch, place in the order) alone. So of every clip of a batch only one number must
be told among ranks, how many stand-ins were tried; who they were, every rank works out for itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mimir_shared.clip_table import Clip
from mimir_shared.errors import CacheError
from mimir_train.cache_reader import Cache
from mimir_train.json_lines import JsonLines
from mimir_train.order.clip_order import ClipOrder

MAX_ATTEMPTS: Final = 100
"""Clips in a row, all of them bad, for one place of a batch: then the cache is no longer there."""

ALWAYS_ALLOWED: Final = 10
"""Bad clips that no share is taken of: the first bad one of a small run is more than any percent."""


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A clip that could not be read, and what was trained on in its place."""

    step: int
    position: int
    """In the global batch."""
    bad: Clip
    substitute: Clip

    def figures(self) -> dict[str, float | int | str]:
        """As bad_samples.jsonl has it."""
        return {
            "step": self.step,
            "position": self.position,
            "key": self.bad.key,
            "shard": self.bad.shard,
            "row": self.bad.row,
            "source": self.bad.source,
            "substitute": self.substitute.key,
        }


def clip_at(cache: Cache, order: ClipOrder, step: int, position: int, attempt: int) -> Clip:
    """The clip at a position of a step's global batch; `attempt` stand-ins later."""
    whole = order.batch(step, [position])
    place = whole.places[0] if attempt == 0 else order.substitute(step, position, attempt)
    return cache.clip(cache.clip_number(whole.buckets[0], place))


def find_bad_samples(cache: Cache, order: ClipOrder, step: int, attempts: Sequence[int]) -> list[BadSample]:
    """The bad clips of a step over all ranks.

    Args:
        attempts: of each position of the global batch, how many stand-ins were tried; mostly zeros.
    """
    return [
        BadSample(
            step=step,
            position=position,
            bad=clip_at(cache, order, step, position, attempt),
            substitute=clip_at(cache, order, step, position, tried),
        )
        for position, tried in enumerate(attempts)
        for attempt in range(tried)
    ]


class BadSampleLog:
    """Finds, counts and writes down the bad clips of a run. Every rank has one and judges alike; the first writes."""

    def __init__(
        self,
        cache: Cache,
        order: ClipOrder,
        *,
        max_share: float,
        path: Path | None = None,
        first_step: int = 0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """
        Args:
            max_share: of all reads of a clip since the process began, stand-ins among them.
            path: of bad_samples.jsonl, one object a bad read; None on ranks that do not write.
            first_step: lines of this step and later ones are dropped, for they are trained again.
            say: told, a line each, of the first clip that is replaced, and at the end how many were.
        """
        self._cache = cache
        self._order = order
        self._max_share = max_share
        self._path = path
        self._say = say
        self._bad_reads = 0
        self._reads = 0
        self._places = 0
        self._replaced = 0
        self._lines = JsonLines(path, first_step) if path is not None else None

    def note(self, step: int, attempts: Sequence[int]) -> int:
        """Write down the bad clips of a step; returns how many. Raises CacheError where there were too many by now."""
        found = find_bad_samples(self._cache, self._order, step, attempts)
        self._bad_reads += len(found)
        self._reads += len(attempts) + len(found)  # each that failed was followed by a stand-in's
        for sample in found:
            if self._lines is not None:
                self._lines.add(sample.figures())
        if found and self._bad_reads > max(ALWAYS_ALLOWED, self._max_share * self._reads):
            raise CacheError(
                f"step {step}: {self._bad_reads} of {self._reads} reads of a clip failed, stand-ins' among them, the "
                f"last of {found[-1].bad}; that is more than {ALWAYS_ALLOWED} and more than data.max_bad_share, "
                f"{self._max_share:g}: the cache is damaged, see `mimir-precompute verify {self._cache.storage.root}`"
            )
        if found and not self._replaced and self._path is not None:
            self._say(f"note: step {step}: {found[0].bad} cannot be read; others stand in for such clips, {self._path}")
        self._places += len(attempts)
        self._replaced += sum(tried > 0 for tried in attempts)
        return len(found)

    def close(self) -> None:
        if self._replaced and self._path is not None:
            self._say(
                f"note: {self._replaced} of {self._places} clips could not be read, and others stood in for them; "
                f"{self._path} lists them"
            )
        if self._lines is not None:
            self._lines.close()
