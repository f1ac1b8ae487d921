"""Checkpoints as tests look at them: whole tensors, read by the safetensors library alone; and small ones to save."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mimir_shared.plain_documents import parse_json
from mimir_train.checkpoint.folder import CheckpointInfo, FileDigest
from mimir_train.checkpoint.parts import ModelPart
from mimir_train.checkpoint.saver import CheckpointSaver, Kept
from mimir_train.checkpoint.storage import PIECES
from mimir_train.parallel.launch import Place
from mimir_train.parallel.processes import Parallel

ALONE = Parallel(place=Place(), device=torch.device("cpu"))


def tensors_of(checkpoint: Path, part: str = "*") -> dict[str, torch.Tensor]:
    """Name → whole tensor, put together from the pieces that ranks wrote."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.glob(f"{part}/*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key, (name, offsets, dims) in parse_json(file.metadata()[PIECES]).items():
                piece = file.get_tensor(key)
                whole = tensors.setdefault(name, torch.zeros(dims, dtype=piece.dtype))
                ends = [begin + length for begin, length in zip(offsets, piece.shape, strict=True)]
                whole[tuple(slice(begin, end) for begin, end in zip(offsets, ends, strict=True))] = piece
    assert tensors, f"{checkpoint} has no {part}"
    return tensors


def small_info(step: int, files: Mapping[str, FileDigest]) -> CheckpointInfo:
    """checkpoint.json of a checkpoint whose model nobody builds."""
    return CheckpointInfo.model_validate(
        {
            "step": step, "preset": "tiny", "files": dict(files), "training": {"order": {}, "config_sha256": "0" * 64},
            "data": {"snapshot": "5" * 64, "features": {}, "buckets": [], "fps": 8.0, "latent_scaling_factor": 1.0,
                     "latents_std": 1.0},
            "objective": {"snr_shift_scale": 1.0}, "transformer": {}, "fuser": {}, "text": {"t5_rows": 4},
        }
    )  # fmt: skip


class Numbers(torch.nn.Module):
    """Weights that say of which step they are."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Parameter(torch.zeros(60, 50))
        self.two = torch.nn.Parameter(torch.zeros(7))

    def become(self, step: int) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(step)


def saver_of(run: Path, model: torch.nn.Module, **options: Any) -> CheckpointSaver:
    """One that saves a model and nothing else, in the background."""
    settings = {"kept": Kept(), "background": True, **options}
    return CheckpointSaver(run, {"model": ModelPart(model)}, small_info, ALONE, **settings)


def assert_is_of_step(checkpoint: Path, step: int) -> None:
    """Every weight of a checkpoint of `Numbers` is that of the step."""
    tensors = tensors_of(checkpoint)
    assert {name: tensor.unique().tolist() for name, tensor in tensors.items()} == {
        "model.one": [float(step)], "model.two": [float(step)]
    }  # fmt: skip
