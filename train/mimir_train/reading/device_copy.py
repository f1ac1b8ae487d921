"""Brings batches to a CUDA device on a stream of its own: the next one is copied beside this step's kernels."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Protocol, Self, TypeVar

import torch
from torch import Tensor

_MAX_COPYING: Final = 3
"""Batches whose pinned memory is kept though they were handed out: the device copies while the host runs ahead."""


class Movable(Protocol):
    """A batch in pinned memory."""

    def to(self, device: torch.device) -> Self: ...

    def tensors(self) -> list[Tensor]: ...


Batch = TypeVar("Batch", bound=Movable)


def copied_ahead(batches: Iterator[Batch], device: torch.device, is_next_ready: Callable[[], bool]) -> Iterator[Batch]:
    """The batches on the device, each ready for the stream that is current when it is asked for.

    The copy of a batch is begun one batch ahead, if that was read by then.

    Args:
        is_next_ready: whether the next batch could be had without waiting.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    copied: deque[tuple[Batch, torch.cuda.Event]] = deque()
    sources: deque[tuple[Batch, torch.cuda.Event]] = deque()

    def copy_next() -> None:
        batch = next(batches, None)
        if batch is None:
            return
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            moved = batch.to(device)
            done.record(stream)
        copied.append((moved, done))
        sources.append((batch, done))

    try:
        while True:
            if not copied:
                copy_next()
            if not copied:
                return
            if is_next_ready():
                copy_next()
            batch, done = copied.popleft()
            current = torch.cuda.current_stream(device)
            current.wait_event(done)
            for tensor in batch.tensors():
                # made on the side stream, used on this one: not to be given to another tensor before this one is done
                tensor.record_stream(current)
            _let_go(sources)
            yield batch
    finally:
        stream.synchronize()  # nobody may write over pinned memory that is still being copied from


def _let_go(sources: deque[tuple[Batch, torch.cuda.Event]]) -> None:
    """Drop the pinned batches that the device has copied, for their memory to be read into again."""
    while sources and (len(sources) > _MAX_COPYING or sources[0][1].query()):  # type: ignore[no-untyped-call]
        sources.popleft()[1].synchronize()
