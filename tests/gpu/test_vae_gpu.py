"""The fast VAE engine on a CUDA device: fused kernels against diffusers there. Speed is benchmarks/vae_encode.py's."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from mimir_precompute.config import ModelSource, VaeSettings
from mimir_precompute.encoders.arrays import keep_kernels_repeatable
from mimir_precompute.encoders.base import EncoderInput
from mimir_precompute.encoders.device_copies import DeviceCopies
from mimir_precompute.encoders.fast_vae import FastVaeEncoder, build_fast_encoder, frame_chunks
from mimir_precompute.encoders.vae import VaeEncoder
from mimir_precompute.model_files import resolve_model
from mimir_precompute.toy.models import write_toy_models

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed; it comes with torch for CUDA"),
]

CUDA = torch.device("cuda")


def random_vae(dtype: torch.dtype, **config: Any) -> AutoencoderKLCogVideoX:
    """Random weights on the GPU; `config` as the class has it."""
    keep_kernels_repeatable()
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(**config).eval().requires_grad_(False)
    for name, tensor in vae.encoder.named_parameters():
        if "norm" in name:
            tensor.add_(torch.randn_like(tensor) * 0.3)
    return vae.to(CUDA, dtype)


def random_pixels(frames: int, height: int, width: int, batch: int = 1) -> Tensor:
    """(B, F, H, W, 3) uint8 on the GPU."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(batch, 3, frames, height // 8, width // 8, generator=generator)
    smooth = torch.nn.functional.interpolate(blocks, (frames, height, width), mode="trilinear")
    return (smooth * 255).permute(0, 2, 3, 4, 1).to(torch.uint8).to(CUDA)


def encode_fast(encoder: FastVaeEncoder, pixels: Tensor) -> Tensor:
    return encoder.encode_chunks(pixels[:, chunk] for chunk in frame_chunks(pixels.shape[1], 8))


def encode_diffusers(vae: AutoencoderKLCogVideoX, pixels: Tensor, dtype: torch.dtype) -> Tensor:
    scaled = ((pixels.permute(0, 4, 1, 2, 3).float() - 127.5) / 127.5).to(dtype).contiguous()
    moments: Tensor = vae.encode(scaled).latent_dist.parameters
    return moments


def relative_error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


@torch.inference_mode()
@pytest.mark.parametrize("frames", [1, 9, 17, 49])
@pytest.mark.parametrize(("height", "width", "batch"), [(64, 96, 1), (48, 80, 3)])
def test_float32_equals_diffusers_encode(frames: int, height: int, width: int, batch: int) -> None:
    vae = random_vae(torch.float32)
    pixels = random_pixels(frames, height, width, batch)
    want = encode_diffusers(vae, pixels, torch.float32)
    # two orders of addition over some thirty layers, neither of them the truth
    assert relative_error(encode_fast(build_fast_encoder(vae, torch.float32, CUDA), pixels), want) <= 1e-4


@torch.inference_mode()
def test_bfloat16_is_no_further_from_float32_than_diffusers_is() -> None:
    pixels = random_pixels(17, 240, 368)
    truth = encode_diffusers(random_vae(torch.float32), pixels, torch.float32)
    half = random_vae(torch.bfloat16)
    own = encode_diffusers(half, pixels, torch.bfloat16)
    got = encode_fast(build_fast_encoder(half, torch.bfloat16, CUDA), pixels)
    errors = [float((moments.float() - truth).square().mean().sqrt()) for moments in (got, own)]
    assert errors[0] <= 1.05 * errors[1]


@torch.inference_mode()
def test_a_clip_of_full_size_fits_and_its_clips_do_not_change_each_other() -> None:
    encoder = build_fast_encoder(random_vae(torch.bfloat16), torch.bfloat16, CUDA)
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free GPU memory")
    pixels = random_pixels(17, 480, 720, batch=2)
    together = encode_fast(encoder, pixels)
    assert together.shape == (2, 32, 5, 60, 90)
    for i in range(2):
        assert relative_error(encode_fast(encoder, pixels[i : i + 1]), together[i : i + 1]) <= 2**-6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("toy")
    write_toy_models(directory, 0)
    return directory / "models"


@pytest.fixture(scope="module")
def make_encoder(models: Path) -> Callable[..., VaeEncoder]:
    def make(**settings: Any) -> VaeEncoder:
        source = ModelSource(name=str(models / "vae"))
        return VaeEncoder(resolve_model(source, ("weights",)), VaeSettings(source=source, **settings), "cuda")

    return make


def test_both_engines_give_the_pipeline_the_same_moments_and_equal_calls_equal_bytes(
    make_encoder: Callable[..., VaeEncoder],
) -> None:
    pixels = random_pixels(17, 64, 96, batch=2).cpu().numpy()
    fast, own = make_encoder(engine="fast"), make_encoder(engine="diffusers")
    assert relative_error(fast.moments(pixels), own.moments(pixels)) <= 2**-5
    again = fast.moments(np.ascontiguousarray(pixels))
    assert torch.equal(again, fast.moments(pixels))


def test_batches_queued_from_arrays_that_change_give_what_each_gives_alone(
    make_encoder: Callable[..., VaeEncoder],
) -> None:
    encoder = make_encoder(engine="fast")
    clips = [random_pixels(17, 64, 96)[0].cpu().numpy() + np.uint8(seed) for seed in range(6)]
    alone = [encoder.encode([EncoderInput(key="k", caption="", clip_pixels=clip)])[0] for clip in clips]
    started = []
    for clip in clips:
        started.append(encoder.start([EncoderInput(key="k", caption="", clip_pixels=clip)]))
        clip[:] = 0  # as a buffer that a decoder uses again
    with ThreadPoolExecutor(1) as writer:
        for want, pending in zip(alone, started, strict=True):
            (got,) = writer.submit(pending.result).result()
            np.testing.assert_array_equal(got.tensors["vae_moments"].array, want.tensors["vae_moments"].array)


@torch.inference_mode()
def test_what_is_uploaded_and_fetched_again_is_unchanged_while_the_device_is_busy() -> None:
    copies = DeviceCopies(CUDA)
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 256, (9, 480, 720, 3), dtype=np.uint8) for _ in range(8)]
    weights = torch.randn(4096, 4096, device=CUDA)
    fetched = []
    for array in arrays:
        moved = copies.upload(array)
        for _ in range(20):  # some milliseconds of work before what is uploaded is read
            weights = (weights @ weights).clamp(-1, 1)
        fetched.append(copies.download(moved.float() + weights[0, 0] * 0, "f32"))
        del moved  # its memory may be handed to the next upload
    for array, download in zip(arrays, fetched, strict=True):
        np.testing.assert_array_equal(download.wait().array, array.astype(np.float32))
