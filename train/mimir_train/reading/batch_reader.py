"""Reads the clips of a batch straight into the tensors that training sees: padded, stacked, and nothing copied twice.

A batch is one slot of BatchMemory, cut into tensors. Of every clip each thread reads a feature by one call to the
storage, which puts each tensor into its row.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mimir_shared.feature_column import FeatureColumn
from mimir_train.cache_reader import Cache
from mimir_train.reading.batch_layout import BatchTensor, TensorRequest, lay_out, most_bytes
from mimir_train.reading.batch_memory import BatchMemory
from mimir_train.reading.threads import Job, ReaderThreads
from mimir_train.tensors import TORCH_DTYPES


@dataclass(frozen=True, kw_only=True)
class HostBatch:
    """What was read."""

    tensors: dict[str, Tensor]
    """name → (B, …); rows that a clip does not have are zeros."""
    lengths: dict[str, Tensor]
    """name → (B,) int64, how many rows each clip has; of tensors that may be padded."""
    apart: dict[str, tuple[Tensor, ...]]
    """name → a tensor for each clip, where the request says so."""

    def mask(self, name: str) -> Tensor:
        """(B, rows) bool of a tensor that may be padded: True for rows that were there."""
        return torch.arange(self.tensors[name].shape[1]) < self.lengths[name][:, None]


_Targets = tuple[tuple[FeatureColumn, tuple[int | None, ...]], ...]
"""Of every feature that is read: the number in the batch of each of its stored tensors; None for what nobody wants."""


class PendingBatch:
    """A batch that is being read: a Work of one part a clip."""

    def __init__(
        self, layout: Sequence[BatchTensor], targets: Sequence[_Targets], slot: np.ndarray, numbers: Sequence[int],
        *, verify: bool, scratch: "_Scratch",
    ) -> None:  # fmt: skip
        """
        Args:
            targets: of each clip.
        """
        self.numbers = tuple(numbers)
        self.job: Job | None = None
        self._layout = layout
        self._targets = targets
        self._slot = slot
        self._memory = slot.data
        self._verify = verify
        self._scratch = scratch

    @property
    def num_parts(self) -> int:
        return len(self.numbers)

    def do(self, part: int) -> None:
        number = self.numbers[part]
        for column, targets in self._targets[part]:
            buffers = []
            unwanted = 0
            for place, target in enumerate(targets):
                if target is None:
                    # read all the same: it lies between the others, and the hash is over all of them
                    nbytes = column.tensors[place].nbytes.item(number)
                    buffers.append(self._scratch.take(unwanted, nbytes))
                    unwanted += nbytes
                    continue
                tensor = self._layout[target]
                start = tensor.offset + part * tensor.stride
                end = start + tensor.nbytes[part]
                buffers.append(self._memory[start:end])
                if end < start + tensor.stride and tensor.shapes is None:
                    self._slot[end : start + tensor.stride] = 0
            column.read_into(number, buffers, verify=self._verify)

    def tensors(self) -> HostBatch:
        """Views of the slot, once every clip is read."""
        tensors, apart = {}, {}
        shown = torch.from_numpy(self._slot)
        for tensor in self._layout:
            stored = shown[tensor.offset : tensor.end].view(TORCH_DTYPES[tensor.dtype])
            if tensor.shapes is None:
                tensors[tensor.request.name] = stored.view(tensor.shape)
            else:
                clips = stored.view(len(tensor.shapes), -1)
                apart[tensor.request.name] = tuple(
                    clip[: math.prod(shape)].view(shape) for clip, shape in zip(clips, tensor.shapes, strict=True)
                )
        lengths = {t.request.name: t.lengths for t in self._layout if t.lengths is not None and t.shapes is None}
        rows = torch.tensor(list(lengths.values())).unbind() if lengths else ()
        return HostBatch(tensors=tensors, lengths=dict(zip(lengths, rows, strict=True)), apart=apart)


class BatchReader:
    """Starts the reading of batches, and hands them out in memory that is used again. To be closed."""

    def __init__(
        self,
        cache: Cache,
        requests: Sequence[TensorRequest],
        *,
        batch_size: int,
        num_threads: int,
        pinned: bool = False,
        borrow: bool = False,
    ) -> None:
        """
        Args:
            batch_size: clips of a batch at most.
            borrow: a batch is overwritten once it was `release`d; else its memory is used again only when the last
                tensor that shows it is gone.
        Raises: InputError for a feature that the snapshot lacks; CacheError where index and spec disagree.
        """
        features = list(dict.fromkeys(request.feature for request in requests))
        self._columns = [cache.column(feature) for feature in features]
        stored = {tensor.name: tensor for column in self._columns for tensor in column.tensors}
        self._wanted = [
            (request, tuple(stored[name] for name in request.variants or (request.name,))) for request in requests
        ]
        self.memory = BatchMemory(sum(most_bytes(*wanted) for wanted in self._wanted) * batch_size, pinned=pinned)
        self._targets: dict[int, _Targets] = {}
        self._batch_size = batch_size
        self._borrow = borrow
        self._borrowed: dict[int, np.ndarray] = {}
        self._scratch = _Scratch()
        self._threads = ReaderThreads(num_threads)

    def __enter__(self) -> "BatchReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, numbers: Sequence[int], *, verify: bool, variants: Sequence[int] = ()) -> PendingBatch:
        """Queue the reading of some clips; it begins when those queued before are read.

        Args:
            variants: which of a request's variants is read of each clip; () for the first of all.
        """
        assert 0 < len(numbers) <= self._batch_size, f"{len(numbers)} clips, {self._batch_size} at most"
        variants = variants or (0,) * len(numbers)
        layout = lay_out(self._wanted, numbers, variants)
        slot = self.memory.borrow() if self._borrow else self.memory.lend()
        targets = [self._targets_of(variant) for variant in variants]
        pending = PendingBatch(layout, targets, slot, numbers, verify=verify, scratch=self._scratch)
        pending.job = self._threads.start(pending)
        if self._borrow:
            self._borrowed[id(pending)] = slot
        return pending

    def _targets_of(self, variant: int) -> _Targets:
        if variant not in self._targets:
            targets = {request.stored_name(variant): place for place, (request, _) in enumerate(self._wanted)}
            self._targets[variant] = tuple(
                (column, tuple(targets.get(tensor.name) for tensor in column.tensors)) for column in self._columns
            )
        return self._targets[variant]

    def wait(self, pending: PendingBatch) -> dict[int, BaseException]:
        """Wait until all is read; returns what went wrong, by position. Raises MachineError where a thread is gone."""
        assert pending.job is not None, "not started"
        self._threads.wait(pending.job)
        return pending.job.faults

    def release(self, pending: PendingBatch) -> None:
        """A batch that was read is no longer looked at; with `borrow`, its memory is written over from now on."""
        if self._borrow:
            self.memory.give_back(self._borrowed.pop(id(pending)))

    def close(self) -> None:
        self._threads.close()


class _Scratch(threading.local):
    """One buffer a thread, for what must be read and is not wanted."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def take(self, start: int, nbytes: int) -> memoryview:
        if len(self._buffer) < start + nbytes:
            # a new one, for views of the old one may be in use
            self._buffer = bytearray(2 * (start + nbytes))
        return memoryview(self._buffer)[start : start + nbytes]
