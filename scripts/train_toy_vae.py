"""Train the toy world's VAE and write the weights that the package ships.

python scripts/train_toy_vae.py --output FILE

The shipped weights: November 2026, one thread of a shared two-core Xeon virtual machine, torch 2.13, 48 minutes for
2,500 steps. On 24 held-out clips (H.264, decoded, resized to 9x64x96): PSNR 33.5 dB on average and 30.2 at worst,
35.8 for their first frames as images, posterior std 0.010. Another machine gives other bits of the same quality.
"""

import argparse
import copy
import dataclasses
import itertools
import math
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX
from PIL import Image
from safetensors.torch import load_file, save_file

from mimir_precompute.toy.clips import render, toy_scene, write_mp4
from mimir_precompute.toy.models import VAE_CONFIG

FRAMES, HEIGHT, WIDTH = 9, 64, 96
TRAIN_SEED, HELD_OUT_SEED = 1_000_003, 2_000_003
KERNELS = (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC, Image.Resampling.BOX)
Frames = npt.NDArray[np.uint8]


def resize(frames: Frames, kernel: Image.Resampling) -> Frames:
    """(F, H, W, 3) -> (F, 64, 96, 3) uint8."""
    return np.stack([np.asarray(Image.fromarray(frame).resize((WIDTH, HEIGHT), kernel)) for frame in frames])


def to_model(frames: Frames) -> torch.Tensor:
    """(F, H, W, 3) uint8 -> (3, F, H, W) float32 in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1


def to_frames(pixels: torch.Tensor) -> Frames:
    """(3, F, H, W) in -1..1 -> (F, H, W, 3) uint8."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()


