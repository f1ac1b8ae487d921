"""LoRA: the transformer stays as it is, and small maps beside some of its own are trained (arXiv 2106.09685).

    y = W x + b + alpha / rank * B A x,  A (rank, in) random, B (out, rank) zero: at first the model is its base exactly
Names are those of PEFT, which diffusers reads: `transformer_blocks.0.attn1.to_q.lora_A.weight`. The names of the
base's own weights do not change.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mimir_shared.errors import InputError
from mimir_train.config import LoraConfig
from mimir_train.model.dit import DiT

WEIGHTS_NAME: Final = "pytorch_lora_weights.safetensors"
"""The file that diffusers' `load_lora_weights` looks for in a folder."""
_PREFIX: Final = "transformer."
"""Part of a pipeline that the keys of such a file name first."""
_IN_A_BLOCK: Final = re.compile(r"^transformer_blocks\.\d+\.(attn1\.)?")


class LoraLinear(nn.Linear):
    """A linear map with an adapter beside it."""

    def __init__(self, linear: nn.Linear, config: LoraConfig) -> None:
        """Takes the parameters of `linear` over, frozen; those of the adapter lie beside them, not yet filled."""
        has_bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias=has_bias, device="meta")
        self.weight = linear.weight
        if has_bias:
            self.bias = linear.bias
        self.requires_grad_(False)
        device, dtype = linear.weight.device, torch.float32
        self.lora_A = nn.Linear(linear.in_features, config.rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(config.rank, linear.out_features, bias=False, device=device, dtype=dtype)
        self.rank = config.rank
        self.scaling = config.scaling

    def forward(self, input: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        update: Tensor = self.lora_B(self.lora_A(input))
        return F.linear(input, self.weight, self.bias) + self.scaling * update

    def merged_weight(self) -> Tensor:
        """W + alpha / rank * B A, summed in float32, in the dtype of W."""
        update = self.lora_B.weight.float() @ self.lora_A.weight.float()
        return (self.weight.float() + self.scaling * update).to(self.weight.dtype)


def add_adapters(dit: DiT, config: LoraConfig) -> None:
    """Freeze a transformer, and put adapters beside the maps that `config.targets` names, all of them trainable.

    Before it is sharded, compiled or checkpointed; on any device. The adapters' values are still to be set.

    Raises: InputError for a target that is no linear map of the transformer, listing those there are.
    """
    linears = {name: module for name, module in dit.named_modules() if isinstance(module, nn.Linear)}
    chosen = [name for name in linears if any(_is_target(name, target) for target in config.targets)]
    for target in config.targets:
        if not any(_is_target(name, target) for name in linears):
            there = dict.fromkeys(_IN_A_BLOCK.sub("", name) for name in linears)
            raise InputError(f"--lora-targets {target}: no linear map of the transformer; there are {', '.join(there)}")
    dit.requires_grad_(False)
    for name in chosen:
        parent, _, child = name.rpartition(".")
        setattr(dit.get_submodule(parent), child, LoraLinear(linears[name], config))


def first_adapter(in_features: int, out_features: int, rank: int) -> nn.ModuleDict:
    """An adapter as training starts with it: A as torch draws a linear map (so does PEFT), B zero."""
    lora_b = nn.Linear(rank, out_features, bias=False)
    nn.init.zeros_(lora_b.weight)
    return nn.ModuleDict({"lora_A": nn.Linear(in_features, rank, bias=False), "lora_B": lora_b})


def adapted_maps(dit: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The maps of a transformer that have an adapter, by name."""
    return ((name, module) for name, module in dit.named_modules() if isinstance(module, LoraLinear))


@torch.no_grad()
def merge_adapters(dit: DiT) -> None:
    """Take the adapters into the weights: an ordinary transformer again, with the output of the adapted one."""
    for name, adapted in list(adapted_maps(dit)):
        plain = nn.Linear(adapted.in_features, adapted.out_features, bias=adapted.bias is not None, device="meta")
        plain.weight = nn.Parameter(adapted.merged_weight(), requires_grad=False)
        if adapted.bias is not None:
            plain.bias = adapted.bias
        parent, _, child = name.rpartition(".")
        setattr(dit.get_submodule(parent), child, plain)


def adapter_parameters(dit: DiT) -> dict[str, nn.Parameter]:
    """Those of the adapters alone, by their names in the transformer."""
    return {name: parameter for name, parameter in dit.named_parameters() if parameter.requires_grad}


def save_adapters(config: LoraConfig, adapters: Mapping[str, Tensor], folder: Path) -> None:
    """Write the file that diffusers' `load_lora_weights` reads.

    Args:
        adapters: as `adapter_parameters` names them.
    """
    tensors = {f"{_PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in adapters.items()}
    # without the metadata, diffusers takes alpha to be the rank
    settings = {"r": config.rank, "lora_alpha": config.settled_alpha, "target_modules": list(config.targets)}
    document = {f"{_PREFIX}{name}": value for name, value in settings.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(document, sort_keys=True)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_NAME, metadata)


def _is_target(name: str, target: str) -> bool:
    """As PEFT matches `target_modules`."""
    return name == target or name.endswith(f".{target}")
