"""A checkpoint as sampling and export see it: what it was trained on, and its two models."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch

from mimir_shared.errors import InputError
from mimir_shared.features import FeatureName
from mimir_train.checkpoint import FUSER, MANIFEST, TRANSFORMER, CheckpointInfo, find_checkpoint, read_checkpoint_info
from mimir_train.fuser_folder import fuser_config, load_fuser
from mimir_train.model.config import DiTConfig, FuserConfig
from mimir_train.model.dit import DiT
from mimir_train.model.fuser import TokenFuser
from mimir_train.transformer_folder import load_transformer, read_transformer_config

WEIGHTS: Final = (TRANSFORMER, FUSER)
"""The parts that are read, and so checked: the optimizer's state may be gone."""

JsonValue = Any
"""What `json` reads; the library gives it no type."""


@dataclass(frozen=True, kw_only=True)
class OpenCheckpoint:
    """A checkpoint whose weights were checked."""

    folder: Path
    digest: str
    """sha256 of checkpoint.json, which holds those of the weights."""
    info: CheckpointInfo
    transformer: DiTConfig
    fuser: FuserConfig

    @property
    def appends_stabilizer(self) -> bool:
        """Whether the last step that was trained had the stabilizer tokens."""
        return self.fuser.appends_stabilizer(max(self.info.step - 1, 0))

    @property
    def text_features(self) -> tuple[FeatureName, ...]:
        """What must be made of a prompt."""
        return ("t5", "answers", "llm") if self.fuser.switches.needs_llm else ("t5",)

    @property
    def identities(self) -> dict[FeatureName, Mapping[str, JsonValue]]:
        """What made each feature of the cache that was trained on."""
        return {cast(FeatureName, name): feature.identity for name, feature in self.info.data.features.items()}

    @property
    def uses_empty_prompt(self) -> bool:
        """Whether the features of the empty prompt stood where text was dropped, and not zeros."""
        return self.info.text.empty_text == "cached"

    def load_transformer(self, dtype: torch.dtype | None = None, device: str = "cpu") -> DiT:
        """For inference; dtype None: as it is stored."""
        dit = load_transformer(self.folder / TRANSFORMER, dtype=dtype, device=device)
        return dit.eval().requires_grad_(False)

    def load_fuser(self, dtype: torch.dtype | None = None, device: str = "cpu") -> TokenFuser:
        """For inference; dtype None: as it is stored."""
        return load_fuser(self.folder / FUSER, dtype=dtype, device=device).eval().requires_grad_(False)


def open_checkpoint(path: Path, say: Callable[[str], None]) -> OpenCheckpoint:
    """Find a checkpoint and check what sampling reads of it.

    Args:
        path: a run's folder, whose newest good checkpoint is taken, or one of its checkpoints/step-N.
        say: told of damaged checkpoints that are passed over.
    Raises: InputError where there is none, CacheError where it is damaged.
    """
    if not path.exists():
        raise InputError(f"--checkpoint {path}: no such folder; give a run's folder or one of its checkpoints/step-N")
    folder = find_checkpoint(path, say=say, parts=WEIGHTS)
    info = read_checkpoint_info(folder, parts=())
    return OpenCheckpoint(
        folder=folder,
        digest=hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest(),
        info=info,
        transformer=read_transformer_config(folder / TRANSFORMER),
        fuser=fuser_config(info.fuser, str(folder / MANIFEST)),
    )
