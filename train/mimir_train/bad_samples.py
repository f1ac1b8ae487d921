"""Clips that cannot be read, and those that stand in for them: which, how many, and when it is too many.

What stands in follows from (seed, epoch, place in the order) alone. So of every clip of a batch only one number must
be told among ranks, how many stand-ins were tried; who they were, every rank works out for itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mimir_shared.clip_table import Clip
from mimir_shared.errors import CacheError
from mimir_train.cache_reader import Cache
from mimir_train.order import TrainingOrder

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


def clip_at(cache: Cache, order: TrainingOrder, step: int, position: int, attempt: int) -> Clip:
    """The clip at a position of a step's global batch; `attempt` stand-ins later."""
    whole = order.batch(step, [position])
    place = whole.places[0] if attempt == 0 else order.substitute(step, position, attempt)
    return cache.clip(cache.clip_number(whole.bucket, place))


def find_bad_samples(cache: Cache, order: TrainingOrder, step: int, attempts: Sequence[int]) -> list[BadSample]:
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


@dataclass
class BadSampleCount:
    """Counts over a run, since its process began; the same on every rank."""

    max_share: float
    bad: int = 0
    read: int = 0

    def add(self, found: Sequence[BadSample], global_batch_size: int) -> None:
        """Count a step. Raises CacheError where there are too many, naming the last."""
        self.read += global_batch_size
        self.bad += len(found)
        if found and self.bad > max(ALWAYS_ALLOWED, self.max_share * self.read):
            raise CacheError(
                f"step {found[-1].step}: {self.bad} of {self.read} clips could not be read, the last "
                f"{found[-1].bad}; more than {ALWAYS_ALLOWED} and more than data.max_bad_share, {self.max_share:g}: "
                f"the cache is damaged, see `mimir-precompute verify`"
            )
