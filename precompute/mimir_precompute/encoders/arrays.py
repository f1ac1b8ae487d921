"""From torch tensors to what the cache stores, and the switches that keep kernels repeatable."""

import gc
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from mimir_shared.features import DType, FeatureTensor

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""The compute dtypes of the settings."""

_STORED_AS = {
    "bf16": (torch.bfloat16, torch.uint16),
    "f16": (torch.float16, torch.float16),
    "f32": (torch.float32, torch.float32),
    "i32": (torch.int32, torch.int32),
}


def stored_form(tensor: Tensor, dtype: DType) -> Tensor:
    """Cast a tensor to its stored dtype, where it is."""
    return tensor.detach().to(_STORED_AS[dtype][0]).contiguous()


def feature_of(stored: Tensor, dtype: DType) -> FeatureTensor:
    """Hand out a tensor in its stored form on the CPU as numpy; bf16 as its bits."""
    # numpy has no bfloat16; the view needs a last dim, which a reshape of nothing keeps
    return FeatureTensor(stored.view(_STORED_AS[dtype][1]).numpy(), dtype)


def to_feature(tensor: Tensor, dtype: DType = "bf16") -> FeatureTensor:
    """Cast a tensor on any device to its stored dtype and hand it out as numpy."""
    return feature_of(stored_form(tensor, dtype).cpu(), dtype)


def prepare_to_load() -> None:
    """Set up the libraries once a model is about to be loaded: repeatable kernels, no progress bars beside ours."""
    disable_progress_bar: Any = transformers_logging.disable_progress_bar  # it has no types
    disable_progress_bar()
    keep_kernels_repeatable()


def keep_kernels_repeatable() -> None:
    """Forbid what would let equal inputs give other bytes, or float32 be less than float32 (TF32 on CUDA)."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def free_memory() -> None:
    """Return a dropped model's memory to the system and the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
