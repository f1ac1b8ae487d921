"""The fast VAE engine gives diffusers' numbers; diffusers' own `encode`, in float32, is the truth."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from safetensors.torch import load_file
from torch import Tensor

from mimir_precompute.config import ModelSource, VaeSettings
from mimir_precompute.encoders.base import EncoderInput
from mimir_precompute.encoders.fast_vae import (
    FastVaeEncoder,
    arithmetic_dtype,
    build_fast_encoder,
    check_against,
    frame_chunks,
)
from mimir_precompute.encoders.fast_vae_layers import TorchKernels
from mimir_precompute.encoders.vae import VaeEncoder
from mimir_precompute.model_files import resolve_model
from mimir_precompute.toy.models import load_toy_vae
from mimir_shared.errors import InputError, MachineError
from tests.conftest import REPOSITORY
from tests.programs import run

CPU = torch.device("cpu")
# four levels, the third of which halves the size but not the time, and a width that changes where the size does not
UNLIKE_THE_TOY: dict[str, Any] = {
    "block_out_channels": (8, 16, 16, 24),
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "norm_eps": 1e-4,
}


def random_vae(seed: int = 0, **config: Any) -> AutoencoderKLCogVideoX:
    """Random weights, with norms and biases that are not the identity."""
    torch.manual_seed(seed)
    vae = AutoencoderKLCogVideoX(**config).eval().requires_grad_(False)
    for name, tensor in vae.encoder.named_parameters():
        if "norm" in name:
            tensor.add_(torch.randn_like(tensor) * 0.3)
    return vae


@pytest.fixture(scope="module")
def vaes() -> dict[str, AutoencoderKLCogVideoX]:
    return {"toy": load_toy_vae(), "random": random_vae(**UNLIKE_THE_TOY)}


def fast_encoder(
    vae: AutoencoderKLCogVideoX, dtype: torch.dtype = torch.float32, kernels: TorchKernels | None = None
) -> FastVaeEncoder:
    return FastVaeEncoder(vae.config, vae.state_dict(), kernels or TorchKernels(), dtype)


def random_pixels(frames: int, height: int, width: int, batch: int = 1) -> Tensor:
    """(B, F, H, W, 3) uint8: random blocks that drift, so that neighbours in space and time are alike."""
    generator = torch.Generator().manual_seed(frames * 1000 + height + width)
    blocks = torch.rand(batch, 3, frames, height // 8, width // 8, generator=generator)
    smooth = torch.nn.functional.interpolate(blocks, (frames, height, width), mode="trilinear")
    noise = torch.rand(batch, 3, frames, height, width, generator=generator)
    return ((smooth * 0.8 + noise * 0.2) * 255).permute(0, 2, 3, 4, 1).to(torch.uint8)


def scaled(pixels: Tensor) -> Tensor:
    """(B, F, H, W, 3) uint8 → (B, 3, F, H, W) float32 in -1..1."""
    return (pixels.double() / 255 * 2 - 1).float().permute(0, 4, 1, 2, 3).contiguous()


def chunks_of(pixels: Tensor) -> list[Tensor]:
    return [pixels[:, chunk] for chunk in frame_chunks(pixels.shape[1], 8)]


def relative_error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


@torch.inference_mode()
@pytest.mark.parametrize("frames", [1, 9, 17, 25, 49])
@pytest.mark.parametrize(("height", "width", "batch"), [(32, 48, 1), (48, 16, 3)])
@pytest.mark.parametrize("name", ["toy", "random"])
def test_float32_equals_diffusers_encode(
    vaes: dict[str, AutoencoderKLCogVideoX], name: str, frames: int, height: int, width: int, batch: int
) -> None:
    vae = vaes[name]
    pixels = random_pixels(frames, height, width, batch)
    want = vae.encode(scaled(pixels)).latent_dist.parameters
    assert relative_error(fast_encoder(vae).encode_chunks(chunks_of(pixels)), want) <= 1e-5


@torch.inference_mode()
@pytest.mark.parametrize(("height", "width", "batch"), [(64, 96, 1), (16, 16, 3), (80, 48, 1)])
def test_float32_equals_diffusers_at_other_sizes(
    vaes: dict[str, AutoencoderKLCogVideoX], height: int, width: int, batch: int
) -> None:
    pixels = random_pixels(9, height, width, batch)
    for vae in vaes.values():
        want = vae.encode(scaled(pixels)).latent_dist.parameters
        assert relative_error(fast_encoder(vae).encode_chunks(chunks_of(pixels)), want) <= 1e-5


@torch.inference_mode()
def test_float32_equals_diffusers_with_the_channels_of_the_real_vae() -> None:
    vae = random_vae(up_block_types=("CogVideoXUpBlock3D",) * 4, layers_per_block=1)
    pixels = random_pixels(17, 16, 32)
    want = vae.encode(scaled(pixels)).latent_dist.parameters
    assert relative_error(fast_encoder(vae).encode_chunks(chunks_of(pixels)), want) <= 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("use_cache", [True, False])
def test_each_chunk_equals_diffusers_encoder_with_and_without_the_cache(
    vaes: dict[str, AutoencoderKLCogVideoX], use_cache: bool
) -> None:
    vae = vaes["random"]
    fast = fast_encoder(vae)
    caches: tuple[Any, Any] = (None, None)
    for chunk in chunks_of(random_pixels(25, 32, 32)):
        want, own_cache = vae.encoder(scaled(chunk), conv_cache=caches[0])
        got, fast_cache = fast(scaled(chunk), conv_cache=caches[1])
        assert relative_error(got, want) <= 1e-5
        caches = (own_cache, fast_cache) if use_cache else (None, None)


@torch.inference_mode()
def test_chunks_cache_and_first_frame_all_show_in_the_result(vaes: dict[str, AutoencoderKLCogVideoX]) -> None:
    # what the tests above would not see if it made no difference
    fast = fast_encoder(vaes["random"])
    pixels = random_pixels(17, 32, 32)
    right = fast.encode_chunks(chunks_of(pixels))
    at_once = fast(scaled(pixels))[0]
    without_cache = torch.cat([fast(scaled(chunk))[0] for chunk in chunks_of(pixels)], dim=2)
    other_chunks = fast.encode_chunks([pixels[:, :8], pixels[:, 8:16]])
    assert relative_error(at_once, right) > 1e-3
    assert relative_error(without_cache[:, :, 3:], right[:, :, 3:]) > 1e-3
    assert relative_error(other_chunks[:, :, :2], right[:, :, :2]) > 1e-3


@torch.inference_mode()
def test_channels_last_gives_the_same_numbers(vaes: dict[str, AutoencoderKLCogVideoX]) -> None:
    pixels = random_pixels(17, 32, 48, batch=2)
    for vae in vaes.values():
        want = vae.encode(scaled(pixels)).latent_dist.parameters
        fast = fast_encoder(vae, kernels=TorchKernels(torch.channels_last_3d))
        assert relative_error(fast.encode_chunks(chunks_of(pixels)), want) <= 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("name", ["toy", "random"])
def test_bfloat16_is_no_further_from_float32_than_diffusers_is(
    vaes: dict[str, AutoencoderKLCogVideoX], name: str
) -> None:
    vae = vaes[name]
    pixels = random_pixels(17, 64, 96)
    truth = vae.encode(scaled(pixels)).latent_dist.parameters
    half = type(vae).from_config(vae.config).eval()
    half.load_state_dict(vae.state_dict())
    half = half.bfloat16()
    own = half.encode(scaled(pixels).bfloat16()).latent_dist.parameters
    own_error = (own.float() - truth).square().mean().sqrt()
    # as on a GPU, whose arithmetic is bfloat16, and as on this processor
    for dtype in {torch.bfloat16, arithmetic_dtype(torch.bfloat16, CPU)}:
        got = fast_encoder(half, dtype).encode_chunks(chunks_of(pixels))
        assert (got.float() - truth).square().mean().sqrt() <= 1.05 * own_error, dtype


@torch.inference_mode()
def test_weights_may_come_straight_from_the_safetensors_file(models: Path) -> None:
    vae = AutoencoderKLCogVideoX.from_pretrained(models / "vae", torch_dtype=torch.float32).eval()
    weights = load_file(models / "vae" / "diffusion_pytorch_model.safetensors")
    weights = {name: tensor.float() for name, tensor in weights.items()}
    encoder = FastVaeEncoder(vae.config, weights, TorchKernels(), torch.float32)
    chunks = chunks_of(random_pixels(9, 16, 16))
    assert torch.equal(encoder.encode_chunks(chunks), fast_encoder(vae).encode_chunks(chunks))


@pytest.fixture(scope="module")
def make_encoder(models: Path) -> Callable[..., VaeEncoder]:
    def make(**settings: Any) -> VaeEncoder:
        source = ModelSource(name=str(models / "vae"))
        return VaeEncoder(resolve_model(source, ("weights",)), VaeSettings(source=source, **settings), "cpu")

    return make


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2**-8), ("bfloat16", 2**-6)])
def test_cached_latents_of_both_engines_agree_to_the_rounding(
    make_encoder: Callable[..., VaeEncoder], dtype: str, tolerance: float
) -> None:
    clips = random_pixels(17, 32, 48, batch=3).numpy()
    batch = [EncoderInput(key=str(i), caption="", clip_pixels=clip) for i, clip in enumerate(clips)]
    fast, own = (make_encoder(dtype=dtype, engine=engine).encode(batch) for engine in ("fast", "diffusers"))
    for ours, theirs in zip(fast, own, strict=True):
        got, want = (encoded.tensors["vae_moments"].to_float32() for encoded in (ours, theirs))
        assert got.shape == want.shape == (16, 5, 8, 12)
        assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@torch.inference_mode()
def test_a_quant_conv_is_applied(models: Path, tmp_path: Path) -> None:
    vae = AutoencoderKLCogVideoX.from_pretrained(models / "vae")
    torch.manual_seed(0)
    # diffusers makes it as wide as the decoder's output, so that no other number of latent channels fits
    config = {**vae.config, "use_quant_conv": True, "latent_channels": 3, "scaling_factor": 1.0}
    with_quant = AutoencoderKLCogVideoX.from_config(config).eval()
    with_quant.save_pretrained(tmp_path)
    source = ModelSource(name=str(tmp_path))
    encoder = VaeEncoder(resolve_model(source, ("weights",)), VaeSettings(source=source, dtype="float32"), "cpu")
    pixels = random_pixels(9, 16, 16)
    want = with_quant.encode(scaled(pixels)).latent_dist.parameters
    assert relative_error(encoder.moments(pixels.numpy()), want) <= 1e-5


def test_an_unknown_engine_is_refused_before_anything_is_read(toy_world: Path, tmp_path: Path) -> None:
    options = ("--cache", tmp_path / "cache", "--models", toy_world / "models", "--preset", "tiny")
    done = run("mimir-precompute", "encode", toy_world / "clips", *options, "--vae-engine", "quick")
    assert done.code == 2
    assert "--vae-engine 'quick': expected one of fast, diffusers" in done.err


def test_the_engine_is_part_of_what_a_cache_was_made_with(toy_world: Path, tmp_path: Path) -> None:
    options = ("--cache", tmp_path / "cache", "--models", toy_world / "models", "--features", "latents")
    first = run("mimir-precompute", "encode", toy_world / "clips", *options, "--preset", "tiny", "--limit", 1)
    assert first.code == 0, first.err
    other = run("mimir-precompute", "encode", *options, "--vae-engine", "diffusers")
    assert other.code == 4
    assert "engine: 'fast' → 'diffusers'" in other.err


def test_another_activation_is_refused_with_the_way_out() -> None:
    vae = random_vae(**UNLIKE_THE_TOY, act_fn="gelu")
    with pytest.raises(InputError, match=r"activation is 'gelu'.*--vae-engine diffusers"):
        build_fast_encoder(vae, torch.float32, CPU)


def test_the_self_check_passes_the_engine_and_refuses_other_numbers(vaes: dict[str, AutoencoderKLCogVideoX]) -> None:
    vae, other = vaes["random"], random_vae(seed=1, **UNLIKE_THE_TOY)
    assert check_against(vae.encoder, fast_encoder(vae), torch.float32, CPU, size=(16, 16)) <= 1e-5
    with pytest.raises(MachineError, match=r"differs from diffusers by .* use --vae-engine diffusers here"):
        check_against(vae.encoder, fast_encoder(other), torch.float32, CPU, size=(16, 16))


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed; it comes with torch for CUDA")
def test_the_fused_kernels_equal_diffusers_in_tritons_interpreter() -> None:
    code = (
        "import torch\n"
        "from mimir_precompute.encoders.fast_vae_kernels import TritonKernels\n"
        "from tests.precompute.encoders import test_fast_vae as own\n"
        "vae = own.random_vae(**own.UNLIKE_THE_TOY)\n"
        "pixels = own.random_pixels(17, 16, 32, batch=2)\n"
        "with torch.inference_mode():\n"
        "    want = vae.encode(own.scaled(pixels)).latent_dist.parameters\n"
        "    got = own.fast_encoder(vae, kernels=TritonKernels()).encode_chunks(own.chunks_of(pixels))\n"
        "assert own.relative_error(got, want) <= 1e-5, own.relative_error(got, want)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
