"""The latents that validation samples while training, on disk: decoded later, for training has no VAE.

A folder holds all that decoding needs, so that it can be copied elsewhere:

    latents.safetensors    tensors "0", "1", …, in the order of the prompts: (C, T, h, w) float32, scaled
    prompts.json           {"version": 1, "step", "prompts": […], "fps", "latent_scaling_factor",
                            "weights", "latents": {"fingerprint", "identity"}}; "weights" is what sampled, "raw" or
                            the profile of an average; "latents" is that of the cache's `latents`
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimir_shared.errors import CacheError
from mimir_shared.fingerprint import fingerprint
from mimir_shared.plain_documents import parse_json
from mimir_train.ema_profile import RAW

VALIDATION_FOLDER = "validation"
LATENTS_NAME = "latents.safetensors"
PROMPTS_NAME = "prompts.json"

Json = Any
"""What `json` reads; the library gives it no type."""


@dataclass(frozen=True, kw_only=True)
class ValidationLatents:
    """Latents of one validation step."""

    step: int
    prompts: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    """Of each prompt: (C, T, h, w) float32, scaled; sizes may differ."""
    fps: float
    latent_scaling_factor: float
    weights: str = RAW
    """What sampled them: the weights themselves, or the average of this profile."""
    latents_identity: Mapping[str, Json]
    """Of the cache's feature `latents`: it names the VAE that decodes them."""

    @property
    def latents_fingerprint(self) -> str:
        return fingerprint(self.latents_identity)


def validation_folder(run: Path, step: int) -> Path:
    return run / VALIDATION_FOLDER / f"step-{step:08d}"


def write_validation_latents(folder: Path, latents: ValidationLatents) -> None:
    """Write both files; prompts.json last, for without it there is nothing to decode."""
    assert len(latents.prompts) == len(latents.tensors), f"{len(latents.prompts)} != {len(latents.tensors)}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROMPTS_NAME).unlink(missing_ok=True)
    tensors = {str(i): tensor.detach().float().cpu().contiguous() for i, tensor in enumerate(latents.tensors)}
    temporary = folder / f".{LATENTS_NAME}.tmp"
    save_file(tensors, temporary, {"format": "pt"})
    temporary.replace(folder / LATENTS_NAME)
    document = {
        "version": 1,
        "step": latents.step,
        "prompts": list(latents.prompts),
        "fps": latents.fps,
        "latent_scaling_factor": latents.latent_scaling_factor,
        "weights": latents.weights,
        "latents": {"fingerprint": latents.latents_fingerprint, "identity": latents.latents_identity},
    }
    temporary = folder / f".{PROMPTS_NAME}.tmp"
    temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(folder / PROMPTS_NAME)


def read_validation_latents(folder: Path) -> ValidationLatents:
    """Raises CacheError where a file is missing, damaged, or does not fit the other."""
    path = folder / PROMPTS_NAME
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
        prompts: Sequence[str] = document["prompts"]
        tensors = load_file(folder / LATENTS_NAME)
        if sorted(tensors) != sorted(str(i) for i in range(len(prompts))):
            raise CacheError(
                f"{folder}: {LATENTS_NAME} has {len(tensors)} tensors, {PROMPTS_NAME} {len(prompts)} prompts; they do "
                f"not belong together: restore them from a copy"
            )
        return ValidationLatents(
            step=document["step"],
            prompts=tuple(prompts),
            tensors=tuple(tensors[str(i)] for i in range(len(prompts))),
            fps=document["fps"],
            latent_scaling_factor=document["latent_scaling_factor"],
            weights=document.get("weights", RAW),
            latents_identity=document["latents"]["identity"],
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as fault:
        raise CacheError(f"{folder}: the latents of a validation cannot be read ({fault!r}); run it again") from fault
