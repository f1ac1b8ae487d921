"""Which clip is trained on when: a pure function of (seed, epoch, number), with nothing to keep and nothing to load.

Shards are put in an order by a keyed permutation and cut into blocks; within a block all clips are permuted together.
So a clip is found at any position without a list of all, and consecutive clips come from few shards. Every bucket has
such a sequence of its own. Global batches are cut from the sequences, numbered over all buckets, and that numbering is
permuted too. World size, threads and interruptions are no part of it: ranks get slices of a global batch.

No stream of random numbers is used, ours or a library's: no library promises its streams across releases.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Final, NamedTuple, Protocol, TypeVar

import numpy as np

from mimir_shared.errors import InputError
from mimir_shared.wording import counted

SCHEME: Final = 1
"""Raised when the order changes for equal settings: a checkpoint of another scheme cannot go on."""

DEFAULT_SHARDS_PER_BLOCK: Final = 32

PACKED: Final = "packed"
"""What stands for the bucket of clips of several."""

_ROUNDS: Final = 6
_MASK_64: Final = (1 << 64) - 1


def order_key(*fields: int | str) -> int:
    """Hash the fields to 64 bits; unequal fields give unrelated bits."""
    text = ":".join(["mimir-order", str(SCHEME), *map(str, fields)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def splitmix64(value: int) -> int:
    """Scramble 64 bits. Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


@lru_cache(maxsize=1024)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(splitmix64((key + number) & _MASK_64) for number in range(_ROUNDS))


def permute(index: int, size: int, key: int) -> int:
    """Where a keyed permutation of 0 … size-1 puts `index`.

    A balanced Feistel network over the next power of four, walked along its cycle until it is back below `size`:
    a bijection for every key and size.
    """
    assert 0 <= index < size, f"{index} of {size}"
    half_bits, round_keys = _half_bits(size), _round_keys(key)
    index = _feistel(index, half_bits, round_keys)
    while index >= size:
        index = _feistel(index, half_bits, round_keys)
    return index


def permutation(size: int, key: int) -> np.ndarray:
    """`permute` of every index at once: (size,) uint64."""
    half_bits, round_keys = _half_bits(size), _round_keys(key)
    places = _feistel(np.arange(size, dtype=np.uint64), half_bits, round_keys)
    while len(outside := np.flatnonzero(places >= size)):
        places[outside] = _feistel(places[outside], half_bits, round_keys)
    return places


