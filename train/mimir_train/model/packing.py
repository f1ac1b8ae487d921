"""Clips of different length and size in one sequence, without a token that only fills.

CogVideoX's multi-resolution frame pack (arXiv 2408.06072 section 3.1), images as clips of one frame. Attention keeps
clips apart by their `Segments`; here is what else must know which clip a token is of: norms and gates, which follow
each clip's own time, and the order of tokens.

Letters in shapes: B clips of the pack, L text tokens of each, S tokens of all, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mimir_train.model.attention import Segments


@dataclass(frozen=True, eq=False, kw_only=True)
class PackIndex:
    """Which clip the tokens of a pack are of.

    Between blocks the text tokens of all clips lie together, then the video tokens of all clips, for each kind has
    norms and gates of its own. Attention takes them clip after clip: text and video of the first, of the second, ….
    """

    segments: Segments
    """The tokens of each clip, as attention takes them."""
    text_clips: Tensor
    """(B*L,) int64: the clip of each text token."""
    video_clips: Tensor
    """(tokens,) int64: the clip of each video token."""
    clip_by_clip: Tensor
    """(S,) int64: which of [all text, all video] stands at each place of the order that attention takes."""
    kind_by_kind: Tensor
    """(S,) int64: the way back."""

    @classmethod
    def build(cls, num_text_tokens: int, num_video_tokens: Sequence[int], device: torch.device) -> "PackIndex":
        """
        Args:
            num_text_tokens: of each clip.
            num_video_tokens: of every clip.
        """
        num_clips = len(num_video_tokens)
        all_text = num_clips * num_text_tokens
        starts = [all_text, *accumulate(num_video_tokens, initial=all_text)][1:]
        places = [
            torch.cat(
                [
                    torch.arange(clip * num_text_tokens, (clip + 1) * num_text_tokens),
                    torch.arange(starts[clip], starts[clip] + num_video_tokens[clip]),
                ]
            )
            for clip in range(num_clips)
        ]
        clip_by_clip = torch.cat(places)
        clips = torch.arange(num_clips)
        return cls(
            segments=Segments([num_text_tokens + count for count in num_video_tokens], device),
            text_clips=clips.repeat_interleave(num_text_tokens).to(device),
            video_clips=clips.repeat_interleave(torch.tensor(num_video_tokens)).to(device),
            clip_by_clip=clip_by_clip.to(device),
            kind_by_kind=clip_by_clip.argsort().to(device),
        )


def modulate(normed: Tensor, shift: Tensor, scale: Tensor, clips: Tensor | None) -> Tensor:
    """normed * (1 + scale) + shift, each token with what its clip has.

    Args:
        normed: (B, S, D), or (1, S, D) of a pack.
        shift, scale: (B, D).
        clips: (S,) int64 of a pack; None for a batch.
    Returns: as normed.
    """
    if clips is None:
        return normed * (1 + scale[:, None]) + shift[:, None]
    out: Tensor = _Modulate.apply(normed, shift, scale, clips)  # type: ignore[no-untyped-call]
    return out


def add_gated(tokens: Tensor, update: Tensor, gate: Tensor, clips: Tensor | None) -> Tensor:
    """tokens + gate * update, each token with the gate (B, D) of its clip; shapes as in `modulate`."""
    if clips is None:
        return tokens + gate[:, None] * update
    out: Tensor = _AddGated.apply(tokens, update, gate, clips)  # type: ignore[no-untyped-call]
    return out


def reorder(tokens: Tensor, order: Tensor, way_back: Tensor) -> Tensor:
    """Take tokens (1, S, D) in another order (S,), of which `way_back` (S,) is the inverse."""
    out: Tensor = _Reorder.apply(tokens, order, way_back)  # type: ignore[no-untyped-call]
    return out


def sum_by_clip(values: Tensor, clips: Tensor, num_clips: int) -> Tensor:
    """Sums over the tokens of each clip: (1, S, D) to (B, D).

    A product of matrices: it adds up in float32 whatever the dtype, and always in the same order, which adding rows
    one by one at indices does not.
    """
    is_of_clip = clips == torch.arange(num_clips, device=clips.device)[:, None]  # (B, S)
    return is_of_clip.to(values.dtype) @ values[0]


# The gradients are written out below, for what autograd would do is to keep a row of shift, scale and gate for every
# token, and to add up in bfloat16.


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, normed: Tensor, shift: Tensor, scale: Tensor, clips: Tensor) -> Tensor:
        ctx.save_for_backward(normed, scale, clips)
        return normed * (1 + scale)[clips] + shift[clips]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        normed, scale, clips = ctx.saved_tensors
        of_shift = sum_by_clip(grad, clips, len(scale))
        return grad * (1 + scale)[clips], of_shift, sum_by_clip(grad * normed, clips, len(scale)), None


class _AddGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, update: Tensor, gate: Tensor, clips: Tensor) -> Tensor:
        ctx.save_for_backward(update, gate, clips)
        return tokens + gate[clips] * update

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        update, gate, clips = ctx.saved_tensors
        return grad, grad * gate[clips], sum_by_clip(grad * update, clips, len(gate)), None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, way_back: Tensor) -> Tensor:
        ctx.save_for_backward(way_back)
        return tokens[:, order]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (way_back,) = ctx.saved_tensors
        return grad[:, way_back], None, None
