"""The measurements of vae_encode.py: two engines in turns, the layers of one, memory, distance from float32."""

import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from mimir_precompute.clips.rejection import ClipRejected
from mimir_precompute.config import Bucket, ComputeDType, Geometry, ModelSource, VaeSettings
from mimir_precompute.decoding.clip_pixels import read_clip
from mimir_precompute.encoders.arrays import TORCH_DTYPES
from mimir_precompute.encoders.base import EncoderInput
from mimir_precompute.encoders.fast_vae import FastVaeEncoder, arithmetic_dtype, build_fast_encoder, frame_chunks
from mimir_precompute.encoders.fast_vae_layers import Convolution, Hidden, Normalization, TorchKernels, VaeKernels
from mimir_precompute.encoders.vae import VaeEncoder
from mimir_precompute.model_files import resolve_model
from mimir_precompute.planning.vae_roofline import Device, LayerCost, floor_s, layer_costs
from mimir_precompute.toy.models import load_toy_vae

NUMERICS_SIZES = {"toy": "49x64x96", "real": "9x32x48"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table."""

    model: str
    bucket: Bucket
    dtype: ComputeDType
    batch: int


class Machine:
    """The device under test: its clock, and the rates that bound it."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._rates: dict[str, Device] = {}

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def seconds(self, work: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def rates(self, dtype: str) -> Device:
        """Measured rates of matrix products in a dtype and of copies; the best of several."""
        if dtype not in self._rates:
            size, values = (8192, 2**29) if self.is_cuda else (2048, 2**26)
            compute = arithmetic_dtype(TORCH_DTYPES[dtype], self.device)
            left = torch.randn(size, size, device=self.device).to(compute)
            flops = 2 * size**3 / min(self.seconds(lambda: left @ left) for _ in range(8))
            source = torch.zeros(values, device=self.device)
            target = torch.empty_like(source)
            moved = 8 * values / min(self.seconds(lambda: target.copy_(source)) for _ in range(8))
            self._rates[dtype] = Device(name=f"{self.name}, {dtype}", flops_per_s=flops, bytes_per_s=moved)
        return self._rates[dtype]

    @property
    def name(self) -> str:
        if self.is_cuda:
            return torch.cuda.get_device_name(self.device)
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} thread(s)"


def load_vae(model: str, dtype: str, device: torch.device) -> AutoencoderKLCogVideoX:
    """The toy VAE as it is, or the real one with random weights, rounded to `dtype`."""
    torch.manual_seed(0)
    vae = load_toy_vae() if model == "toy" else AutoencoderKLCogVideoX().eval()
    vae.decoder = None
    for tensor in vae.parameters():
        tensor.data = tensor.data.to(device, TORCH_DTYPES[dtype])
    return vae.requires_grad_(False)


def random_pixels(case: Case, device: torch.device) -> Tensor:
    shape = (case.batch, case.bucket.frames, case.bucket.height, case.bucket.width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=torch.Generator(device))


def encode_diffusers(vae: AutoencoderKLCogVideoX, pixels: Tensor, dtype: str) -> Tensor:
    """What the engine "diffusers" does: (B, F, H, W, 3) uint8 → (B, 2C, T, h, w)."""
    scaled = (pixels.permute(0, 4, 1, 2, 3).float() - 127.5) / 127.5
    moments: Tensor = vae.encode(scaled.to(TORCH_DTYPES[dtype]).contiguous()).latent_dist.parameters
    return moments


def encode_fast(encoder: FastVaeEncoder, pixels: Tensor) -> Tensor:
    return encoder.encode_chunks(pixels[:, chunk] for chunk in frame_chunks(pixels.shape[1], 8))


@torch.inference_mode()
def measure(case: Case, machine: Machine, repeats: int) -> dict[str, Any]:
    """Time both engines in turns, and compare their results."""
    vae = load_vae(case.model, case.dtype, machine.device)
    encoder = build_fast_encoder(vae, TORCH_DTYPES[case.dtype], machine.device)
    pixels = random_pixels(case, machine.device)
    engines: dict[str, Callable[[], Tensor]] = {
        "diffusers": lambda: encode_diffusers(vae, pixels, case.dtype),
        "fast": lambda: encode_fast(encoder, pixels),
    }
    peaks: dict[str, int] = {}
    results: dict[str, Tensor] = {}
    for name, encode in engines.items():
        if machine.is_cuda:
            torch.cuda.reset_peak_memory_stats(machine.device)
        results[name] = encode()
        machine.wait()
        if machine.is_cuda:
            peaks[name] = torch.cuda.max_memory_allocated(machine.device)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(repeats):
        for name, encode in engines.items():
            times[name].append(machine.seconds(encode) / case.batch)
    rates = machine.rates(case.dtype)
    layers = layer_costs(vae.config, case.bucket, arithmetic_dtype(TORCH_DTYPES[case.dtype], machine.device).itemsize)
    flops = sum(layer.flops for layer in layers)
    fast_s, own_s = (statistics.median(times[name]) for name in ("fast", "diffusers"))
    return {
        "model": case.model,
        "size": str(case.bucket),
        "dtype": case.dtype,
        "batch": case.batch,
        "tflop": flops / 1e12,
        "diffusers_s": own_s,
        "fast_s": fast_s,
        "ratio": own_s / fast_s,
        "spread": {name: [min(runs), max(runs)] for name, runs in times.items()},
        "floor_s": floor_s(layers, rates),
        "share_of_floor": floor_s(layers, rates) / fast_s,
        "share_of_matmul_rate": flops / fast_s / rates.flops_per_s,
        "difference": relative_max(results["fast"], results["diffusers"]),
        "peak_bytes": peaks or None,
    }


def relative_max(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


def relative_rms(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).square().mean().sqrt() / want.float().square().mean().sqrt())


class TimedKernels:
    """Kernels that note how long each call takes, by layer and kind. Waiting for each slows the whole."""

    def __init__(self, kernels: VaeKernels, machine: Machine) -> None:
        self.kernels, self.machine = kernels, machine
        self.memory_format = kernels.memory_format
        self.in_channel_multiple = kernels.in_channel_multiple
        self.seconds: dict[tuple[str, str], float] = {}

    def _timed(self, name: str, kind: str, work: Callable[[], Any]) -> Any:  # Any: whatever the kernel returns
        kept: list[Any] = []
        took = self.machine.seconds(lambda: kept.append(work()))
        self.seconds[name, kind] = self.seconds.get((name, kind), 0.0) + took
        return kept[0]

    def convolve(self, padded: Tensor, conv: Convolution) -> Hidden:
        result: Hidden = self._timed(conv.name, "conv", lambda: self.kernels.convolve(padded, conv))
        return result

    def project(self, value: Tensor, conv: Convolution) -> Hidden:
        result: Hidden = self._timed(conv.name, "conv", lambda: self.kernels.project(value, conv))
        return result

    def downsample(self, padded: Tensor, conv: Convolution) -> Hidden:
        result: Hidden = self._timed(conv.name, "conv", lambda: self.kernels.downsample(padded, conv))
        return result

    def norm_silu(self, hidden: Hidden, norm: Normalization, out: Tensor) -> None:
        self._timed(norm.name, "norm", lambda: self.kernels.norm_silu(hidden, norm, out))

    def finish(self, name: str, hidden: Hidden, residual: Hidden | None = None) -> Hidden:
        result: Hidden = self._timed(name, "add", lambda: self.kernels.finish(name, hidden, residual))
        return result


@torch.inference_mode()
def measure_layers(case: Case, machine: Machine, *, each: bool) -> list[dict[str, Any]]:
    """Seconds and floor of every layer of the fast engine, or of each kind of layer in each block."""
    vae = load_vae(case.model, case.dtype, machine.device)
    encoder = build_fast_encoder(vae, TORCH_DTYPES[case.dtype], machine.device)
    pixels = random_pixels(case, machine.device)
    encode_fast(encoder, pixels)
    timed = TimedKernels(encoder.kernels, machine)
    encoder.kernels = timed
    whole_s = machine.seconds(lambda: encode_fast(encoder, pixels))
    rates = machine.rates(case.dtype)
    value_bytes = arithmetic_dtype(TORCH_DTYPES[case.dtype], machine.device).itemsize
    rows: dict[tuple[str, str], dict[str, Any]] = {}

    def row(layer: LayerCost) -> dict[str, Any]:
        key = (layer.name if each else layer.block, layer.kind)
        empty = {"layer": key[0], "kind": key[1], "tflop": 0.0, "gbyte": 0.0, "floor_s": 0.0, "fast_s": 0.0}
        return rows.setdefault(key, empty)

    for layer in layer_costs(vae.config, case.bucket, value_bytes):
        found = row(layer)
        found["tflop"] += layer.flops / 1e12 * case.batch
        found["gbyte"] += layer.nbytes / 1e9 * case.batch
        found["floor_s"] += layer.floor_s(rates) * case.batch
        # pooling is no kernel's: it is in the rest, with the history of convolutions
        found["fast_s"] += timed.seconds.get((layer.name, layer.kind), 0.0)
    rest = {"layer": "pooling, history, pixels", "kind": "rest", "tflop": 0.0, "gbyte": 0.0, "floor_s": 0.0}
    return [*rows.values(), {**rest, "fast_s": whole_s - sum(timed.seconds.values())}]


def measure_memory(case: Case) -> dict[str, int]:
    """Bytes by which each engine's first encoding raises the peak of a process of its own; on a CPU."""
    context = multiprocessing.get_context("spawn")
    peaks: dict[str, int] = {}
    for engine in ("diffusers", "fast"):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_peak_of, args=(case, engine, torch.get_num_threads(), sender))
        process.start()
        peaks[engine] = receiver.recv()
        process.join()
    return peaks


