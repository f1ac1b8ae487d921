"""Whether this machine has the attention that a run asks for."""

from typing import Final, get_args

import torch

from mimir_shared.errors import InputError
from mimir_train.config import ModelConfig, Precision
from mimir_train.model.attention import why_not
from mimir_train.model.config import AttentionName

DTYPES: Final[dict[Precision, torch.dtype]] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_attention(model: ModelConfig, device: torch.device, precision: Precision) -> None:
    """Try the kernel on the device that will train.

    Raises: InputError saying why it will not do there, and which would.
    """
    wanted, head_dim = model.attention, model.transformer.attention_head_dim
    fault = why_not(wanted, device, DTYPES[precision], head_dim)
    if fault is None:
        return
    others = [name for name in get_args(AttentionName) if name != wanted]
    there = [name for name in others if why_not(name, device, DTYPES[precision], head_dim) is None]
    raise InputError(
        f"--attention {wanted}: cannot train on {device} in {precision} with heads of {head_dim} ({fault}); "
        f"here there is {', '.join(there)}"
    )
