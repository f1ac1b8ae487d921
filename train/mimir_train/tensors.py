"""Tensors of a cache as torch has them."""

from typing import Final

import torch
from torch import Tensor

from mimir_shared.features import DType, FeatureTensor

TORCH_DTYPES: Final[dict[DType, torch.dtype]] = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f32": torch.float32,
    "i32": torch.int32,
}


def to_tensor(stored: FeatureTensor) -> Tensor:
    """A view of the stored values; bfloat16 bit for bit."""
    return torch.from_numpy(stored.array).view(TORCH_DTYPES[stored.dtype])
