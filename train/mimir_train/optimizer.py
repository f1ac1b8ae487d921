"""AdamW over transformer and fuser, with a learning rate for each."""

import torch
from torch import Tensor, nn

from mimir_train.config import OptimizerConfig


def build_optimizer(config: OptimizerConfig, dit: nn.Module, fuser: nn.Module) -> torch.optim.AdamW:
    """Four groups: transformer and fuser, each with and without weight decay. Rates are set before every step.

    Frozen parameters are in none, and cost no state.
    """
    groups = []
    for part, module, rate in (("dit", dit, config.learning_rate), ("fuser", fuser, config.fuser_learning_rate)):
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        trained = ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)
        for name, parameter in trained:
            (decayed if is_decayed(name, parameter) else plain).append(parameter)
        for parameters, decay in ((decayed, config.weight_decay), (plain, 0.0)):
            if parameters:
                groups.append({"params": parameters, "weight_decay": decay, "peak_lr": rate, "lr": rate, "part": part})
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True)


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Matrices are drawn towards zero; norms, biases, scales and the stabilizer's offsets are not.

    The fuser's zero-initialised maps are: for them zero is where training starts, the model that knows T5 alone, so
    decay only asks the new branches to earn their size; so it is with adapters, which it draws back to their base.
    There are no tables of embeddings in either model; the maps that bring patches, text and time to the model's width
    are matrices like the others.
    """
    return parameter.ndim >= 2 and not name.endswith("stabilizer_offsets")


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set the rates of the coming step; part → rate."""
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        rates[group["part"]] = group["lr"]
    return rates
