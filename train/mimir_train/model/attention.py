"""Attention, in one place: torch's own by default, and faster kernels where a machine has them.

Clips come as a batch of one shape, (B, A, S, d), or packed: one behind the other in one sequence, (1, A, S, d), with
`Segments` that say where each ends. No clip sees another, and there is no token that only fills.

Letters in shapes: B batch, A heads, S tokens of a sequence, d channels of a head.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mimir_train.model.config import AttentionName


class Segments:
    """Where each clip of a packed sequence lies. What kernels want to know of it is made once, for all layers."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        """
        Args:
            lengths: tokens of each clip, in the order in which they lie.
        """
        self.lengths = tuple(lengths)
        self.longest = max(self.lengths)
        self.total = sum(self.lengths)
        self.device = device

    @cached_property
    def starts(self) -> Tensor:
        """(clips + 1,) int32: where each clip begins, and where the last one ends."""
        ends = torch.tensor((0, *self.lengths)).cumsum(0)
        return ends.to(self.device, torch.int32)

    @cached_property
    def clip_of_token(self) -> Tensor:
        """(S,) int32."""
        clips = torch.arange(len(self.lengths), dtype=torch.int32)
        return clips.repeat_interleave(torch.tensor(self.lengths)).to(self.device)

    @cached_property
    def xformers_mask(self) -> Any:  # a BlockDiagonalMask: xformers ships no types
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        return BlockDiagonalMask.from_seqlens(list(self.lengths), device=self.device)

    @cached_property
    def flex_mask(self) -> BlockMask:
        clip_of_token = self.clip_of_token

        def is_same_clip(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return clip_of_token[query] == clip_of_token[key]

        return create_block_mask(
            is_same_clip, None, None, self.total, self.total, device=self.device,
            _compile=self.device.type == "cuda",  # else it fills a table of S times S
        )  # fmt: skip


def attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments | None = None, backend: AttentionName = "sdpa"
) -> Tensor:
    """Every token attends to every token of its clip: the only place where attention is computed.

    Args:
        query, key, value: (B, A, S, d), one dtype; with `segments` B is 1.
        segments: of a packed sequence; None: each of the B is one clip.
        backend: one that `why_not` has nothing against; all compute the same but for rounding.
    Returns: (B, A, S, d).
    """
    if segments is None:
        return _BACKENDS[backend](query, key, value, None)
    assert query.shape[0] == 1, f"a packed sequence is a batch of one, got {query.shape[0]}"
    assert query.shape[2] == segments.total, f"{query.shape[2]} tokens, segments of {segments.lengths}"
    attended: Tensor = _packed_attention(query, key, value, segments, backend)
    return attended


# the lengths of every pack are others: a graph made for them would be made for every step
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _packed_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, backend: AttentionName) -> Tensor:
    return _BACKENDS[backend](query, key, value, segments)


def why_not(backend: AttentionName, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend cannot train here: found by trying it on two small clips, forward and backward. None: it can."""
    query, key, value = (
        torch.randn(1, 2, 24, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    try:
        with warnings.catch_warnings(action="ignore"):
            attended = attention(query, key, value, Segments([16, 8], device), backend)
            attended.float().sum().backward()  # type: ignore[no-untyped-call]
    # whatever a library that is absent, built for another torch, or without a kernel for this device may raise
    except (ImportError, OSError, RuntimeError, ValueError, AttributeError, AssertionError) as fault:
        return next(iter(str(fault).splitlines()), "").rstrip(":") or type(fault).__name__
    return None


# --- backends -----------------------------------------------------------------------------------------------------


def _sdpa(query: Tensor, key: Tensor, value: Tensor, segments: Segments | None) -> Tensor:
    """torch's scaled_dot_product_attention, clip by clip: the reference that the others are compared with."""
    if segments is None:
        return F.scaled_dot_product_attention(query, key, value)
    of_clips = zip(*(torch.split(tensor, list(segments.lengths), dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*of_clip) for of_clip in of_clips], dim=2)


def _xformers(query: Tensor, key: Tensor, value: Tensor, segments: Segments | None) -> Tensor:
    """xformers' memory_efficient_attention; clips of a pack are kept apart by its BlockDiagonalMask."""
    from xformers.ops import memory_efficient_attention

    mask = None if segments is None else segments.xformers_mask
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))  # (B, S, A, d)
    attended: Tensor = memory_efficient_attention(query, key, value, attn_bias=mask)
    return attended.transpose(1, 2)


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments | None) -> Tensor:
    """torch's varlen_attn: flash attention over clips of any length."""
    from torch.nn.attention.varlen import varlen_attn  # not in every torch

    batch_size, _, length, _ = query.shape
    if segments is None:
        starts = torch.arange(0, (batch_size + 1) * length, length, device=query.device, dtype=torch.int32)
    else:
        starts, length = segments.starts, segments.longest
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))  # (B*S, A, d)
    attended = varlen_attn(query, key, value, starts, starts, length, length)
    assert isinstance(attended, Tensor)
    return attended.reshape(batch_size, -1, *attended.shape[1:]).transpose(1, 2)


def _flex(query: Tensor, key: Tensor, value: Tensor, segments: Segments | None) -> Tensor:
    """torch's flex_attention with a block mask; compiled on a CUDA device, for else it fills a table of S times S."""
    mask = None if segments is None else segments.flex_mask
    plain: Any = flex_attention  # torch wraps it in a function without types
    attend = _compiled_flex() if query.device.type == "cuda" else plain
    attended = attend(query.contiguous(), key.contiguous(), value.contiguous(), block_mask=mask)
    assert isinstance(attended, Tensor)
    return attended


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)


_BACKENDS: Final[Mapping[AttentionName, Callable[[Tensor, Tensor, Tensor, Segments | None], Tensor]]] = (
    MappingProxyType({"sdpa": _sdpa, "xformers": _xformers, "varlen": _varlen, "flex": _flex})
)
