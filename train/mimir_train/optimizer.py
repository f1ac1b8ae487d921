"""AdamW over transformer and fuser, its learning rates by step, and its state as named tensors."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mimir_shared.errors import CacheError
from mimir_train.config import OptimizerConfig
from mimir_train.sharding import share_like

_STATE_NAMES = ("exp_avg", "exp_avg_sq", "step")


def build_optimizer(config: OptimizerConfig, dit: nn.Module, fuser: nn.Module) -> torch.optim.AdamW:
    """Four groups: transformer and fuser, each with and without weight decay. Rates are set before every step."""
    groups = []
    for part, module, rate in (("dit", dit, config.learning_rate), ("fuser", fuser, config.fuser_learning_rate)):
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            (decayed if is_decayed(name, parameter) else plain).append(parameter)
        for parameters, decay in ((decayed, config.weight_decay), (plain, 0.0)):
            if parameters:
                groups.append({"params": parameters, "weight_decay": decay, "peak_lr": rate, "lr": rate, "part": part})
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True)


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Matrices are drawn towards zero; norms, biases, scales and the stabilizer's offsets are not.

    The fuser's zero-initialised maps are: for them zero is where training starts, the model that knows T5 alone, so
    decay only asks the new branches to earn their size. There are no tables of embeddings in either model; the maps
    that bring patches, text and time to the model's width are matrices like the others.
    """
    return parameter.ndim >= 2 and not name.endswith("stabilizer_offsets")


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set the rates of the coming step; part → rate."""
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        rates[group["part"]] = group["lr"]
    return rates


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as tensors named "parameter.exp_avg" and so on; parameters never stepped have none."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for field, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{field}"] = value
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], where: str
) -> None:
    """Put the state back that `optimizer_tensors` gave. Raises CacheError where it is of another model."""
    parameters = dict(model.named_parameters())
    unknown = sorted(set(_parameter_names(tensors)) - parameters.keys())
    if unknown:
        raise CacheError(f"{where}: has the state of {unknown[0]}, which is no parameter of this model")
    for name, parameter in parameters.items():
        state = {field: tensors[f"{name}.{field}"] for field in _STATE_NAMES if f"{name}.{field}" in tensors}
        if not state:
            continue
        if len(state) != len(_STATE_NAMES) or state["exp_avg"].shape != parameter.shape:
            shape = tuple(parameter.shape)
            raise CacheError(f"{where}: the state of {name} has {sorted(state)}, expected {_STATE_NAMES} of {shape}")
        optimizer.state[parameter] = {
            field: value.to(parameter.device) if field == "step" else share_like(parameter, value)
            for field, value in state.items()
        }


def _parameter_names(names: Iterable[str]) -> list[str]:
    return [name.rpartition(".")[0] for name in names]
