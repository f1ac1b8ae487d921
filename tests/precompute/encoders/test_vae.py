"""Latents are the VAE's own numbers: diffusers' calls, written plainly, are the truth."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimir_precompute.config import ModelSource, VaeSettings
from mimir_precompute.encoders.arrays import to_feature
from mimir_precompute.encoders.base import Encoded, EncoderInput
from mimir_precompute.encoders.vae import PendingLatents, VaeEncoder, clip_generator
from mimir_precompute.model_files import resolve_model
from mimir_precompute.shard_writer import check_tensors
from mimir_shared.errors import InputError
from mimir_shared.features import TensorSpec, float32_to_bf16_bits


def relative_error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


def moving_square(frames: int, seed: int = 0, height: int = 32, width: int = 48) -> np.ndarray:
    """(F, H, W, 3) uint8: a bright square that moves over a gradient."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 120, width, dtype=np.uint8)
    clip = np.broadcast_to(ramp[None, None, :, None], (frames, height, width, 3)).copy()
    top, left, colour = rng.integers(0, height - 16), rng.integers(0, width - 26), rng.integers(128, 255, 3)
    for t in range(frames):
        clip[t, top : top + 16, left + t : left + t + 16] = colour
    return clip


@pytest.fixture(scope="module")
def make_vae(models: Path) -> Callable[..., VaeEncoder]:
    def make(folder: Path = models / "vae", **settings: Any) -> VaeEncoder:
        source = ModelSource(name=str(folder))
        chosen = VaeSettings(source=source, **{"dtype": "float32", **settings})
        return VaeEncoder(resolve_model(source, ("weights",)), chosen, "cpu")

    return make


@pytest.fixture(scope="module")
def own_vae(models: Path) -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX.from_pretrained(models / "vae", torch_dtype=torch.float32).eval()


def as_diffusers_wants(clip: np.ndarray) -> Tensor:
    """(F, H, W, 3) uint8 → (1, 3, F, H, W) in -1..1."""
    return torch.from_numpy(clip.astype(np.float64) / 255 * 2 - 1).float().permute(3, 0, 1, 2)[None].contiguous()


