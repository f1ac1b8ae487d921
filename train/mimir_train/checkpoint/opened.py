"""A checkpoint as sampling and export see it: what it was trained on, and its two models."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from mimir_shared.errors import CacheError, InputError
from mimir_shared.features import FeatureName
from mimir_train.checkpoint.adapter_base import find_base, lora_config
from mimir_train.checkpoint.folder import (
    MANIFEST,
    MODEL,
    CheckpointInfo,
    ema_part,
    find_checkpoint,
    read_checkpoint_info,
)
from mimir_train.checkpoint.parts import fill_tensors
from mimir_train.checkpoint.storage import PieceReader
from mimir_train.config_document import from_record
from mimir_train.ema_profile import RAW
from mimir_train.model.config import DiTConfig, FuserConfig
from mimir_train.model.dit import DiT
from mimir_train.model.fuser import TokenFuser
from mimir_train.weights.lora import adapter_parameters, add_adapters, merge_adapters
from mimir_train.weights.transformer_folder import load_transformer

Module = TypeVar("Module", bound=torch.nn.Module)


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
    weights: str
    """Those that are read: raw, or the profile of an average."""
    part: str
    """That they lie in."""
    base: str
    """Where the transformer is that adapters stand on; of no meaning where all of it was trained."""

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

    def check_base(self) -> None:
        """Look for what adapters stand on now, before anything is made. Raises as `base_folder`."""
        assert self.base_folder is not None or self.info.lora is None

    @cached_property
    def base_folder(self) -> Path | None:
        """Of the transformer that adapters stand on, every byte of it compared; None where all of it was trained.

        Raises: InputError, CacheError where it is not there, or is another.
        """
        lora = self.info.lora
        return None if lora is None else find_base(lora.base, self.base, "--base", verify=True)

    def load_transformer(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> DiT:
        """For inference, whole, whatever the ranks that saved it; adapters are merged in. Raises as `base_folder`."""
        if self.info.lora is None or self.base_folder is None:
            with torch.device("meta"):  # no time for an initialisation that is thrown away
                dit = DiT(self.transformer)
            return self._load(dit, "dit", dtype, device)
        dit = load_transformer(self.base_folder, device=device)
        add_adapters(dit, lora_config(self.info.lora))
        self._fill({f"dit.{name}": parameter.detach() for name, parameter in adapter_parameters(dit).items()})
        merge_adapters(dit)
        return dit.to(dtype).eval().requires_grad_(False)

    def load_adapters(self) -> dict[str, Tensor]:
        """The adapters by the names of the transformer's parameters, float32; their base is not looked for."""
        assert self.info.lora is not None, f"{self.folder} has no adapters"
        with torch.device("meta"):
            dit = DiT(self.transformer)
            add_adapters(dit, lora_config(self.info.lora))
        adapters = {name: torch.empty(parameter.shape) for name, parameter in adapter_parameters(dit).items()}
        self._fill({f"dit.{name}": tensor for name, tensor in adapters.items()})
        return adapters

    def load_fuser(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> TokenFuser:
        """For inference."""
        return self._load(TokenFuser(self.fuser), "fuser", dtype, device)

    def _load(self, module: Module, name: str, dtype: torch.dtype, device: str) -> Module:
        module = module.to(dtype=dtype).to_empty(device=device).eval().requires_grad_(False)
        self._fill({f"{name}.{tensor}": value for tensor, value in module.state_dict().items()}, all_of=name)
        return module

    def _fill(self, wanted: Mapping[str, Tensor], all_of: str = "dit") -> None:
        """Read the tensors that are wanted. Raises CacheError where they are not all that is saved of a module."""
        reader = PieceReader(self.folder, self.info.files_of(self.part))
        saved = (name.partition(".")[2] for name in reader.dims)
        extra = sorted(name for name in saved if name.startswith(f"{all_of}.") and name not in wanted)
        if extra:
            raise CacheError(
                f"{self.folder / self.part}: has {extra[0]!r}, which the {all_of} that it records does not have"
            )
        fill_tensors(self.folder, reader, self.part, wanted)


def open_checkpoint(
    path: Path, say: Callable[[str], None], *, weights: str | None = None, base: str | None = None
) -> OpenCheckpoint:
    """Find a checkpoint and check what sampling reads of it; the optimizer's state may be gone.

    Args:
        path: a run's folder, whose newest good checkpoint is taken, or one of its checkpoints/step-N.
        say: told of damaged checkpoints that are passed over, and which weights are taken where there is a choice.
        weights: raw, ema (the first average) or the profile of an average; None: the first average where there is
            one, else raw.
        base: where the transformer is now that adapters were trained on; None: where it was.
    Raises: InputError where there is none, or no such average; CacheError where it is damaged.
    """
    if not path.exists():
        raise InputError(f"--checkpoint {path}: no such folder; give a run's folder or one of its checkpoints/step-N")
    # of a run, every checkpoint has the same averages
    name, part = _choose_weights(
        read_checkpoint_info(find_checkpoint(path, say=_silent, parts=()), parts=()), weights, path
    )
    folder = find_checkpoint(path, say=say, parts=(part,))
    info = read_checkpoint_info(folder, parts=())
    if base is not None and info.lora is None:
        raise InputError(f"--base {base}: all of the transformer was trained in {folder}, and is in it")
    if info.ema:
        say(f"{folder.name}: weights {name}, of {', '.join([RAW, *info.ema])}")
    return OpenCheckpoint(
        folder=folder,
        digest=hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest(),
        info=info,
        transformer=from_record(DiTConfig, info.transformer, str(folder / MANIFEST)),
        fuser=from_record(FuserConfig, info.fuser, str(folder / MANIFEST)),
        weights=name,
        part=part,
        base=base or (info.lora.base.name if info.lora is not None else ""),
    )


def _choose_weights(info: CheckpointInfo, wanted: str | None, path: Path) -> tuple[str, str]:
    """Name and part of the weights to read."""
    if wanted == RAW or (wanted is None and not info.ema):
        return RAW, MODEL
    if wanted in (None, "ema") and info.ema:
        return info.ema[0], ema_part(0)
    if wanted in info.ema:
        return wanted, ema_part(info.ema.index(wanted))
    there = ", ".join([RAW, *(["ema", *info.ema] if info.ema else [])])
    raise InputError(f"--weights {wanted}: {path} has {there}; averages are kept where training is told so (--ema)")


def _silent(line: str) -> None:
    """What is passed over is told when the files are checked."""
