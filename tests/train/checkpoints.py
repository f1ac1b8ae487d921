"""Checkpoints as tests look at them: whole tensors, read by the safetensors library alone."""

from pathlib import Path

import torch
from safetensors import safe_open

from mimir_shared.plain_documents import parse_json
from mimir_train.checkpoint_storage import PIECES


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
