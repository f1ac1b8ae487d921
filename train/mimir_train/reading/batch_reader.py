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

from mimir_shared.feature_column import FeatureColumn, TensorColumn
from mimir_shared.features import NUMPY_DTYPES, DType, FeatureName, FeatureTensor
from mimir_shared.safetensors_bytes import ALIGNMENT
from mimir_train.cache_reader import Cache
from mimir_train.reading.batch_memory import BatchMemory
from mimir_train.reading.threads import Job, ReaderThreads
from mimir_train.tensors import to_tensor


@dataclass(frozen=True, kw_only=True)
class TensorRequest:
    """A tensor that a batch shall hold."""

    feature: FeatureName
    name: str
    """In the batch; in the cache as well, unless there are `variants`."""
    num_rows: int | None = None
    """To pad the first dim to; None: as stored, and where it is ragged to the longest of the batch, at least 1."""
    variants: tuple[str, ...] = ()
    """Names in the cache, of which each clip's own variant is read."""
    apart: bool = False
    """Clips are of several sizes: each has a tensor of its own, and nothing is stacked or padded."""

    def stored_name(self, variant: int) -> str:
        return self.variants[variant] if self.variants else self.name


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


@dataclass(slots=True, kw_only=True)
class _Place:
    """Where a tensor of the batch lies in its slot. Not frozen, for a frozen one costs four times as much to make."""

    request: TensorRequest
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    stride: int
    """Bytes from clip to clip."""
    end: int
    lengths: list[int] | None
    """Rows of each clip; None for a tensor that is never padded."""
    shapes: list[list[int]] | None
    """Of each clip, where they lie apart: each at a multiple of the stride, and what is behind it is not looked at."""


class PendingBatch:
    """A batch that is being read: a Work of one part a clip."""

    def __init__(
        self, columns: Sequence[FeatureColumn], places: Sequence[_Place], slot: np.ndarray, numbers: Sequence[int],
        variants: Sequence[int], *, verify: bool, scratch: "_Scratch",
    ) -> None:  # fmt: skip
        self.numbers = tuple(numbers)
        self.job: Job | None = None
        self._columns = columns
        self._places = places
        self._variants = tuple(variants)
        self._places_of_variant = {
            variant: {place.request.stored_name(variant): place for place in places} for variant in set(variants)
        }
        self._slot = slot
        self._memory = slot.data
        self._verify = verify
        self._scratch = scratch

    @property
    def num_parts(self) -> int:
        return len(self.numbers)

    def do(self, part: int) -> None:
        number = self.numbers[part]
        places = self._places_of_variant[self._variants[part]]
        for column in self._columns:
            buffers = []
            unwanted = 0
            for tensor in column.tensors:
                nbytes = tensor.nbytes.item(number)
                place = places.get(tensor.name)
                if place is None:
                    # read all the same: it lies between the others, and the hash is over all of them
                    buffers.append(self._scratch.take(unwanted, nbytes))
                    unwanted += nbytes
                    continue
                start = place.offset + part * place.stride
                buffers.append(self._memory[start : start + nbytes])
                if nbytes < place.stride and place.shapes is None:
                    self._slot[start + nbytes : start + place.stride] = 0
            column.read_into(number, buffers, verify=self._verify)

    def tensors(self) -> HostBatch:
        """Views of the slot, once every clip is read."""
        tensors, lengths, apart = {}, {}, {}
        for place in self._places:
            stored = self._slot[place.offset : place.end].view(NUMPY_DTYPES[place.dtype])
            name = place.request.name
            if place.shapes is not None:
                apart[name] = tuple(
                    to_tensor(FeatureTensor(row[: math.prod(shape)].reshape(shape), place.dtype))
                    for row, shape in zip(stored.reshape(len(place.shapes), -1), place.shapes, strict=True)
                )
                continue
            tensors[name] = to_tensor(FeatureTensor(stored.reshape(place.shape), place.dtype))
            if place.lengths is not None:
                lengths[name] = torch.tensor(place.lengths)
        return HostBatch(tensors=tensors, lengths=lengths, apart=apart)


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
        self.memory = BatchMemory(sum(_bound(*wanted) for wanted in self._wanted) * batch_size, pinned=pinned)
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
        places = _places(self._wanted, numbers, variants)
        slot = self.memory.borrow() if self._borrow else self.memory.lend()
        pending = PendingBatch(self._columns, places, slot, numbers, variants, verify=verify, scratch=self._scratch)
        pending.job = self._threads.start(pending)
        if self._borrow:
            self._borrowed[id(pending)] = slot
        return pending

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


def _places(
    wanted: Sequence[tuple[TensorRequest, tuple[TensorColumn, ...]]], numbers: Sequence[int], variants: Sequence[int]
) -> list[_Place]:
    """Cut a slot into the tensors of a batch, each at the start of a cache line, as it lies in its file."""
    places = []
    end = 0
    rows_of_index = np.array(numbers)
    for request, columns in wanted:
        tensor = columns[0]
        if len(columns) == 1:
            shapes = tensor.shape[rows_of_index].tolist()
        else:
            shapes = [columns[v].shape[number].tolist() for number, v in zip(numbers, variants, strict=True)]
        first, *inner = shapes[0]
        lengths = [dims[0] for dims in shapes]
        is_padded = tensor.is_ragged or request.num_rows is not None
        rows = request.num_rows or (max(*lengths, 1) if is_padded else first)
        assert request.apart or max(lengths) <= rows, f"{tensor.name}: {shapes} for {rows} rows"
        if inner and not request.apart:
            assert all(dims[1:] == inner for dims in shapes), f"{tensor.name}: clips of {shapes} in one batch"
        most = max(map(math.prod, shapes)) if request.apart else rows * math.prod(inner)
        stride = most * NUMPY_DTYPES[tensor.dtype].itemsize
        place = _Place(
            request=request,
            dtype=tensor.dtype,
            shape=(len(numbers), rows, *inner),
            offset=end,
            stride=stride,
            end=end + len(numbers) * stride,
            lengths=lengths if is_padded else None,
            shapes=shapes if request.apart else None,
        )
        end = -(-place.end // ALIGNMENT) * ALIGNMENT
        places.append(place)
    return places


def _bound(request: TensorRequest, columns: Sequence[TensorColumn]) -> int:
    """Bytes of a slot that one clip takes at most, for one tensor of a batch."""
    rows = max(*(int(column.shape[:, 0].max(initial=1)) for column in columns), request.num_rows or 1)
    inner = max(int(column.shape[:, 1:].prod(axis=1, dtype=np.int64).max(initial=1)) for column in columns)
    return rows * inner * NUMPY_DTYPES[columns[0].dtype].itemsize + ALIGNMENT
