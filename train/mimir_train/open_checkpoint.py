"""A checkpoint as sampling and export see it: what it was trained on, and its two models."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import torch

from mimir_shared.errors import CacheError, InputError
from mimir_shared.features import FeatureName
from mimir_train.checkpoint import MANIFEST, MODEL, CheckpointInfo, find_checkpoint, read_checkpoint_info
from mimir_train.checkpoint_parts import fill_tensors
from mimir_train.checkpoint_storage import PieceReader
from mimir_train.config_document import from_record
from mimir_train.model.config import DiTConfig, FuserConfig
from mimir_train.model.dit import DiT
from mimir_train.model.fuser import TokenFuser

Module = TypeVar("Module", bound=torch.nn.Module)

WEIGHTS: Final = (MODEL,)
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

    def load_transformer(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> DiT:
        """For inference, whole, whatever the ranks that saved it."""
        with torch.device("meta"):  # no time for an initialisation that is thrown away
            dit = DiT(self.transformer)
        return self._load(dit, "dit", dtype, device)

    def load_fuser(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> TokenFuser:
        """For inference."""
        return self._load(TokenFuser(self.fuser), "fuser", dtype, device)

    def _load(self, module: Module, name: str, dtype: torch.dtype, device: str) -> Module:
        module = module.to(dtype=dtype).to_empty(device=device).eval().requires_grad_(False)
        reader = PieceReader(self.folder, self.info.files_of(MODEL))
        wanted = {f"{name}.{tensor}": value for tensor, value in module.state_dict().items()}
        extra = sorted(
            saved
            for saved in reader.dims
            if saved.startswith(f"{MODEL}.{name}.") and saved.partition(".")[2] not in wanted
        )
        if extra:
            raise CacheError(f"{self.folder / MODEL}: has {extra[0]!r}, which the {name} that it records does not have")
        fill_tensors(self.folder, reader, MODEL, wanted)
        return module


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
        transformer=from_record(DiTConfig, info.transformer, str(folder / MANIFEST)),
        fuser=from_record(FuserConfig, info.fuser, str(folder / MANIFEST)),
    )
