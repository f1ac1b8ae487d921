"""Which of a clip's cached answers a step reads: one for each (epoch, clip), whatever the world size.

The LLM says something else each time it is asked; a cache made with `--answer-variants K` holds K of its answers, and
the stabilizer tokens are there to learn that they mean the same.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from mimir_train.config import AnswerVariant


@dataclass(frozen=True, kw_only=True)
class VariantChoice:
    """A pure function of (epoch, key of the clip)."""

    policy: AnswerVariant = "fixed"
    """fixed: always the first, which is greedy; cycle: each in turn, epoch by epoch, from a place that the clip's key
    names; random: one drawn anew for every epoch."""
    seed: int = 0
    num_variants: int = 1

    @property
    def is_one(self) -> bool:
        """Whether every clip's is the first in every epoch."""
        return self.policy == "fixed" or self.num_variants == 1

    def of(self, epoch: int, keys: Sequence[str]) -> tuple[int, ...]:
        """The variant of each clip."""
        if self.is_one:
            return (0,) * len(keys)
        if self.policy == "cycle":
            return tuple((epoch + self._draw(f"cycle/{key}")) % self.num_variants for key in keys)
        return tuple(self._draw(f"random/{epoch}/{key}") % self.num_variants for key in keys)

    def _draw(self, text: str) -> int:
        return int.from_bytes(hashlib.blake2b(f"{self.seed}/{text}".encode(), digest_size=8).digest(), "little")