def _peak_of(case: Case, engine: str, threads: int, sender: Any) -> None:  # Any: a connection has no public type
    torch.set_num_threads(threads)
    vae = load_vae(case.model, case.dtype, torch.device("cpu"))
    pixels = random_pixels(case, torch.device("cpu"))
    encoder = build_fast_encoder(vae, TORCH_DTYPES[case.dtype], torch.device("cpu")) if engine == "fast" else None
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak starts anew from here
    before = resource_bytes("VmRSS")
    with torch.inference_mode():
        encode_diffusers(vae, pixels, case.dtype) if encoder is None else encode_fast(encoder, pixels)
    sender.send(resource_bytes("VmHWM") - before)


def resource_bytes(field: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure_through_encoder(case: Case, machine: Machine, clips: int) -> dict[str, Any]:
    """Clips through `VaeEncoder.encode`, bytes on the host to stored bfloat16, and the share that encoding is of it."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        vae = load_toy_vae() if case.model == "toy" else AutoencoderKLCogVideoX()
        vae.to(TORCH_DTYPES[case.dtype]).save_pretrained(folder)
        source = ModelSource(name=folder)
        settings = VaeSettings(source=source, dtype=case.dtype, batch_size=case.batch)
        encoder = VaeEncoder(resolve_model(source, ("weights",)), settings, str(machine.device))
    pixels = random_pixels(case, torch.device("cpu")).numpy()
    launch = [EncoderInput(key=str(i), caption="", clip_pixels=clip) for i, clip in enumerate(pixels)]
    encoder.encode(launch)
    resident = torch.from_numpy(pixels).to(machine.device)
    busy_s = statistics.median(machine.seconds(lambda: encode_fast(encoder.vae.encoder, resident)) for _ in range(5))
    wall_s = machine.seconds(lambda: [encoder.encode(launch) for _ in range(clips)]) / clips
    return {"clip_s": wall_s / case.batch, "busy": busy_s / wall_s}


@torch.inference_mode()
def measure_numerics(model: str, machine: Machine, clips: Path) -> list[dict[str, Any]]:
    """How far each engine is from diffusers in float32, on real clips (random ones where there are none)."""
    bucket = Bucket.parse(NUMERICS_SIZES[model])
    found = real_clips(clips, bucket)
    vaes = {dtype: load_vae(model, dtype, machine.device) for dtype in ("float32", "bfloat16")}
    half = torch.bfloat16
    fast = {dtype: build_fast_encoder(vaes[dtype], TORCH_DTYPES[dtype], machine.device) for dtype in vaes}
    in_bfloat16 = FastVaeEncoder(vaes["bfloat16"].config, vaes["bfloat16"].state_dict(), TorchKernels(), half)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "fast, float32": lambda pixels: encode_fast(fast["float32"], pixels),
        "diffusers, bfloat16": lambda pixels: encode_diffusers(vaes["bfloat16"], pixels, "bfloat16"),
        f"fast, bfloat16 ({fast['bfloat16'].dtype} arithmetic)": lambda pixels: encode_fast(fast["bfloat16"], pixels),
    }
    if fast["bfloat16"].dtype != half:
        ways["fast, bfloat16 (arithmetic in it too)"] = lambda pixels: encode_fast(in_bfloat16, pixels)
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for clip in found.values():
        pixels = torch.from_numpy(clip)[None].to(machine.device)
        truth = encode_diffusers(vaes["float32"], pixels, "float32")
        for name, way in ways.items():
            got = way(pixels)
            errors[name].append((relative_rms(got, truth), relative_max(got, truth)))
    return [
        {
            "model": model,
            "size": str(bucket),
            "clips": len(found),
            "way": name,
            "rms": statistics.mean(rms for rms, _ in pairs),
            "largest": max(largest for _, largest in pairs),
        }
        for name, pairs in errors.items()
    ]


def real_clips(folder: Path, bucket: Bucket) -> dict[str, np.ndarray]:
    """The clips of a folder that fill the bucket; moving noise where there is no such folder."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.m[po][4v]")) if folder.is_dir() else []:
        try:
            found[file.name] = read_clip(file, geometry=Geometry(buckets=(bucket,), fps=8.0)).pixels
        except ClipRejected:
            continue
    if not found:
        rng = np.random.default_rng(0)
        found["noise"] = rng.integers(0, 256, (bucket.frames, bucket.height, bucket.width, 3), dtype=np.uint8)
    return found
