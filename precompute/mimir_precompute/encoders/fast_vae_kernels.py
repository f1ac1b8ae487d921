"""Triton kernels of the fast VAE engine: everything between two convolutions in as few passes over memory as it takes.

Activations lie channels-last: (B, C, T, H, W) in memory as (B, rows, C), a row for each position of T*H*W. A norm and
its SiLU cost one reading for the statistics and one pass that writes the padded input of the next convolution; bias
and residual are added in the pass that measures for the next norm. Arithmetic is float32, rounded once when stored.
"""

# triton ships no types: what it decorates is checked by the tests, not by mypy
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, import-untyped, import-not-found, misc"

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mimir_precompute.encoders.fast_vae_layers import Convolution, Hidden, Normalization

TILE_ELEMENTS = 4096
"""Of one block: 32 values a thread with four warps."""

TARGET_PARTS = 1024
"""Programs that measure one clip, so that every multiprocessor of a large GPU has several."""

MOST_ROWS_PER_PART = 4096


@triton.jit
def _add_and_measure(
    value_ptr,
    bias_ptr,
    residual_ptr,
    parts_ptr,
    rows,
    channels,
    ROWS_PER_PART: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """value += bias + residual in place; per part of the rows and channel: mean and sum of squared deviations."""
    part = tl.program_id(0)
    batch = tl.program_id(1)
    channel = tl.arange(0, BLOCK_CHANNELS)
    is_channel = channel < channels
    first_row = part * ROWS_PER_PART
    mean = tl.zeros((BLOCK_CHANNELS,), dtype=tl.float32)
    deviations = tl.zeros((BLOCK_CHANNELS,), dtype=tl.float32)
    for offset in range(0, ROWS_PER_PART, BLOCK_ROWS):
        row = first_row + offset + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & is_channel[None, :]
        # int64: a batch of large clips has more than 2**31 values
        place = (batch.to(tl.int64) * rows + row.to(tl.int64))[:, None] * channels + channel[None, :]
        value = tl.load(value_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value += tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        if HAS_RESIDUAL:
            value += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS or HAS_RESIDUAL:
            rounded = value.to(value_ptr.dtype.element_ty)
            tl.store(value_ptr + place, rounded, mask=mask)
            # the norm reads what was stored
            value = rounded.to(tl.float32)
        # Chan's update: the difference of large sums of squares would lose what float32 holds of the variance
        count = tl.minimum(tl.maximum(rows - first_row, 0), offset).to(tl.float32)
        added = tl.minimum(tl.maximum(rows - first_row - offset, 0), BLOCK_ROWS).to(tl.float32)
        tile_mean = tl.sum(tl.where(mask, value, 0.0), axis=0) / tl.maximum(added, 1.0)
        apart = tl.where(mask, value - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        share = added / tl.maximum(count + added, 1.0)
        mean += delta * share
        deviations += tl.sum(apart * apart, axis=0) + delta * delta * count * share
    here = parts_ptr + (batch * tl.num_programs(0) + part) * 2 * channels + channel
    tl.store(here, mean, mask=is_channel)
    tl.store(here + channels, deviations, mask=is_channel)


@triton.jit
def _finish_statistics(
    parts_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    scale_ptr,
    shift_ptr,
    rows,
    num_parts,
    channels,
    group_channels,
    eps,
    ROWS_PER_PART: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """From the parts of one group to the scale and shift of its channels; a pending bias moves into the shift."""
    group = tl.program_id(0)
    batch = tl.program_id(1)
    within = tl.arange(0, BLOCK_CHANNELS)
    is_channel = within < group_channels
    channel = group * group_channels + within
    bias = tl.zeros((BLOCK_CHANNELS,), dtype=tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    count = rows.to(tl.float32) * group_channels
    total = 0.0
    for start in range(0, num_parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        mask = (part < num_parts)[:, None] & is_channel[None, :]
        place = (batch * num_parts + part)[:, None] * 2 * channels + channel[None, :]
        size = tl.minimum(rows - part * ROWS_PER_PART, ROWS_PER_PART).to(tl.float32)
        mean = tl.load(parts_ptr + place, mask=mask, other=0.0) + bias[None, :]
        total += tl.sum(tl.where(mask, mean * (size / count)[:, None], 0.0))
    group_mean = total
    spread = 0.0
    for start in range(0, num_parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        mask = (part < num_parts)[:, None] & is_channel[None, :]
        place = (batch * num_parts + part)[:, None] * 2 * channels + channel[None, :]
        size = tl.minimum(rows - part * ROWS_PER_PART, ROWS_PER_PART).to(tl.float32)
        apart = tl.load(parts_ptr + place, mask=mask, other=0.0) + bias[None, :] - group_mean
        deviations = tl.load(parts_ptr + place + channels, mask=mask, other=0.0)
        spread += tl.sum(tl.where(mask, deviations + apart * apart * size[:, None], 0.0))
    weight = tl.load(norm_weight_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    offset = tl.load(norm_bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    scale = weight / tl.sqrt(spread / count + eps)
    tl.store(scale_ptr + batch * channels + channel, scale, mask=is_channel)
    tl.store(shift_ptr + batch * channels + channel, offset + (bias - group_mean) * scale, mask=is_channel)


@triton.jit
def _scale_shift_silu(
    value_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    rows,
    channels,
    out_batch_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """out = SiLU(value * scale + shift), per clip and channel; the clips of `out` lie further apart."""
    batch = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    channel = tl.arange(0, BLOCK_CHANNELS)
    is_channel = channel < channels
    mask = (row < rows)[:, None] & is_channel[None, :]
    place = row[:, None] * channels + channel[None, :]
    scale = tl.load(scale_ptr + batch * channels + channel, mask=is_channel, other=0.0)
    shift = tl.load(shift_ptr + batch * channels + channel, mask=is_channel, other=0.0)
    value = tl.load(value_ptr + batch * rows * channels + place, mask=mask, other=0.0).to(tl.float32)
    value = value * scale[None, :] + shift[None, :]
    value = value / (1.0 + tl.exp(-value))
    tl.store(out_ptr + batch * out_batch_stride + place, value.to(out_ptr.dtype.element_ty), mask=mask)


class TritonKernels:
    """Channels-last activations; cuDNN (or whatever torch takes) for the convolutions, the kernels above between."""

    memory_format = torch.channels_last_3d
    # tensor cores read channels by eight
    in_channel_multiple = 8

    def convolve(self, padded: Tensor, conv: Convolution) -> Hidden:
        # torch would add the bias in a pass of its own
        return Hidden(
            value=F.conv3d(padded, conv.weight, None, conv.stride, conv.padding).contiguous(
                memory_format=self.memory_format
            ),
            pending_bias=conv.bias,
        )

    def project(self, value: Tensor, conv: Convolution) -> Hidden:
        rows = value.permute(0, 2, 3, 4, 1)  # (B, T, H, W, C)
        projected = F.linear(rows, conv.weight.flatten(1))  # (B, T, H, W, O)
        return Hidden(value=projected.permute(0, 4, 1, 2, 3), pending_bias=conv.bias)

    def downsample(self, padded: Tensor, conv: Convolution) -> Hidden:
        batch, channels, frames, height, width = padded.shape
        # channels-last, a stack of frames is a batch of images: no copy either way
        images = padded.transpose(1, 2).reshape(batch * frames, channels, height, width)
        halved = F.conv2d(images, conv.weight[:, :, 0], None, conv.stride[1:])
        value = halved.unflatten(0, (batch, frames)).transpose(1, 2)  # (B, O, T, h, w)
        return Hidden(value=value.contiguous(memory_format=self.memory_format), pending_bias=conv.bias)

    def norm_silu(self, hidden: Hidden, norm: Normalization, out: Tensor) -> None:
        batch, channels, *positions = hidden.value.shape
        rows = positions[0] * positions[1] * positions[2]
        parts = hidden.statistics if hidden.statistics is not None else self._measure(hidden.value, None, None)
        scale, shift = torch.empty(2, batch, channels, dtype=torch.float32, device=out.device)
        bias = hidden.pending_bias
        _finish_statistics[(norm.groups, batch)](
            parts,
            norm.bias if bias is None else bias,
            norm.weight,
            norm.bias,
            scale,
            shift,
            rows,
            parts.shape[1],
            channels,
            channels // norm.groups,
            norm.eps,
            ROWS_PER_PART=rows_per_part(rows, channels),
            BLOCK_PARTS=128,
            BLOCK_CHANNELS=triton.next_power_of_2(channels // norm.groups),
            HAS_BIAS=bias is not None,
        )
        block_channels = triton.next_power_of_2(channels)
        block_rows = max(TILE_ELEMENTS // block_channels, 1)
        _scale_shift_silu[(triton.cdiv(rows, block_rows), batch)](
            hidden.value,
            scale,
            shift,
            out,
            rows,
            channels,
            out.stride(0),
            BLOCK_ROWS=block_rows,
            BLOCK_CHANNELS=block_channels,
        )

    def finish(self, name: str, hidden: Hidden, residual: Hidden | None = None) -> Hidden:
        biases = [part.pending_bias for part in (hidden, residual) if part and part.pending_bias is not None]
        bias = biases[0].float() + biases[1].float() if len(biases) == 2 else (biases[0] if biases else None)
        parts = self._measure(hidden.value, bias, None if residual is None else residual.value)
        return Hidden(value=hidden.value, statistics=parts)

    def _measure(self, value: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """Add in place; (B, parts, 2, C) float32: mean and squared deviations of each part of the rows."""
        batch, channels, frames, height, width = value.shape
        rows = frames * height * width
        for tensor in (value, residual):
            assert tensor is None or tensor.is_contiguous(memory_format=self.memory_format), f"{tensor.stride()}"
        size = rows_per_part(rows, channels)
        parts = torch.empty(batch, triton.cdiv(rows, size), 2, channels, dtype=torch.float32, device=value.device)
        block_channels = triton.next_power_of_2(channels)
        _add_and_measure[(parts.shape[1], batch)](
            value,
            value if bias is None else bias,
            value if residual is None else residual,
            parts,
            rows,
            channels,
            ROWS_PER_PART=size,
            BLOCK_ROWS=min(max(TILE_ELEMENTS // block_channels, 1), size),
            BLOCK_CHANNELS=block_channels,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
        )
        return parts


def rows_per_part(rows: int, channels: int) -> int:
    """Rows that one program measures: a power of two, for it is compiled in, and enough programs to fill a GPU."""
    least = max(TILE_ELEMENTS // triton.next_power_of_2(channels), 1)
    wanted = triton.next_power_of_2(triton.cdiv(rows, TARGET_PARTS))
    return int(min(max(wanted, least), max(MOST_ROWS_PER_PART, least)))