def smooth_noise(rng: random.Random, generator: np.random.Generator, num_frames: int) -> npt.NDArray[np.float32]:
    """A coloured texture that slides along; (F, 64, 96, 3) in about -1..1."""
    rows = rng.choice((3, 5, 9, 16, 32))
    grid = generator.standard_normal((rows, rows * 3 // 2, 3)).clip(-2, 2)
    grid = grid if rng.random() < 0.5 else np.repeat(grid[..., :1], 3, axis=2)
    canvas = Image.fromarray(np.uint8(grid * 63 + 128)).resize((WIDTH + 16, HEIGHT + 16), Image.Resampling.BICUBIC)
    texture = np.asarray(canvas, dtype=np.float32) / 127.5 - 1
    step_x, step_y = rng.uniform(-2, 2), rng.uniform(-2, 2)
    frames = []
    for number in range(num_frames):
        x, y = (round(8 + (number - num_frames // 2) * step * 0.9) for step in (step_x, step_y))
        frames.append(texture[y : y + HEIGHT, x : x + WIDTH])
    return np.stack(frames)


def training_clip(rng: random.Random, num_frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A fresh clip and its weights: (3, F, 64, 96) in -1..1 and (1, F, 64, 96), higher on and around the shapes.

    A quarter of the clips is recoloured and textured, so that video from outside the toy world survives too.
    """
    scene = toy_scene(TRAIN_SEED, rng.randrange(10**9))
    frames = resize(render(scene, num_frames=num_frames), rng.choice(KERNELS))
    empty = resize(render(dataclasses.replace(scene, objects=()), num_frames=1), Image.Resampling.BOX)
    pixels = to_model(frames)
    shapes = ((pixels - to_model(empty)).abs().amax(0, keepdim=True) > 0.05).float()
    weights = 1 + 3 * F.max_pool3d(shapes, (1, 3, 3), stride=1, padding=(0, 1, 1))
    if rng.random() < 0.25:
        generator = np.random.default_rng(rng.randrange(2**32))
        order = rng.sample(range(3), 3)
        gain, offset = rng.uniform(0.4, 1), torch.tensor([rng.uniform(-0.5, 0.5) for _ in range(3)])
        texture = torch.from_numpy(smooth_noise(rng, generator, num_frames)).permute(3, 0, 1, 2)
        pixels = pixels[order] * gain + offset[:, None, None, None] + texture * rng.uniform(0, 0.8)
        pixels = pixels.clamp(-1, 1)
    return pixels, weights


def batches(full_size_from: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches: crops at first, whole clips from step `full_size_from` on, single frames every sixth time."""
    rng = random.Random(seed)
    for step in itertools.count():
        whole = step >= full_size_from
        if step % 6 == 5:
            size, num_frames, height, width = 8, 1, HEIGHT, WIDTH
        elif whole:
            size, num_frames, height, width = 2, FRAMES, HEIGHT, WIDTH
        else:
            size, num_frames, height, width = 6, FRAMES, 32, 48
        pixels: list[torch.Tensor] = []
        weights: list[torch.Tensor] = []
        while len(pixels) < size:
            clip, clip_weights = training_clip(rng, num_frames)
            top, left = rng.randint(0, HEIGHT - height), rng.randint(0, WIDTH - width)
            window = (slice(None), slice(None), slice(top, top + height), slice(left, left + width))
            # A crop without a shape teaches little: most are thrown back.
            if clip_weights[window].max() > 1 or rng.random() < 0.1:
                pixels.append(clip[window])
                weights.append(clip_weights[window])
        yield torch.stack(pixels), torch.stack(weights)


def loss_of(vae: AutoencoderKLCogVideoX, pixels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted L1 + MSE + gradient error, a little KL, and a pull of every latent channel to mean 0, variance 1."""
    posterior = vae.encode(pixels).latent_dist
    decoded = vae.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean)).sample
    error = decoded - pixels
    weights = weights / weights.mean()
    loss = (weights * (error.abs() + 2 * error.square())).mean()
    # Errors of neighbouring pixels should agree: keeps outlines sharp.
    loss = loss + 0.5 * (weights[..., 1:] * error.diff(dim=-1).abs()).mean()
    loss = loss + 0.5 * (weights[..., 1:, :] * error.diff(dim=-2).abs()).mean()
    mean, variance = posterior.mean.mean((0, 2, 3, 4)), posterior.mean.var((0, 2, 3, 4))
    loss = loss + 1e-2 * (mean.square().mean() + (variance - 1).square().mean())
    divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar)
    total: torch.Tensor = loss + 5e-4 * divergence.mean()
    return total


def held_out_clips(count: int) -> torch.Tensor:
    """Clips the training never saw, after H.264, decoding and resizing; (N, 3, 9, 64, 96) in -1..1."""
    clips = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(count):
            path = Path(folder) / f"{index}.mp4"
            write_mp4(path, render(toy_scene(HELD_OUT_SEED, index)))
            with av.open(str(path)) as container:
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][:FRAMES]
            clips.append(to_model(resize(np.stack(frames), KERNELS[index % len(KERNELS)])))
    return torch.stack(clips)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    psnr_db: float
    """Mean over clips, of the decoded posterior mean."""
    worst_psnr_db: float
    image_psnr_db: float
    """Likewise for first frames alone, encoded as one-frame clips."""
    posterior_std: float
    latent_std: float


@torch.no_grad()
def evaluate(vae: AutoencoderKLCogVideoX, clips: torch.Tensor, sheet: Path | None) -> Quality:
    psnrs, image_psnrs, stds, means, rows = [], [], [], [], []
    for number, clip in enumerate(clips):
        posterior = vae.encode(clip[None]).latent_dist
        decoded = vae.decode(posterior.mean).sample[0].clamp(-1, 1)
        image = vae.decode(vae.encode(clip[None, :, :1]).latent_dist.mean).sample[0].clamp(-1, 1)
        psnrs.append(10 * math.log10(4 / (decoded - clip).square().mean().item()))
        image_psnrs.append(10 * math.log10(4 / (image - clip[:, :1]).square().mean().item()))
        stds.append(posterior.std.mean().item())
        means.append(posterior.mean)
        if number < 12:
            source, output = to_frames(clip), to_frames(decoded)
            rows.append(np.concatenate([source[0], output[0], to_frames(image)[0], source[8], output[8]], axis=1))
    if sheet is not None:
        grid = np.concatenate([np.concatenate(rows[i : i + 2], axis=1) for i in range(0, len(rows), 2)])
        Image.fromarray(grid).resize((grid.shape[1] * 2, grid.shape[0] * 2), Image.Resampling.NEAREST).save(sheet)
    return Quality(
        psnr_db=sum(psnrs) / len(psnrs),
        worst_psnr_db=min(psnrs),
        image_psnr_db=sum(image_psnrs) / len(image_psnrs),
        posterior_std=sum(stds) / len(stds),
        latent_std=torch.cat(means).std().item(),
    )


def save(vae: AutoencoderKLCogVideoX, latent_std: float, path: Path) -> None:
    """Half precision halves the file; the error it adds is far below that of the VAE itself."""
    tensors = {name: tensor.half().contiguous() for name, tensor in vae.state_dict().items()}
    save_file(tensors, path, metadata={"scaling_factor": f"{1 / latent_std:.4f}"})


@torch.no_grad()
def calibrate(path: Path) -> None:
    """Set the scaling factor of saved weights from many clips: a clip's latents hang together by its background."""
    vae = AutoencoderKLCogVideoX(**VAE_CONFIG)
    vae.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    latents = []
    for index in range(240):
        clip = to_model(resize(render(toy_scene(TRAIN_SEED, index), num_frames=FRAMES), Image.Resampling.LANCZOS))
        latents.append(vae.encode(clip[None]).latent_dist.mean)
    latent_std = torch.cat(latents).std().item()
    save(vae, latent_std, path)
    print(f"scaling factor {1 / latent_std:.4f}")  # noqa: T201


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    warm_up = 100
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, num_steps - warm_up)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(**VAE_CONFIG)
    # Start with a posterior of std 0.05, so that the decoder sees the latents from the first step on.
    head = vae.encoder.conv_out.conv
    with torch.no_grad():
        head.weight[VAE_CONFIG["latent_channels"] :] *= 0.1
        head.bias[VAE_CONFIG["latent_channels"] :] = 2 * math.log(0.05)
    average = copy.deepcopy(vae).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=1e-4)
    held_out = held_out_clips(24)
    last_step = min(arguments.stop_at, arguments.steps)
    started = time.monotonic()
    for step, (pixels, weights) in enumerate(batches(arguments.steps * 3 // 4, seed=0)):
        if step % arguments.evaluate_every == 0 or step == last_step:
            quality = evaluate(average, held_out, arguments.sheet)
            save(average, quality.latent_std, arguments.output)
            print(f"step {step}, {time.monotonic() - started:.0f} s: {quality}", flush=True)  # noqa: T201
        if step == last_step:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.lr)
        loss = loss_of(vae, pixels, weights)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), vae.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
    calibrate(arguments.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--stop-at", type=int, default=2500, help="end there, on the schedule of --steps")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--evaluate-every", type=int, default=250)
    parser.add_argument("--sheet", type=Path, help="PNG of sources and decoded frames, written at each evaluation")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
