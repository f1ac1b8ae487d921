"""Read and write a token fuser as a folder: config.json and model.safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimir_shared.errors import CacheError
from mimir_shared.plain_documents import parse_json
from mimir_train.config_document import from_record, to_document
from mimir_train.model.config import FuserConfig
from mimir_train.model.fuser import TokenFuser

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def save_fuser(config: FuserConfig, state_dict: Mapping[str, Tensor], folder: Path) -> None:
    """Write a fuser's folder; the weights in the dtype they come in."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps(to_document(config), indent=2, sort_keys=True) + "\n")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    save_file(tensors, folder / WEIGHTS_NAME, {"format": "pt"})


def load_fuser(folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> TokenFuser:
    """Build the fuser of a folder and fill it with the folder's weights.

    Args:
        dtype: of all parameters; None keeps them as they are stored.
    Raises: CacheError where the folder is damaged, or its weights are not those of its config.
    """
    try:
        document = parse_json((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        state_dict = load_file(folder / WEIGHTS_NAME, device=str(device))
    except (OSError, ValueError, SafetensorError) as fault:
        raise CacheError(f"{folder}: no readable fuser ({fault}); copy it again") from fault
    fuser = TokenFuser(from_record(FuserConfig, document, str(folder / CONFIG_NAME)))
    try:
        fuser.load_state_dict(state_dict, strict=True, assign=True)
    except RuntimeError as fault:
        problem = " ".join(str(fault).split())
        raise CacheError(f"{folder}: the weights are not those of its config: {problem}") from fault
    return fuser.to(device=device, dtype=dtype)