@torch.inference_mode()
@pytest.mark.parametrize("frames", [1, 9, 17])
def test_moments_equal_diffusers_encode(
    make_vae: Callable[..., VaeEncoder], own_vae: AutoencoderKLCogVideoX, frames: int
) -> None:
    encoder = make_vae()
    clips = [moving_square(frames, seed) for seed in (0, 1)]
    batch = [EncoderInput(key="k", caption="", clip_pixels=clip) for clip in clips]
    for clip, encoded in zip(clips, encoder.encode(batch), strict=True):
        want = own_vae.encode(as_diffusers_wants(clip)).latent_dist.parameters[0]
        got = encoder.moments(clip[None])[0]
        assert want.shape == (16, (frames - 1) // 4 + 1, 8, 12)
        assert relative_error(got, want) <= 1e-5
        stored = encoded.tensors["vae_moments"]
        assert stored.dtype == "bf16"
        np.testing.assert_array_equal(stored.array, float32_to_bf16_bits(got.numpy()))


@torch.inference_mode()
def test_several_clips_a_launch_change_no_more_than_the_last_bits(make_vae: Callable[..., VaeEncoder]) -> None:
    clips = np.stack([moving_square(9, seed) for seed in range(3)])
    encoder = make_vae()
    together = encoder.moments(clips)
    alone = torch.cat([encoder.moments(clip[None]) for clip in clips])
    assert relative_error(together, alone) <= 1e-5
    inputs = [EncoderInput(key=str(i), caption="", clip_pixels=clip) for i, clip in enumerate(clips)]
    for encoded, want in zip(make_vae(batch_size=2).encode(inputs), together, strict=True):
        assert relative_error(torch.from_numpy(encoded.tensors["vae_moments"].to_float32()), want) <= 2**-8


@torch.inference_mode()
def test_bfloat16_moments_equal_diffusers_encode_bit_for_bit(make_vae: Callable[..., VaeEncoder], models: Path) -> None:
    own = AutoencoderKLCogVideoX.from_pretrained(models / "vae", torch_dtype=torch.bfloat16).eval()
    clip = moving_square(9)
    encoder = make_vae(dtype="bfloat16", engine="diffusers")
    encoded = encoder.encode([EncoderInput(key="k", caption="", clip_pixels=clip)])[0]
    want = own.encode(as_diffusers_wants(clip).to(torch.bfloat16)).latent_dist.parameters[0]
    np.testing.assert_array_equal(encoded.tensors["vae_moments"].array, to_feature(want).array)


@torch.inference_mode()
def test_tiling_equals_diffusers_tiling_and_not_the_whole(
    make_vae: Callable[..., VaeEncoder], models: Path, tmp_path: Path
) -> None:
    # sizes at which the tiles fit: 48x80 pixels each, and 40x64 from one to the next
    folder = Path(shutil.copytree(models / "vae", tmp_path / "vae"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sample_height": 96, "sample_width": 160}))
    own = AutoencoderKLCogVideoX.from_pretrained(folder, torch_dtype=torch.float32).eval()
    own.enable_tiling()
    clip = moving_square(1, height=64, width=96)
    tiled = make_vae(folder, tiling=True).moments(clip[None])
    assert relative_error(tiled, own.encode(as_diffusers_wants(clip)).latent_dist.parameters) <= 1e-5
    assert relative_error(tiled, make_vae().moments(clip[None])) > 1e-3


@torch.inference_mode()
def test_mean_and_sample_come_from_the_same_posterior(
    make_vae: Callable[..., VaeEncoder], own_vae: AutoencoderKLCogVideoX
) -> None:
    clip = moving_square(9)
    encoder = make_vae(stored=("mean", "sample"), seed=3)
    encoded = encoder.encode([EncoderInput(key="clip 7", caption="", clip_pixels=clip)])[0]
    assert set(encoded.tensors) == {"vae_mean", "vae_sample"}
    posterior = own_vae.encode(as_diffusers_wants(clip)).latent_dist
    mean = torch.from_numpy(encoded.tensors["vae_mean"].to_float32())
    assert relative_error(mean, posterior.mean[0]) <= 2**-8
    sample = torch.from_numpy(encoded.tensors["vae_sample"].to_float32())
    assert relative_error(sample, posterior.sample(clip_generator(3, "clip 7"))[0]) <= 2**-8


def test_a_sample_is_keyed_by_seed_and_clip_and_not_by_its_place(make_vae: Callable[..., VaeEncoder]) -> None:
    def samples(seed: int, keys: list[str]) -> dict[str, bytes]:
        batch = [EncoderInput(key=key, caption="", clip_pixels=moving_square(1)) for key in keys]
        encoded = make_vae(stored=("sample",), seed=seed).encode(batch)
        return {key: e.tensors["vae_sample"].array.tobytes() for key, e in zip(keys, encoded, strict=True)}

    first = samples(0, ["a", "b"])
    assert first["a"] != first["b"]
    assert samples(0, ["b", "a"]) == first
    assert samples(1, ["a", "b"])["a"] != first["a"]


@torch.inference_mode()
def test_decode_gives_back_the_clip_and_equals_diffusers_decode(
    make_vae: Callable[..., VaeEncoder], own_vae: AutoencoderKLCogVideoX
) -> None:
    clip = moving_square(9, height=64, width=96)
    encoder = make_vae()
    moments = encoder.encode([EncoderInput(key="k", caption="", clip_pixels=clip)])[0].tensors["vae_moments"]
    decoded = encoder.decode_moments(moments.to_float32())
    assert (decoded.shape, decoded.dtype) == (clip.shape, np.uint8)
    mean = torch.from_numpy(moments.to_float32()[:8])[None]
    frames = own_vae.decode(mean).sample[0].permute(1, 2, 3, 0).numpy()
    np.testing.assert_allclose(decoded, np.clip((frames + 1) / 2 * 255, 0, 255), atol=0.51)
    # the toy VAE is trained on shapes like this one, so the picture itself must come back
    error = np.mean((decoded.astype(float) - clip) ** 2)
    assert 10 * np.log10(255**2 / error) > 18


def test_latents_have_no_empty_prompt(make_vae: Callable[..., VaeEncoder]) -> None:
    assert make_vae().encode_empty(None) is None


def test_a_vae_with_a_weight_missing_is_refused(
    make_vae: Callable[..., VaeEncoder], models: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(models / "vae", tmp_path / "vae"))
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = "encoder.conv_in.conv.weight"
    save_file({key: value for key, value in weights.items() if key != name}, file)
    with pytest.raises(InputError, match=f"1 of its weights are missing \\({name}\\)"):
        make_vae(folder)


@pytest.mark.parametrize("file", ["diffusion_pytorch_model.safetensors", "config.json"])
def test_a_damaged_vae_is_refused_in_one_line(
    make_vae: Callable[..., VaeEncoder], models: Path, tmp_path: Path, file: str
) -> None:
    folder = Path(shutil.copytree(models / "vae", tmp_path / "vae"))
    if file == "config.json":
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**config, "block_out_channels": [24, 32, 32]}))
    else:
        (folder / file).write_bytes((folder / file).read_bytes()[:1000])
    with pytest.raises(InputError, match="model folder") as refusal:
        make_vae(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("shade", [0, 128, 255])
@pytest.mark.parametrize("frames", [1, 9])
def test_a_clip_of_one_colour_is_let_into_the_cache(
    make_vae: Callable[..., VaeEncoder], shade: int, frames: int
) -> None:
    # the gate against constant latents is for broken encoders, not for black clips
    pixels = np.full((frames, 64, 96, 3), shade, np.uint8)
    (encoded,) = make_vae().encode([EncoderInput(key="k", caption="", clip_pixels=pixels)])
    moments = encoded.tensors["vae_moments"]
    spec = TensorSpec(name="vae_moments", dtype="bf16", dims=("2C", "T", "h", "w"), sizes=moments.array.shape)
    check_tensors(encoded.tensors, [spec])
    means = moments.to_float32()[: len(moments.array) // 2]
    assert all(channel.min() < channel.max() for channel in means)


def test_batches_started_one_after_the_other_give_what_each_gives_alone(make_vae: Callable[..., VaeEncoder]) -> None:
    encoder = make_vae(stored=("moments", "sample"))
    clips = [moving_square(9, seed) for seed in range(4)]
    batches = [[EncoderInput(key=f"{seed}", caption="", clip_pixels=clip)] for seed, clip in enumerate(clips)]
    alone = [encoder.encode(batch)[0] for batch in batches]
    started = [encoder.start(batch) for batch in batches]
    with ThreadPoolExecutor(1) as other_thread:
        for want, pending in reversed(list(zip(alone, started, strict=True))):
            (got,) = other_thread.submit(pending.result).result()
            assert got.tensors.keys() == want.tensors.keys() == {"vae_moments", "vae_sample"}
            for name, tensor in want.tensors.items():
                np.testing.assert_array_equal(got.tensors[name].array, tensor.array)


def test_no_more_than_two_batches_are_queued_on_the_device(
    make_vae: Callable[..., VaeEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_vae()
    waited: list[PendingLatents] = []
    result = PendingLatents.result

    def note(pending: PendingLatents) -> list[Encoded]:
        waited.append(pending)
        return result(pending)

    monkeypatch.setattr(PendingLatents, "result", note)
    batch = [EncoderInput(key="k", caption="", clip_pixels=moving_square(1))]
    started = [encoder.start(batch) for _ in range(5)]
    assert waited == started[:3]