def _half_bits(size: int) -> int:
    return max(1, ((size - 1).bit_length() + 1) // 2)


_Integers = TypeVar("_Integers", int, np.ndarray)


def _feistel(index: _Integers, half_bits: int, round_keys: tuple[int, ...]) -> _Integers:
    """One pass of the network: of an integer, or of each of an array's (uint64, which wraps as the masks do)."""
    half_mask = (1 << half_bits) - 1
    left, right = index >> half_bits, index & half_mask
    for round_key in round_keys:
        # splitmix64(right ^ round_key), written out: calls would be half of what it costs to find a clip
        value = ((right ^ round_key) + 0x9E3779B97F4A7C15) & _MASK_64
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
        left, right = right, left ^ ((value ^ (value >> 31)) & half_mask)
    return left << half_bits | right


@dataclass(frozen=True, kw_only=True)
class BucketShards:
    """The clips of one bucket that are trained on: how many lie in which shard."""

    name: str
    shards: tuple[int, ...]
    """Numbers of the shards that hold clips of this bucket, rising."""
    sizes: tuple[int, ...]
    """How many each holds; none is zero."""

    @property
    def num_clips(self) -> int:
        return sum(self.sizes)


class ClipPlace(NamedTuple):
    """One clip, by its place among the clips of its bucket in one shard."""

    shard: int
    number: int


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """The clips of one step over all ranks, in the order that decides who gets which."""

    step: int
    """0 is the first of a run."""
    epoch: int
    bucket: str
    """That of all clips; PACKED where they are of several."""
    buckets: tuple[str, ...]
    """Of each clip."""
    places: tuple[ClipPlace, ...]


class ClipOrder(Protocol):
    """Steps of a whole training run: what reads, trains and reports asks of any order."""

    seed: int
    buckets: tuple[BucketShards, ...]
    is_packed: bool
    """Whether a step's clips are of several buckets, in packs."""

    @property
    def steps_per_epoch(self) -> int: ...

    def num_clips(self, step: int) -> int:
        """Of a step over all ranks."""
        ...

    def most_clips(self, world_size: int) -> int:
        """Of one rank in any step, at most."""
        ...

    def parts(self, step: int, rank: int, world_size: int) -> list[range]:
        """Positions in the global batch of what a rank trains on: its packs, or one range of clips of one bucket."""
        ...

    def batch(self, step: int, positions: Iterable[int] | None = None) -> GlobalBatch:
        """The clips of a step over all ranks, or those at some positions; every step costs the same."""
        ...

    def substitute(self, step: int, position: int, attempt: int) -> ClipPlace:
        """The clip that stands in for one that cannot be read: of the same bucket, for any number of ranks.

        Args:
            position: of the clip in the global batch.
            attempt: 1 for the first that stands in, 2 for the one in place of that one, and so on.
        """
        ...

    def state(self, next_step: int) -> dict[str, int]:
        """All that must be kept to go on: scalars. Batches are counted when they were trained on, not when read."""
        ...

    def describe(self) -> list[str]:
        """What a person should know of the order before it is trained: one line each."""
        ...


class EpochSequence:
    """One bucket's clips in the order of one epoch: a table over shards, and of blocks that are met one over clips."""

    def __init__(self, bucket: BucketShards, seed: int, epoch: int, shards_per_block: int) -> None:
        num_shards = len(bucket.shards)
        positions: list[int] = permutation(num_shards, order_key(seed, epoch, "shards", bucket.name)).tolist()
        self._bucket = bucket
        self._fields = (seed, epoch, "block", bucket.name)
        self._blocks = [positions[start : start + shards_per_block] for start in range(0, num_shards, shards_per_block)]
        self._ends = list(accumulate(sum(bucket.sizes[shard] for shard in block) for block in self._blocks))
        self._entered: dict[int, tuple[np.ndarray, list[int]]] = {}

    def place(self, number: int) -> ClipPlace:
        """The clip that stands at `number` of this epoch."""
        block = bisect_right(self._ends, number)
        start = self._ends[block - 1] if block else 0
        order, ends = self._enter(block)
        within = order.item(number - start)
        turn = bisect_right(ends, within)
        shard = self._bucket.shards[self._blocks[block][turn]]
        return ClipPlace(shard=shard, number=within - (ends[turn - 1] if turn else 0))

    def _enter(self, block: int) -> tuple[np.ndarray, list[int]]:
        """The order of a block's clips, and where each of its shards ends: made once for the blocks that are in use."""
        if block not in self._entered:
            ends = list(accumulate(self._bucket.sizes[position] for position in self._blocks[block]))
            order = permutation(ends[-1], order_key(*self._fields, block))
            self._entered[block] = (order.astype(np.min_scalar_type(ends[-1])), ends)
        return self._entered[block]


class EpochSequences:
    """The sequences of all buckets, for the epochs that are in use."""

    def __init__(self, buckets: Sequence[BucketShards], seed: int, shards_per_block: int) -> None:
        self._buckets = tuple(buckets)
        self._seed = seed
        self._shards_per_block = shards_per_block
        self._made: dict[tuple[int, int], EpochSequence] = {}

    def of(self, bucket: int, epoch: int) -> EpochSequence:
        """That of a bucket, named by its position."""
        if (bucket, epoch) not in self._made:
            # the reader looks a few batches ahead, so two epochs are in use where one ends
            self._made = {key: kept for key, kept in self._made.items() if abs(key[1] - epoch) <= 1}
            self._made[bucket, epoch] = EpochSequence(self._buckets[bucket], self._seed, epoch, self._shards_per_block)
        return self._made[bucket, epoch]

    def substitute(self, bucket: int, epoch: int, number: int, attempt: int) -> ClipPlace:
        """The clip that stands in for the one at `number` of a sequence; see ClipOrder.substitute."""
        shards = self._buckets[bucket]
        key = order_key(self._seed, epoch, "substitute", shards.name, number, attempt)
        return self.of(bucket, epoch).place(key % shards.num_clips)


class TrainingOrder:
    """Steps of a whole training run, each with its global batch of one bucket: a ClipOrder."""

    def __init__(
        self,
        buckets: Sequence[BucketShards],
        *,
        seed: int,
        global_batch_size: int,
        shards_per_block: int = DEFAULT_SHARDS_PER_BLOCK,
    ) -> None:
        """Raises: InputError where no bucket has clips enough for one batch."""
        if global_batch_size < 1:
            raise InputError(f"the global batch size must be at least 1, got {global_batch_size}")
        if shards_per_block < 1:
            raise InputError(f"data.shards_per_block must be at least 1, got {shards_per_block}")
        self.is_packed = False
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.shards_per_block = shards_per_block
        self.buckets = tuple(bucket for bucket in buckets if bucket.num_clips >= global_batch_size)
        self.left_out = tuple(bucket for bucket in buckets if 0 < bucket.num_clips < global_batch_size)
        """Buckets with fewer clips than a batch: no clip of theirs is ever trained on."""
        if not self.buckets:
            sizes = ", ".join(f"{bucket.name} has {bucket.num_clips}" for bucket in self.left_out) or "there are none"
            largest = max((bucket.num_clips for bucket in self.left_out), default=0)
            raise InputError(
                f"--global-batch-size {global_batch_size} is larger than every bucket of training clips ({sizes}); "
                f"a batch is of one bucket: give at most {largest}, hold fewer shards out, or encode more clips"
            )
        self._batch_ends = list(accumulate(bucket.num_clips // global_batch_size for bucket in self.buckets))
        self._sequences = EpochSequences(self.buckets, seed, shards_per_block)
        self._batch_orders: dict[int, np.ndarray] = {}

    @property
    def steps_per_epoch(self) -> int:
        return self._batch_ends[-1]

    @property
    def dropped(self) -> dict[str, int]:
        """bucket → clips left over by its last full batch; other ones in every epoch."""
        return {bucket.name: bucket.num_clips % self.global_batch_size for bucket in self.buckets}

    def num_clips(self, step: int) -> int:
        return self.global_batch_size

    def most_clips(self, world_size: int) -> int:
        return self.global_batch_size // world_size

    def parts(self, step: int, rank: int, world_size: int) -> list[range]:
        return [rank_positions(self.global_batch_size, rank, world_size)]

    def batch(self, step: int, positions: Iterable[int] | None = None) -> GlobalBatch:
        """The global batch of a step; every step costs the same.

        Args:
            positions: of the batch, where only the clips at those are wanted.
        """
        epoch, bucket, first = self._find(step)
        sequence, name = self._sequences.of(bucket, epoch), self.buckets[bucket].name
        wanted = range(self.global_batch_size) if positions is None else positions
        places = tuple(sequence.place(first + position) for position in wanted)
        return GlobalBatch(step=step, epoch=epoch, bucket=name, buckets=(name,) * len(places), places=places)

    def substitute(self, step: int, position: int, attempt: int) -> ClipPlace:
        epoch, bucket, first = self._find(step)
        return self._sequences.substitute(bucket, epoch, first + position, attempt)

    def _find(self, step: int) -> tuple[int, int, int]:
        """(epoch, position of its bucket, number of its first clip in that bucket's sequence) of a step."""
        assert step >= 0, f"step {step}"
        epoch, index = divmod(step, self.steps_per_epoch)
        number = self._batch_order(epoch).item(index)
        bucket = bisect_right(self._batch_ends, number)
        first = (number - (self._batch_ends[bucket - 1] if bucket else 0)) * self.global_batch_size
        return epoch, bucket, first

    def _batch_order(self, epoch: int) -> np.ndarray:
        """The numbers of an epoch's batches, in the order of its steps."""
        if epoch not in self._batch_orders:
            self._batch_orders = {near: order for near, order in self._batch_orders.items() if abs(near - epoch) <= 1}
            self._batch_orders[epoch] = permutation(self.steps_per_epoch, order_key(self.seed, epoch, "batches"))
        return self._batch_orders[epoch]

    def state(self, next_step: int) -> dict[str, int]:
        return {
            "scheme": SCHEME,
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "shards_per_block": self.shards_per_block,
            "next_step": next_step,
        }

    def describe(self) -> list[str]:
        clips = sum(bucket.num_clips for bucket in self.buckets)
        lines = [
            f"{counted(clips, 'clip')} in {counted(len(self.buckets), 'bucket')}, "
            f"{counted(self.steps_per_epoch, 'step')} of {self.global_batch_size} an epoch"
        ]
        for name, count in self.dropped.items():
            if count:
                left = f"{counted(count, 'clip')} {'is' if count == 1 else 'are'}"
                lines.append(f"bucket {name}: {left} left over in every epoch, other ones each time")
        for bucket in self.left_out:
            lines.append(
                f"bucket {bucket.name} is left out: it has {counted(bucket.num_clips, 'clip')}, fewer than a batch of "
                f"{self.global_batch_size}"
            )
        return lines


def rank_positions(global_batch_size: int, rank: int, world_size: int) -> range:
    """The positions of the global batch that one rank trains on."""
    size = global_batch_size // world_size
    return range(rank * size, (rank + 1) * size)


def check_batch_sizes(global_batch_size: int, world_size: int, micro_batch_size: int | None) -> None:
    """Refuse a global batch that cannot be shared out evenly.

    Raises: InputError naming sizes that would do.
    """
    unit = world_size * (micro_batch_size or 1)
    if global_batch_size % unit == 0 and global_batch_size > 0:
        return
    below = max(global_batch_size // unit, 1) * unit
    valid = ", ".join(str(below + i * unit) for i in range(3))
    micro = f" with micro-batches of {micro_batch_size}" if micro_batch_size else ""
    worlds = [str(w) for w in range(1, global_batch_size + 1) if global_batch_size % (w * (micro_batch_size or 1)) == 0]
    ranks = f"; or run it on {', '.join(worlds)} rank(s)" if worlds else ""
    raise InputError(
        f"--global-batch-size {global_batch_size} cannot be shared out over {world_size} rank(s){micro}: it must be a "
        f"multiple of {unit}, for instance {valid}{ranks}"
    )
