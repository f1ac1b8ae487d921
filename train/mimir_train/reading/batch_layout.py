"""How a batch lies in its slot of memory: where each tensor of each clip is read to, and with which dims it is seen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mimir_shared.feature_column import TensorColumn
from mimir_shared.features import NUMPY_DTYPES, DType, FeatureName
from mimir_shared.safetensors_bytes import whole_lines


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


@dataclass(slots=True, kw_only=True)
class BatchTensor:
    """Where a tensor of the batch lies in its slot. Not frozen, for a frozen one costs four times as much to make."""

    request: TensorRequest
    dtype: DType
    shape: tuple[int, ...]
    """(B, rows, …); of clips that lie apart, that of the first."""
    offset: int
    stride: int
    """Bytes from clip to clip."""
    end: int
    nbytes: list[int]
    """Of each clip, as stored."""
    lengths: list[int] | None
    """Rows of each clip; None for a tensor that is never padded."""
    shapes: list[list[int]] | None
    """Of each clip, where they lie apart: each at a multiple of the stride, and what is behind it is not looked at."""


Wanted = tuple[TensorRequest, tuple[TensorColumn, ...]]
"""A request, and what is stored of it: one tensor, or one for each variant."""


def lay_out(wanted: Sequence[Wanted], numbers: Sequence[int], variants: Sequence[int]) -> list[BatchTensor]:
    """Cut a slot into the tensors of a batch, each at the start of a cache line, as it lies in its file.

    Args:
        numbers: of the clips in the index.
        variants: of each clip, for requests that have some.

    Plain integers, one by one: for the few clips of a batch, numpy's calls would cost twice as much.
    """
    tensors: list[BatchTensor] = []
    for request, columns in wanted:
        stored = (columns[variant if request.variants else 0] for variant in variants)
        clips = list(zip(stored, numbers, strict=True))
        tensor = _lay_out(request, clips, tensors[-1].end if tensors else 0)
        tensors.append(tensor)
    return tensors


def _lay_out(request: TensorRequest, clips: list[tuple[TensorColumn, int]], behind: int) -> BatchTensor:
    column, number = clips[0]
    first, *inner = column.shape[number].tolist()
    lengths: list[int] = [column.shape.item(number, 0) for column, number in clips]
    nbytes: list[int] = [column.nbytes.item(number) for column, number in clips]
    row_bytes = math.prod(inner) * NUMPY_DTYPES[column.dtype].itemsize
    is_padded = column.is_ragged or request.num_rows is not None
    rows = request.num_rows or (max(*lengths, 1) if is_padded else first)
    shapes = None
    if request.apart:
        shapes = [column.shape[number].tolist() for column, number in clips]
    else:
        assert max(lengths) <= rows, f"{column.name}: clips of {lengths} rows for {rows}"
        fit = [length * row_bytes for length in lengths]
        assert nbytes == fit, f"{column.name}: clips of {nbytes} bytes in one batch, expected {fit}"
    stride = max(nbytes) if request.apart else rows * row_bytes
    offset = whole_lines(behind)
    return BatchTensor(
        request=request,
        dtype=column.dtype,
        shape=(len(clips), rows, *inner),
        offset=offset,
        stride=stride,
        end=offset + len(clips) * stride,
        nbytes=nbytes,
        lengths=lengths if is_padded else None,
        shapes=shapes,
    )


def most_bytes(request: TensorRequest, columns: Sequence[TensorColumn]) -> int:
    """Of a slot, that one clip takes at most for one tensor of a batch: whole cache lines."""
    rows = max(*(int(column.shape[:, 0].max(initial=1)) for column in columns), request.num_rows or 1)
    inner = max(int(column.shape[:, 1:].prod(axis=1, dtype=np.int64).max(initial=1)) for column in columns)
    return whole_lines(rows * inner * NUMPY_DTYPES[columns[0].dtype].itemsize)
