"""An inference-only encoder for the CogVideoX causal VAE: diffusers' weights and meaning, fewer passes over memory.

It stands in for `AutoencoderKLCogVideoX.encoder`, one chunk of frames a call. What differs from diffusers is how:
activations are written straight into the padded input of the convolution that reads them (no `cat`, no pad), pooling
and padding are one pass, pixels come as bytes a chunk at a time, and on CUDA everything lies channels-last and norm,
SiLU, bias and residual are fused (fast_vae_kernels.py). diffusers stays the truth that the tests compare with.
"""

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mimir_precompute.encoders.fast_vae_layers import (
    HISTORY,
    TIME_TAPS,
    Convolution,
    Hidden,
    Normalization,
    TorchKernels,
    VaeKernels,
    fill_history,
    pool_and_pad,
    with_history,
)
from mimir_shared.errors import InputError, MachineError

LAST_NORM_EPS = 1e-6
"""Of the norm before the last convolution; a constant in diffusers, whatever the config says of the others."""

SELF_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest error against diffusers on random pixels that is no fault, rms to rms: tens of times that of rounding."""


@dataclass(frozen=True, kw_only=True)
class ResnetBlock:
    name: str
    norm1: Normalization
    conv1: Convolution
    norm2: Normalization
    conv2: Convolution
    shortcut: Convolution | None
    """Where the number of channels changes."""


@dataclass(frozen=True, kw_only=True)
class DownBlock:
    resnets: Sequence[ResnetBlock]
    downsampler: Convolution | None
    compress_time: bool


class FastVaeEncoder(nn.Module):
    """The encoder half of AutoencoderKLCogVideoX, without gradients."""

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, Tensor], kernels: VaeKernels, dtype: torch.dtype
    ) -> None:
        """Lay out the weights for the kernels.

        Args:
            config: of AutoencoderKLCogVideoX; every value that the encoder reads must be there (a loaded model's is).
            weights: its state dict, or the tensors of its safetensors file; on the device on which this is to run.
            dtype: of the arithmetic between layers.
        Raises: InputError for a kind of VAE that this engine does not know.
        """
        super().__init__()
        if config["act_fn"] not in ("silu", "swish"):
            raise InputError(
                f"the VAE's activation is {config['act_fn']!r}, and the fast engine knows silu alone: "
                "use --vae-engine diffusers"
            )
        self.kernels = kernels
        self.dtype = dtype
        read = _WeightReader(weights, kernels, dtype, groups=config["norm_num_groups"], eps=config["norm_eps"])
        num_levels = len(config["block_out_channels"])
        num_time_levels = int(config["temporal_compression_ratio"]).bit_length() - 1
        self.conv_in = read.causal("conv_in", fill_channels=True)
        self.down_blocks = [
            DownBlock(
                resnets=[read.resnet(f"down_blocks.{i}.resnets.{k}") for k in range(config["layers_per_block"])],
                downsampler=read.downsampler(f"down_blocks.{i}.downsamplers.0") if i < num_levels - 1 else None,
                compress_time=i < num_time_levels,
            )
            for i in range(num_levels)
        ]
        self.middle = [read.resnet(f"mid_block.resnets.{k}") for k in range(2)]
        self.norm_out = read.norm("norm_out", eps=LAST_NORM_EPS)
        # in float32, at some thousandths of the work: its bias is then added before the moments are rounded, not after
        self.conv_out = read.causal("conv_out", dtype=torch.float32)

    @torch.inference_mode()
    def forward(
        self, sample: Tensor, temb: None = None, conv_cache: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Encode one chunk; the signature is that of diffusers' encoder, so that its tiling can call this.

        Args:
            sample: (B, 3, f, H, W) in -1..1.
            temb: unused; this VAE has none.
            conv_cache: what the call for the chunk before returned; None for a clip's first chunk.
        Returns: (B, 2C, t, h, w) in the dtype of the sample, and the cache for the next chunk.
        """
        # Triton launches on the current device, which need not be that of the sample
        with torch.cuda.device(sample.device) if sample.is_cuda else nullcontext():
            return self._encode(sample, conv_cache or {})

    def _encode(self, sample: Tensor, cache: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        kept: dict[str, Tensor] = {}
        hidden = self._enter(sample, cache, kept)
        for block in self.down_blocks:
            for resnet in block.resnets:
                hidden = self._resnet(resnet, hidden, cache, kept)
            if block.downsampler is not None:
                hidden = self._downsample(block.downsampler, hidden, compress_time=block.compress_time)
        for resnet in self.middle:
            hidden = self._resnet(resnet, hidden, cache, kept)
        hidden = self._normed_conv(self.norm_out, self.conv_out, hidden, cache, kept)
        moments = self.kernels.finish(self.conv_out.name, hidden).value
        return moments.to(sample.dtype).contiguous(), kept

    def encode_chunks(self, chunks: Iterable[Tensor]) -> Tensor:
        """Encode a clip from its chunks of pixels, each (B, f, H, W, 3) uint8 on the device: (B, 2C, T, h, w)."""
        moments: list[Tensor] = []
        cache: dict[str, Tensor] | None = None
        for pixels in chunks:
            scaled = (pixels.permute(0, 4, 1, 2, 3).float() - 127.5) / 127.5  # (B, 3, f, H, W)
            chunk_moments, cache = self(scaled.to(self.dtype), conv_cache=cache)
            moments.append(chunk_moments)
        return torch.cat(moments, dim=2)

    def _enter(self, sample: Tensor, cache: Mapping[str, Tensor], kept: dict[str, Tensor]) -> Hidden:
        batch, channels, frames, height, width = sample.shape
        filled = self.conv_in.weight.shape[1]
        like = sample.new_empty(0, dtype=self.dtype)
        padded = with_history(
            torch.Size((batch, filled, frames, height, width)), like, self.kernels.memory_format
        )  # (B, 3 or filled up, f + 2, H, W)
        padded[:, :channels, HISTORY:] = sample
        padded[:, channels:, HISTORY:] = 0
        kept[self.conv_in.name] = fill_history(padded, self.conv_in, cache)
        return self.kernels.finish(self.conv_in.name, self.kernels.convolve(padded, self.conv_in))

    def _resnet(
        self, block: ResnetBlock, hidden: Hidden, cache: Mapping[str, Tensor], kept: dict[str, Tensor]
    ) -> Hidden:
        inner = self._normed_conv(block.norm1, block.conv1, hidden, cache, kept)
        outer = self._normed_conv(block.norm2, block.conv2, inner, cache, kept)
        residual = hidden if block.shortcut is None else self.kernels.project(hidden.value, block.shortcut)
        return self.kernels.finish(block.name, outer, residual)

    def _normed_conv(
        self,
        norm: Normalization,
        conv: Convolution,
        hidden: Hidden,
        cache: Mapping[str, Tensor],
        kept: dict[str, Tensor],
    ) -> Hidden:
        padded = with_history(hidden.value.shape, hidden.value, self.kernels.memory_format)
        self.kernels.norm_silu(hidden, norm, padded[:, :, HISTORY:])
        kept[conv.name] = fill_history(padded, conv, cache)
        return self.kernels.convolve(padded.to(conv.weight.dtype), conv)

    def _downsample(self, conv: Convolution, hidden: Hidden, *, compress_time: bool) -> Hidden:
        padded = pool_and_pad(
            hidden.value, compress_time=compress_time, memory_format=self.kernels.memory_format
        )  # (B, C, T', H + 1, W + 1)
        return self.kernels.finish(conv.name, self.kernels.downsample(padded, conv))


class _WeightReader:
    """Finds the encoder's weights by diffusers' names and lays them out."""

    def __init__(
        self, weights: Mapping[str, Tensor], kernels: VaeKernels, dtype: torch.dtype, *, groups: int, eps: float
    ) -> None:
        self.weights, self.kernels, self.dtype, self.groups, self.eps = weights, kernels, dtype, groups, eps

    def causal(self, name: str, *, fill_channels: bool = False, dtype: torch.dtype | None = None) -> Convolution:
        weight = self.weights[f"encoder.{name}.conv.weight"]
        assert weight.shape[2:] == (TIME_TAPS, 3, 3), f"{name}: kernel {tuple(weight.shape)}"
        if fill_channels:
            missing = -weight.shape[1] % self.kernels.in_channel_multiple
            weight = nn.functional.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing))
        bias = self.weights[f"encoder.{name}.conv.bias"]
        return self._convolution(name, weight, bias, dtype=dtype, padding=(0, 1, 1))

    def downsampler(self, name: str) -> Convolution:
        weight = self.weights[f"encoder.{name}.conv.weight"][:, :, None]  # (O, C, 1, 3, 3)
        return self._convolution(name, weight, self.weights[f"encoder.{name}.conv.bias"], stride=(1, 2, 2))

    def norm(self, name: str, *, eps: float | None = None) -> Normalization:
        weight, bias = (self.weights[f"encoder.{name}.{part}"].to(self.dtype) for part in ("weight", "bias"))
        return Normalization(
            name=name, weight=weight, bias=bias, groups=self.groups, eps=self.eps if eps is None else eps
        )

    def resnet(self, name: str) -> ResnetBlock:
        shortcut = f"encoder.{name}.conv_shortcut.weight"
        return ResnetBlock(
            name=name,
            norm1=self.norm(f"{name}.norm1"),
            conv1=self.causal(f"{name}.conv1"),
            norm2=self.norm(f"{name}.norm2"),
            conv2=self.causal(f"{name}.conv2"),
            shortcut=self._shortcut(f"{name}.conv_shortcut") if shortcut in self.weights else None,
        )

    def _shortcut(self, name: str) -> Convolution:
        return self._convolution(name, self.weights[f"encoder.{name}.weight"], self.weights[f"encoder.{name}.bias"])

    def _convolution(
        self,
        name: str,
        weight: Tensor,
        bias: Tensor,
        dtype: torch.dtype | None = None,
        **geometry: tuple[int, int, int],
    ) -> Convolution:
        dtype = dtype or self.dtype
        laid_out = weight.detach().to(dtype).contiguous(memory_format=self.kernels.memory_format)
        return Convolution(name=name, weight=laid_out, bias=bias.detach().to(dtype), **geometry)


