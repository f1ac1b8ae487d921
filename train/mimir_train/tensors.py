"""Tensors of a cache as torch has them."""

import torch
from torch import Tensor

from mimir_shared.features import FeatureTensor


def to_tensor(stored: FeatureTensor) -> Tensor:
    """A view of the stored values; bfloat16 bit for bit."""
    values = torch.from_numpy(stored.array)
    return values.view(torch.bfloat16) if stored.dtype == "bf16" else values
