"""The layers of the fast VAE engine: what they hold, and how plain torch computes them.

`VaeKernels` is the line between the network (fast_vae.py) and its arithmetic. `TorchKernels` runs anywhere;
`TritonKernels` (fast_vae_kernels.py) fuses the passes over memory between two convolutions, on CUDA.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

TIME_TAPS = 3
HISTORY = TIME_TAPS - 1
"""Frames before the first that a causal convolution looks back at."""


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """A convolution without padding in time; its input brings the frames before the first."""

    name: str
    weight: Tensor
    """(O, C, kt, kh, kw), in the memory format of the kernels."""
    bias: Tensor
    """(O,)"""
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """GroupNorm over the frames of one chunk, then SiLU."""

    name: str
    weight: Tensor
    bias: Tensor
    groups: int
    eps: float


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """An activation, maybe not finished: a kernel may leave the bias to the next pass over memory."""

    value: Tensor
    """(B, C, T, H, W), dense in the memory format of the kernels."""
    pending_bias: Tensor | None = None
    """(C,): still to be added to `value`."""
    statistics: Tensor | None = None
    """What the kernels measured when `value` was written, for the norm that follows; theirs to read."""


class VaeKernels(Protocol):
    """The arithmetic of one device."""

    memory_format: torch.memory_format
    in_channel_multiple: int
    """Pixel channels are filled up with zeros to a multiple of this."""

    def convolve(self, padded: Tensor, conv: Convolution) -> Hidden:
        """Convolve an input that has its history: (B, C, T + 2, H, W) → (B, O, T, H, W)."""
        ...

    def project(self, value: Tensor, conv: Convolution) -> Hidden:
        """The 1x1x1 convolution of a shortcut: (B, C, T, H, W) → (B, O, T, H, W)."""
        ...

    def downsample(self, padded: Tensor, conv: Convolution) -> Hidden:
        """Halve height and width of frames that have one row and column of zeros behind them."""
        ...

    def norm_silu(self, hidden: Hidden, norm: Normalization, out: Tensor) -> None:
        """SiLU(GroupNorm(hidden)) into `out`, a view of the frames of a padded input: (B, C, T, H, W)."""
        ...

    def finish(self, name: str, hidden: Hidden, residual: Hidden | None = None) -> Hidden:
        """Add what is pending, and the residual. Takes the memory of `hidden`; the result has no pending bias."""
        ...


class TorchKernels:
    """Plain torch. On the CPU convolutions go to oneDNN at every size: torch itself takes small ones elsewhere.

    torch 2.13 sends the convolution of one clip with C*T*H <= 20,480 to `slow_conv3d`, which took 4-13x as long at the
    widths of the toy VAE and was never faster at those of the real one (BENCHMARKS.md).
    """

    in_channel_multiple = 1

    def __init__(self, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        self.memory_format = memory_format

    def convolve(self, padded: Tensor, conv: Convolution) -> Hidden:
        return Hidden(value=convolution(padded, conv))

    def project(self, value: Tensor, conv: Convolution) -> Hidden:
        return Hidden(value=convolution(value, conv))

    def downsample(self, padded: Tensor, conv: Convolution) -> Hidden:
        return Hidden(value=convolution(padded, conv))

    def norm_silu(self, hidden: Hidden, norm: Normalization, out: Tensor) -> None:
        normalized = F.group_norm(hidden.value, norm.groups, norm.weight, norm.bias, norm.eps)
        torch.ops.aten.silu.out(normalized, out=out)

    def finish(self, name: str, hidden: Hidden, residual: Hidden | None = None) -> Hidden:
        return hidden if residual is None else Hidden(value=hidden.value.add_(residual.value))


def convolution(x: Tensor, conv: Convolution) -> Tensor:
    """(B, C, T, H, W) → (B, O, T', H', W'), bias included."""
    if x.device.type == "cpu" and torch._C._has_mkldnn:
        return torch.mkldnn_convolution(x, conv.weight, conv.bias, conv.padding, conv.stride, (1, 1, 1), 1)
    return F.conv3d(x, conv.weight, conv.bias, conv.stride, conv.padding)


def with_history(shape: torch.Size, like: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Memory for the input of a causal convolution: (B, C, T, H, W) → (B, C, T + 2, H, W), unset."""
    batch, channels, frames, height, width = shape
    return torch.empty(
        (batch, channels, frames + HISTORY, height, width),
        dtype=like.dtype,
        device=like.device,
        memory_format=memory_format,
    )


def fill_history(padded: Tensor, conv: Convolution, cache: Mapping[str, Tensor]) -> Tensor:
    """Put the frames before the first of this chunk in their place, and return those that the next chunk needs.

    Args:
        padded: (B, C, T + 2, H, W), its last T frames set.
        cache: what this returned for the chunk before, by name of convolution; empty for a clip's first chunk, before
            which its first frame is repeated.
    Returns: (B, C, 2, H, W).
    Source: diffusers CogVideoXCausalConv3d.fake_context_parallel_forward.
    """
    history = cache.get(conv.name)
    padded[:, :, :HISTORY] = padded[:, :, HISTORY : HISTORY + 1] if history is None else history
    # a copy, so that the large input is not kept for its last two frames
    return padded[:, :, -HISTORY:].clone()


def pool_and_pad(value: Tensor, *, compress_time: bool, memory_format: torch.memory_format) -> Tensor:
    """Average pairs of frames, the first kept alone where their number is odd, and add a row and a column of zeros.

    Args:
        value: (B, C, T, H, W).
    Returns: (B, C, T', H + 1, W + 1), T' = (T + 1) // 2 or T.
    Source: diffusers CogVideoXDownsample3D.forward.
    """
    batch, channels, frames, height, width = value.shape
    pooled_frames = (frames + 1) // 2 if compress_time else frames
    shape = (batch, channels, pooled_frames, height + 1, width + 1)
    padded = torch.empty(shape, dtype=value.dtype, device=value.device, memory_format=memory_format)
    padded[..., height, :] = 0
    padded[..., width] = 0
    inside = padded[..., :height, :width]
    if not compress_time or frames == 1:
        inside.copy_(value)
        return padded
    alone = frames % 2
    if alone:
        inside[:, :, 0] = value[:, :, 0]
    torch.lerp(value[:, :, alone::2], value[:, :, alone + 1 :: 2], 0.5, out=inside[:, :, alone:])
    return padded
