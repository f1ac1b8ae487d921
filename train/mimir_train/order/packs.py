"""Which clips share a sequence, and when it is trained on: packs, a pure function of (seed, epoch, number).

What a pack holds, how many clips of which bucket, follows from the number of clips of each bucket and the token budget
alone: largest clips first, then what still fits. So the packs of an epoch can be numbered without looking at a clip,
and pack p holds known stretches of each bucket's sequence (`order.EpochSequence`): found at once, at any step. The
numbering is permuted anew in every epoch, a step is a fixed number of packs in a row, and ranks get packs of a step.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from mimir_shared.errors import InputError
from mimir_shared.wording import noun_for
from mimir_train.order.clip_order import (
    DEFAULT_SHARDS_PER_BLOCK,
    PACKED,
    SCHEME,
    BucketShards,
    ClipPlace,
    EpochSequences,
    GlobalBatch,
    order_key,
    permute,
    rank_positions,
)

PACK_SCHEME: Final = 1
"""Raised when packs change for equal settings: a checkpoint of another scheme cannot go on."""


@dataclass(frozen=True, kw_only=True)
class PackKind:
    """Packs that hold equally many clips of each bucket."""

    clips: tuple[int, ...]
    """Of each bucket."""
    count: int
    """Packs of this kind in an epoch."""

    @property
    def num_clips(self) -> int:
        """Of one such pack."""
        return sum(self.clips)


def plan_packs(num_clips: Sequence[int], tokens: Sequence[int], budget: int) -> tuple[PackKind, ...]:
    """Share all clips out to packs: each takes the largest clips that fit, then those that fit beside them.

    Args:
        num_clips: of each bucket.
        tokens: of a clip of each bucket; none above the budget.
        budget: tokens of a pack at most.
    """
    by_size = sorted(range(len(tokens)), key=lambda bucket: (-tokens[bucket], bucket))
    left = list(num_clips)
    kinds = []
    while any(left):
        taken, space = [0] * len(left), budget
        for bucket in by_size:
            taken[bucket] = min(left[bucket], space // tokens[bucket])
            space -= taken[bucket] * tokens[bucket]
        assert any(taken), f"clips of {tokens} tokens, budget {budget}"
        count = min(left[bucket] // taken[bucket] for bucket in by_size if taken[bucket])
        left = [clips - count * each for clips, each in zip(left, taken, strict=True)]
        kinds.append(PackKind(clips=tuple(taken), count=count))
    return tuple(kinds)


class PackedOrder:
    """Steps of a whole training run, each with its packs; a ClipOrder."""

    def __init__(
        self,
        buckets: Sequence[BucketShards],
        tokens_of: Mapping[str, int],
        *,
        seed: int,
        packs_per_step: int,
        tokens_per_pack: int,
        shards_per_block: int = DEFAULT_SHARDS_PER_BLOCK,
    ) -> None:
        """
        Args:
            tokens_of: bucket → tokens of a clip, its text included.
            packs_per_step: over all ranks.
        Raises: InputError where a clip is larger than a pack, or an epoch has no full step.
        """
        self.is_packed = True
        self.seed = seed
        self.packs_per_step = packs_per_step
        self.tokens_per_pack = tokens_per_pack
        self.shards_per_block = shards_per_block
        self.buckets = tuple(bucket for bucket in buckets if bucket.num_clips)
        self._tokens = [tokens_of[bucket.name] for bucket in self.buckets]
        for bucket, tokens in zip(self.buckets, self._tokens, strict=True):
            if tokens > tokens_per_pack:
                raise InputError(
                    f"--tokens-per-pack {tokens_per_pack}: a clip of {bucket.name} has {tokens} tokens with its text; "
                    f"give at least {max(self._tokens)}"
                )
        self.kinds = plan_packs([bucket.num_clips for bucket in self.buckets], self._tokens, tokens_per_pack)
        self._kind_ends = list(accumulate(kind.count for kind in self.kinds))
        self._stretches = _find_stretches(self.kinds)
        if self.num_packs < packs_per_step:
            clips = sum(bucket.num_clips for bucket in self.buckets)
            raise InputError(
                f"--global-batch-size {packs_per_step}: the {clips} training clips make {self.num_packs} "
                f"{noun_for(self.num_packs, 'pack')} of {tokens_per_pack} tokens, fewer than one step takes; give a "
                f"smaller --global-batch-size or --tokens-per-pack, hold fewer shards out, or encode more clips"
            )
        self._sequences = EpochSequences(self.buckets, seed, shards_per_block)

    @property
    def num_packs(self) -> int:
        """Of an epoch, those included that no step takes."""
        return sum(kind.count for kind in self.kinds)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_packs // self.packs_per_step

    @property
    def fill(self) -> float:
        """Mean share of the token budget that packs use. No token of a pack is there to fill it up."""
        tokens = sum(bucket.num_clips * tokens for bucket, tokens in zip(self.buckets, self._tokens, strict=True))
        return tokens / (self.num_packs * self.tokens_per_pack)

    def left_over(self, epoch: int) -> int:
        """Clips of the packs at the end of an epoch that are too few for a step."""
        packs = self._permuted(epoch, self.steps_per_epoch * self.packs_per_step, self.num_packs)
        return sum(self.kinds[self._kind(pack)].num_clips for pack in packs)

    # --- as a ClipOrder -------------------------------------------------------------------------------------------

    def num_clips(self, step: int) -> int:
        return self.packs_of(step)[-1].stop

    def most_clips(self, world_size: int) -> int:
        return self.packs_per_step // world_size * max(kind.num_clips for kind in self.kinds)

    def parts(self, step: int, rank: int, world_size: int) -> list[range]:
        packs = self.packs_of(step)
        return [packs[number] for number in rank_positions(self.packs_per_step, rank, world_size)]

    def batch(self, step: int, positions: Iterable[int] | None = None) -> GlobalBatch:
        epoch, numbers = self._packs(step)
        packs = self._positions(numbers)
        buckets, places = [], []
        for position in range(packs[-1].stop) if positions is None else positions:
            bucket, number = self._clip(numbers, packs, position)
            buckets.append(self.buckets[bucket].name)
            places.append(self._sequences.of(bucket, epoch).place(number))
        return GlobalBatch(step=step, epoch=epoch, bucket=PACKED, buckets=tuple(buckets), places=tuple(places))

    def substitute(self, step: int, position: int, attempt: int) -> ClipPlace:
        epoch, numbers = self._packs(step)
        bucket, number = self._clip(numbers, self._positions(numbers), position)
        return self._sequences.substitute(bucket, epoch, number, attempt)

    def state(self, next_step: int) -> dict[str, int]:
        return {
            "scheme": SCHEME,
            "pack_scheme": PACK_SCHEME,
            "seed": self.seed,
            "packs_per_step": self.packs_per_step,
            "tokens_per_pack": self.tokens_per_pack,
            "shards_per_block": self.shards_per_block,
            "next_step": next_step,
        }

    def describe(self) -> list[str]:
        clips = sum(bucket.num_clips for bucket in self.buckets)
        sizes = sorted({kind.num_clips for kind in self.kinds})
        held = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
        lines = [
            f"{clips} clips in {len(self.buckets)} {noun_for(len(self.buckets), 'bucket')} make {self.num_packs} packs "
            f"of {held} clips, {self.fill:.1%} of {self.tokens_per_pack} tokens on average and none of them to fill "
            f"up; {self.steps_per_epoch} {noun_for(self.steps_per_epoch, 'step')} of {self.packs_per_step} "
            f"{noun_for(self.packs_per_step, 'pack')} an epoch"
        ]
        left = self.num_packs % self.packs_per_step
        if left:
            lines.append(
                f"left over in every epoch, other ones each time: {left} {noun_for(left, 'pack')}, with "
                f"{self.left_over(0)} clips in the first"
            )
        return lines

    # --- where things are -----------------------------------------------------------------------------------------

    def packs_of(self, step: int) -> list[range]:
        """The packs of a step, each by the positions of its clips."""
        return self._positions(self._packs(step)[1])

    def _packs(self, step: int) -> tuple[int, list[int]]:
        """The epoch of a step, and the numbers of its packs."""
        assert step >= 0, f"step {step}"
        epoch, index = divmod(step, self.steps_per_epoch)
        return epoch, self._permuted(epoch, index * self.packs_per_step, (index + 1) * self.packs_per_step)

    def _permuted(self, epoch: int, start: int, stop: int) -> list[int]:
        key = order_key(self.seed, epoch, "packs")
        return [permute(index, self.num_packs, key) for index in range(start, stop)]

    def _kind(self, pack: int) -> int:
        return bisect_right(self._kind_ends, pack)

    def _positions(self, packs: Sequence[int]) -> list[range]:
        sizes = [self.kinds[self._kind(pack)].num_clips for pack in packs]
        return [range(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)]

    def _clip(self, packs: Sequence[int], positions: Sequence[range], position: int) -> tuple[int, int]:
        """The bucket of a clip, by its position among all, and where it stands in the bucket's sequence."""
        turn = bisect_right(positions, position, key=lambda pack: pack.start) - 1
        offset = position - positions[turn].start
        number = self._kind(packs[turn])
        kind = self.kinds[number]
        of_kind = packs[turn] - (self._kind_ends[number] - kind.count)
        for bucket, clips in enumerate(kind.clips):
            if offset < clips:
                return bucket, self._stretches[number][bucket] + of_kind * clips + offset
            offset -= clips
        raise AssertionError(f"position {position} lies beyond {positions}")


def _find_stretches(kinds: Sequence[PackKind]) -> list[tuple[int, ...]]:
    """Where in the sequence of each bucket the packs of each kind begin to take clips."""
    taken = [[kind.count * clips for clips in kind.clips] for kind in kinds]
    return [
        tuple(sum(column) for column in zip(*taken[:number], strict=True)) or (0,) * len(taken[0])
        for number in range(len(kinds))
    ]
