"""Reads one rank's share of consecutive steps, ahead of who trains on them, and mends what a policy lets it mend."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mimir_shared.errors import CacheError
from mimir_train.cache_reader import Cache
from mimir_train.config import OnBadSample, VerifyReads
from mimir_train.order.answer_variants import VariantChoice
from mimir_train.order.clip_order import ClipOrder
from mimir_train.reading.bad_samples import MAX_ATTEMPTS
from mimir_train.reading.batch_layout import TensorRequest
from mimir_train.reading.batch_reader import BatchReader, HostBatch, PendingBatch


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How batches are read; of no influence on what is in them."""

    verify: VerifyReads = "always"
    """When bytes are compared with their hash."""
    prefetch: int = 2
    """Steps read ahead of the one that is looked at."""
    threads: int = 4
    on_bad_sample: OnBadSample = "error"
    pinned: bool = False
    """Read into page-locked memory, for copies to a CUDA device."""
    borrow: bool = False
    """A batch is overwritten when the next one is asked for."""


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """One rank's share of a step."""

    step: int
    epoch: int
    bucket: str
    """That of all its clips; `order.PACKED` where they are of several."""
    num_clips: int
    """Of the step over all ranks."""
    parts: tuple[range, ...]
    """The positions in the global batch of its packs; of clips of one bucket, one range."""
    numbers: tuple[int, ...]
    """Of its clips in the index, in the order of their positions."""
    attempts: tuple[int, ...]
    """How many stand-ins were tried for each clip before one could be read: zeros, unless clips are bad."""
    host: HostBatch


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What is to be read of a step."""

    step: int
    epoch: int
    bucket: str
    buckets: tuple[str, ...]
    parts: tuple[range, ...]
    attempts: tuple[int, ...]
    numbers: tuple[int, ...]

    @property
    def first_position(self) -> int:
        return self.parts[0].start


class StepReader:
    """Steps in order. To be closed, or used as a context manager."""

    def __init__(
        self,
        cache: Cache,
        order: ClipOrder,
        requests: Sequence[TensorRequest],
        options: ReadOptions,
        *,
        rank: int = 0,
        world_size: int = 1,
        variants: VariantChoice | None = None,
    ) -> None:
        """
        Args:
            rank: whose share of each step is read.
            variants: which of a request's variants is read of a clip; None: the first.
        """
        self._variants = variants or VariantChoice()
        self._cache = cache
        self._order = order
        self._rank = rank
        self._world_size = world_size
        self._options = options
        self.reader = BatchReader(
            cache,
            requests,
            batch_size=order.most_clips(world_size),
            num_threads=options.threads,
            pinned=options.pinned,
            borrow=options.borrow,
        )
        self._queue: deque[tuple[_Share, PendingBatch]] = deque()

    def __enter__(self) -> "StepReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.reader.close()
        self._queue.clear()

    def steps(self, first_step: int, stop_step: int) -> Iterator[StepBatch]:
        """The shares of steps first_step … stop_step-1.

        Raises: CacheError naming the clip where a batch cannot be read and none may stand in for it; MachineError
            where the machine is at fault.
        """
        ahead = iter(range(first_step, stop_step))
        self._queue.clear()
        for step in range(first_step, stop_step):
            while len(self._queue) <= self._options.prefetch and (later := next(ahead, None)) is not None:
                self._queue.append(self._start(self._share(later)))
            share, pending = self._finish(*self._queue.popleft())
            assert share.step == step, f"read step {share.step} for step {step}"
            yield self._batch(share, pending)
            self.reader.release(pending)
            del pending  # its memory may be used again from here on

    @property
    def is_next_read(self) -> bool:
        """Whether the next batch could be had without waiting."""
        job = self._queue[0][1].job if self._queue else None
        return job is not None and job.is_finished

    def _share(self, step: int) -> _Share:
        parts = tuple(self._order.parts(step, self._rank, self._world_size))
        part = self._order.batch(step, range(parts[0].start, parts[-1].stop))
        numbers = tuple(map(self._cache.clip_number, part.buckets, part.places))
        return _Share(
            step=step, epoch=part.epoch, bucket=part.bucket, buckets=part.buckets, parts=parts,
            attempts=(0,) * len(numbers), numbers=numbers,
        )  # fmt: skip

    def _start(self, share: _Share) -> tuple[_Share, PendingBatch]:
        verify = self._options.verify == "always" or (self._options.verify == "first-epoch" and share.epoch == 0)
        variants: tuple[int, ...] = ()
        if not self._variants.is_one:  # keys are only looked up where they decide
            variants = self._variants.of(share.epoch, [self._cache.clip(number).key for number in share.numbers])
        return share, self.reader.start(share.numbers, verify=verify, variants=variants)

    def _finish(self, share: _Share, pending: PendingBatch) -> tuple[_Share, PendingBatch]:
        """Wait for a batch; with stand-ins for bad clips, until it is whole."""
        while faults := self.reader.wait(pending):
            self.reader.release(pending)
            self._raise_fatal(share, faults)
            share, pending = self._start(self._with_substitutes(share, faults))
        return share, pending

    def _raise_fatal(self, share: _Share, faults: dict[int, BaseException]) -> None:
        for part in sorted(faults):
            fault = faults[part]
            if self._options.on_bad_sample == "error" or not isinstance(fault, CacheError):
                raise fault
            if share.attempts[part] >= MAX_ATTEMPTS:
                raise CacheError(
                    f"step {share.step}: none of {MAX_ATTEMPTS} clips in a row could be read to stand in for a bad "
                    f"one; the last: {fault}"
                ) from fault

    def _with_substitutes(self, share: _Share, faults: dict[int, BaseException]) -> _Share:
        attempts, numbers = list(share.attempts), list(share.numbers)
        for part in faults:
            attempts[part] += 1
            place = self._order.substitute(share.step, share.first_position + part, attempts[part])
            numbers[part] = self._cache.clip_number(share.buckets[part], place)
        return replace(share, attempts=tuple(attempts), numbers=tuple(numbers))

    def _batch(self, share: _Share, pending: PendingBatch) -> StepBatch:
        return StepBatch(
            step=share.step,
            epoch=share.epoch,
            bucket=share.bucket,
            num_clips=self._order.num_clips(share.step),
            parts=share.parts,
            numbers=share.numbers,
            attempts=share.attempts,
            host=pending.tensors(),
        )
