"""What encoding a clip must cost: operations and bytes of every layer of the CogVideoX VAE's encoder. No torch here.

Bytes are those of one reading of what a pass reads and one writing of what it writes, at the fewest passes that we
know of (encoders/fast_vae_kernels.py): per norm one reading for its statistics and one pass with SiLU, per residual
block one pass that adds. A device's floor for a layer is the longer of its arithmetic and its traffic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mimir_precompute.config import Bucket
from mimir_precompute.identity import VAE_FRAMES_PER_CHUNK

LayerKind = Literal["conv", "norm", "add", "pool"]

DEFAULT_CONFIG: Mapping[str, Any] = {
    "in_channels": 3,
    "block_out_channels": (128, 256, 256, 512),
    "latent_channels": 16,
    "layers_per_block": 3,
    "temporal_compression_ratio": 4,
}
"""Of diffusers' AutoencoderKLCogVideoX, and of the VAEs of CogVideoX 2B and 5B: what a config.json may leave out."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """The rates that bound a device."""

    name: str
    flops_per_s: float
    bytes_per_s: float


DEVICES: Mapping[str, Device] = {
    # measured matrix products reach four fifths of the data sheet; the other two are put at that share
    "h200": Device(name="H200, bf16", flops_per_s=790e12, bytes_per_s=4.8e12),
    "h100": Device(
        name="H100 SXM, bf16 (data sheet, 80 % of its matmul rate)", flops_per_s=790e12, bytes_per_s=3.35e12
    ),
    "a100": Device(
        name="A100 80 GB, bf16 (data sheet, 80 % of its matmul rate)", flops_per_s=250e12, bytes_per_s=2.0e12
    ),
}


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One layer over all chunks of one clip."""

    name: str
    """As in diffusers' state dict, without "encoder."; a block's own name for what joins it."""
    kind: LayerKind
    flops: int
    """A multiplication and an addition are two."""
    nbytes: int

    @property
    def block(self) -> str:
        """down_blocks.0, mid_block, conv_in, …"""
        parts = self.name.split(".")
        return ".".join(parts[:2]) if parts[0] == "down_blocks" else parts[0]

    def floor_s(self, device: Device) -> float:
        """The least time that it can take."""
        return max(self.flops / device.flops_per_s, self.nbytes / device.bytes_per_s)


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """A chunk on its way through the encoder."""

    channels: int
    frames: int
    height: int
    width: int

    @property
    def positions(self) -> int:
        return self.frames * self.height * self.width

    @property
    def size(self) -> int:
        return self.channels * self.positions


def chunk_frames(num_frames: int) -> tuple[int, ...]:
    """How many frames the VAE sees at each call: 49 → 9, 8, 8, 8, 8, 8."""
    whole = max(num_frames // VAE_FRAMES_PER_CHUNK, 1)
    first = num_frames - (whole - 1) * VAE_FRAMES_PER_CHUNK
    return (first, *(VAE_FRAMES_PER_CHUNK,) * (whole - 1))


def layer_costs(config: Mapping[str, Any], bucket: Bucket, bytes_per_value: int) -> tuple[LayerCost, ...]:
    """The layers of the encoder in the order in which they run, for one clip.

    Args:
        config: the values of the VAE's config.json.
        bytes_per_value: 2 for bfloat16, 4 for float32.
    """
    known = {**DEFAULT_CONFIG, **{key: value for key, value in config.items() if key in DEFAULT_CONFIG}}
    totals: dict[tuple[str, LayerKind], LayerCost] = {}
    for frames in chunk_frames(bucket.frames):
        chunk = _Chunk(known, bytes_per_value)
        chunk.run(_Shape(channels=known["in_channels"], frames=frames, height=bucket.height, width=bucket.width))
        for layer in chunk.layers:
            before = totals.get((layer.name, layer.kind))
            totals[layer.name, layer.kind] = (
                layer
                if before is None
                else replace(before, flops=before.flops + layer.flops, nbytes=before.nbytes + layer.nbytes)
            )
    return tuple(totals.values())


class _Chunk:
    """Walks one chunk through the encoder and notes what every layer costs."""

    def __init__(self, config: Mapping[str, Any], bytes_per_value: int) -> None:
        self.config = config
        self.bytes_per_value = bytes_per_value
        self.layers: list[LayerCost] = []

    def run(self, pixels: _Shape) -> None:
        widths: Sequence[int] = self.config["block_out_channels"]
        num_time_levels = int(self.config["temporal_compression_ratio"]).bit_length() - 1
        shape = self._conv("conv_in", pixels, widths[0])
        self._note("conv_in", "add", 0, 2 * shape.size)
        for i, width in enumerate(widths):
            for k in range(self.config["layers_per_block"]):
                shape = self._resnet(f"down_blocks.{i}.resnets.{k}", shape, width)
            if i < len(widths) - 1:
                name = f"down_blocks.{i}.downsamplers.0"
                shape = self._downsample(name, shape, compress_time=i < num_time_levels)
        for k in range(2):
            shape = self._resnet(f"mid_block.resnets.{k}", shape, shape.channels)
        self._norm("norm_out", shape, reads=1)
        self._conv("conv_out", shape, 2 * self.config["latent_channels"])

    def _note(self, name: str, kind: LayerKind, flops: int, values: int) -> None:
        self.layers.append(LayerCost(name=name, kind=kind, flops=flops, nbytes=values * self.bytes_per_value))

    def _conv(self, name: str, x: _Shape, width: int, taps: int = 27) -> _Shape:
        out = replace(x, channels=width)
        weights = x.channels * width * taps
        self._note(name, "conv", 2 * weights * x.positions, x.size + out.size + weights)
        return out

    def _norm(self, name: str, x: _Shape, *, reads: int) -> None:
        self._note(name, "norm", 0, (reads + 1) * x.size)

    def _resnet(self, name: str, x: _Shape, width: int) -> _Shape:
        # what a norm reads to measure was measured by the pass before, except after the first convolution
        self._norm(f"{name}.norm1", x, reads=1)
        out = self._conv(f"{name}.conv1", x, width)
        self._norm(f"{name}.norm2", out, reads=2)
        self._conv(f"{name}.conv2", out, width)
        if x.channels != width:
            self._conv(f"{name}.conv_shortcut", x, width, taps=1)
        self._note(name, "add", 0, 3 * out.size)
        return out

    def _downsample(self, name: str, x: _Shape, *, compress_time: bool) -> _Shape:
        pooled = replace(x, frames=(x.frames + 1) // 2) if compress_time else x
        self._note(name, "pool", 0, x.size + pooled.size)
        out = replace(pooled, height=x.height // 2, width=x.width // 2)
        weights = x.channels * x.channels * 9
        self._note(name, "conv", 2 * weights * out.positions, pooled.size + out.size + weights)
        self._note(name, "add", 0, 2 * out.size)
        return out


def floor_s(layers: Sequence[LayerCost], device: Device) -> float:
    """The least time for one clip, layer after layer."""
    return sum(layer.floor_s(device) for layer in layers)


def block_tflops(layers: Sequence[LayerCost]) -> dict[str, float]:
    """TFLOP of each block, in order."""
    totals: dict[str, float] = {}
    for layer in layers:
        totals[layer.block] = totals.get(layer.block, 0.0) + layer.flops / 1e12
    return totals