def kernels_for(device: torch.device) -> VaeKernels:
    """The kernels with which the engine runs on a device."""
    if device.type != "cuda":
        return TorchKernels()
    if importlib.util.find_spec("triton") is None:
        return TorchKernels(torch.channels_last_3d)
    from mimir_precompute.encoders.fast_vae_kernels import TritonKernels

    return TritonKernels()


def arithmetic_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a VAE of some dtype is best computed.

    A processor without matrix units for bfloat16 emulates it: float32 arithmetic on the same bfloat16 weights is then
    faster, and nearer to the truth.
    """
    has_matrix_unit = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return torch.float32 if device.type == "cpu" and not has_matrix_unit() else dtype


def build_fast_encoder(vae: Any, dtype: torch.dtype, device: torch.device) -> FastVaeEncoder:
    """Make the engine from a loaded AutoencoderKLCogVideoX (Any: diffusers has no types), checked on the device.

    Raises: InputError for a kind of VAE it does not know, MachineError if its numbers are not diffusers'.
    """
    weights = {f"encoder.{name}": tensor for name, tensor in vae.encoder.state_dict().items()}
    encoder = FastVaeEncoder(vae.config, weights, kernels_for(device), arithmetic_dtype(dtype, device))
    if device.type == "cuda":
        check_against(vae.encoder, encoder, dtype, device)
    return encoder


@torch.inference_mode()
def check_against(
    truth: nn.Module, encoder: nn.Module, dtype: torch.dtype, device: torch.device, size: tuple[int, int] = (64, 96)
) -> float:
    """Encode two chunks of random pixels with both encoders and return how far they are apart, rms to rms.

    Kernels are compiled for the device that they meet, so the tests' word does not hold for every one: a second of
    work tells before hours of it are wrong.

    Raises: MachineError above SELF_CHECK_TOLERANCE.
    """
    generator = torch.Generator().manual_seed(0)
    clip = (torch.rand(1, 3, 17, *size, generator=generator) * 2 - 1).to(device, dtype)
    worst, caches = 0.0, (None, None)
    for chunk in (clip[:, :, :9], clip[:, :, 9:]):
        want, truth_cache = truth(chunk, conv_cache=caches[0])
        got, own_cache = encoder(chunk, conv_cache=caches[1])
        caches = (truth_cache, own_cache)
        error = (got.float() - want.float()).square().mean().sqrt() / want.float().square().mean().sqrt()
        worst = max(worst, float(error))
    if not worst <= SELF_CHECK_TOLERANCE[dtype]:
        raise MachineError(
            f"the fast VAE engine differs from diffusers by {worst:.2g} on {device} (at most "
            f"{SELF_CHECK_TOLERANCE[dtype]} is rounding): use --vae-engine diffusers here, and report this device"
        )
    return worst


def frame_chunks(num_frames: int, frames_per_chunk: int) -> Iterator[slice]:
    """The frames that the VAE sees at once: 9, 8, 8, … of 8k + 1; all of fewer than 8.

    Source: diffusers AutoencoderKLCogVideoX._encode.
    """
    remainder = num_frames % frames_per_chunk
    for i in range(max(num_frames // frames_per_chunk, 1)):
        start = frames_per_chunk * i + (0 if i == 0 else remainder)
        yield slice(start, min(frames_per_chunk * (i + 1) + remainder, num_frames))
