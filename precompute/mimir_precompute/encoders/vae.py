"""Feature `latents`: clip pixels through the CogVideoX causal VAE, kept as moments, unscaled.

Source: diffusers AutoencoderKLCogVideoX.encode, nothing added: 9 frames first, then 8 at a time. Its encoder runs
itself (engine "diffusers") or is replaced by our own, which gives the same numbers sooner (engine "fast").
"""

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from mimir_precompute.config import VaeSettings
from mimir_precompute.encoders.arrays import TORCH_DTYPES, free_memory, keep_kernels_repeatable
from mimir_precompute.encoders.base import Encoded, EncoderInput, JsonValue
from mimir_precompute.encoders.device_copies import DeviceCopies, Download
from mimir_precompute.encoders.fast_vae import build_fast_encoder, frame_chunks
from mimir_precompute.identity import VAE_FRAMES_PER_CHUNK
from mimir_precompute.model_files import ResolvedModel, loading_from, refuse_incomplete

_BATCHES_QUEUED = 2
"""One that the device works on and one that follows at once; more would only hold pixels in memory."""


class VaeEncoder:
    """A frozen AutoencoderKLCogVideoX."""

    def __init__(self, model: ResolvedModel, settings: VaeSettings, device: str) -> None:
        """Raises: InputError if the folder does not hold such a VAE, whole; MachineError if the engine fails here."""
        keep_kernels_repeatable()
        self.settings = settings
        self.device = torch.device(device)
        self.dtype = TORCH_DTYPES[settings.dtype]
        self._copies = DeviceCopies(self.device)
        self._queued: deque[PendingLatents] = deque()
        with loading_from(model):
            vae, info = AutoencoderKLCogVideoX.from_pretrained(
                model.folder,
                local_files_only=True,
                torch_dtype=self.dtype,
                output_loading_info=True,
                # the other way needs a library that we do not, to save memory that this model does not take
                low_cpu_mem_usage=False,
            )
        refuse_incomplete(model, list(info["missing_keys"]), [str(key) for key in info["mismatched_keys"]])
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        # GroupNorm sees one chunk at a time, so the chunk is part of the result and of the identity
        self.vae.num_sample_frames_batch_size = VAE_FRAMES_PER_CHUNK
        if settings.tiling:
            self.vae.enable_tiling()
        if settings.engine == "fast":
            self.vae.encoder = build_fast_encoder(self.vae, self.dtype, self.device)

    def encode(self, batch: Sequence[EncoderInput]) -> list[Encoded]:
        """Encode clips of one bucket; `settings.stored` says which tensors are kept."""
        return self.start(batch).result()

    @torch.inference_mode()
    def start(self, batch: Sequence[EncoderInput]) -> "PendingLatents":
        """Queue on the device what `encode` does; waits while it has `_BATCHES_QUEUED` batches before it."""
        while len(self._queued) >= _BATCHES_QUEUED:
            self._queued.popleft().result()
        pending = PendingLatents()
        for start in range(0, len(batch), self.settings.batch_size):
            launch = batch[start : start + self.settings.batch_size]
            clips = [item.clip_pixels for item in launch if item.clip_pixels is not None]
            assert len(clips) == len(launch), "latents need clip_pixels"
            # one clip alone is not copied: at full size that would cost a twentieth of its encoding
            moments = self.moments(clips[0][None] if len(clips) == 1 else np.stack(clips))
            pending.clips += [self._download(item.key, moments[i]) for i, item in enumerate(launch)]
        self._queued.append(pending)
        return pending

    def encode_empty(self, answers: Mapping[str, JsonValue] | None) -> Encoded | None:
        """Latents have no prompt."""
        return None

    @torch.inference_mode()
    def moments(self, clip_pixels: np.ndarray) -> Tensor:
        """The posterior's mean and log-variance, stacked on channels, before any cast.

        Args:
            clip_pixels: (B, F, H, W, 3) uint8.
        Returns: (B, 2C, T, h, w) in the dtype of the arithmetic, on the device.
        """
        assert clip_pixels.dtype == np.uint8, f"{clip_pixels.dtype}"
        assert clip_pixels.ndim == 5, f"{clip_pixels.shape}"
        if self.settings.engine == "fast" and not self.settings.tiling:
            # a chunk is copied while the device computes the one before
            chunks = frame_chunks(clip_pixels.shape[1], VAE_FRAMES_PER_CHUNK)
            encoded: Tensor = self.vae.encoder.encode_chunks(
                self._copies.upload(clip_pixels[:, chunk]) for chunk in chunks
            )
            return encoded if self.vae.quant_conv is None else self.vae.quant_conv(encoded.to(self.dtype))
        # bytes cross to the device, four times fewer than floats
        pixels = self._copies.upload(clip_pixels).permute(0, 4, 1, 2, 3)  # (B, 3, F, H, W)
        scaled = ((pixels.float() - 127.5) / 127.5).to(self.dtype).contiguous()
        moments: Tensor = self.vae.encode(scaled).latent_dist.parameters
        return moments

    def decode_moments(self, moments: np.ndarray) -> np.ndarray:
        """Decode the mean of cached moments: (2C, T, h, w) float32 → (F, H, W, 3) uint8."""
        return self.decode_latents(moments[: moments.shape[0] // 2])

    @torch.inference_mode()
    def decode_latents(self, latents: np.ndarray) -> np.ndarray:
        """Decode unscaled latents: (C, T, h, w) float32 → (F, H, W, 3) uint8."""
        batch = torch.from_numpy(np.ascontiguousarray(latents, dtype=np.float32))[None].to(self.device, self.dtype)
        frames = self.vae.decode(batch).sample[0].float().permute(1, 2, 3, 0)  # (F, H, W, 3) in -1..1
        pixels: np.ndarray = (frames * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        return pixels

    def close(self) -> None:
        """Free the model's memory; the encoder is of no use afterwards."""
        del self.vae
        free_memory()

    def _download(self, key: str, moments: Tensor) -> dict[str, Download]:
        mean, log_variance = moments.float().chunk(2)  # (C, T, h, w) each
        values = {"moments": moments, "mean": mean}
        if "sample" in self.settings.stored:
            values["sample"] = sample_posterior(mean, log_variance, clip_generator(self.settings.seed, key))
        return {f"vae_{name}": self._copies.download(values[name]) for name in self.settings.stored}


class PendingLatents:
    """Latents that the device may still be making."""

    def __init__(self) -> None:
        self.clips: list[dict[str, Download]] = []

    def result(self) -> list[Encoded]:
        """Wait for the device. May be called twice, and from any thread."""
        return [Encoded(tensors={name: one.wait() for name, one in downloads.items()}) for downloads in self.clips]


def clip_generator(seed: int, key: str) -> torch.Generator:
    """The random numbers of one clip: on the CPU, so that they are the same whatever the device and the order."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def sample_posterior(mean: Tensor, log_variance: Tensor, generator: torch.Generator) -> Tensor:
    """Draw from the posterior in float32, with diffusers' bounds on the log-variance."""
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
