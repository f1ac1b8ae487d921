"""The features that a cache holds, and the tensors that they are made of.

Numpy has no bfloat16: such a tensor travels as uint16 beside its true dtype name, and is
reinterpreted where torch is at hand.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

FeatureName = Literal["latents", "t5", "answers", "llm"]

FEATURES: tuple[FeatureName, ...] = ("latents", "t5", "answers", "llm")
"""In the order in which they are made."""

DEPENDENCIES: dict[FeatureName, tuple[FeatureName, ...]] = {"latents": (), "t5": (), "answers": (), "llm": ("answers",)}
"""A feature is made from the clip and from the features named here."""

DType = Literal["bf16", "f16", "f32", "i32"]

NUMPY_DTYPES: dict[str, np.dtype] = {
    "bf16": np.dtype("<u2"),
    "f16": np.dtype("<f2"),
    "f32": np.dtype("<f4"),
    "i32": np.dtype("<i4"),
}
"""How each dtype is held in numpy; bf16 as its bits."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of a feature, as every sample of the cache has it."""

    name: str
    dtype: DType
    dims: tuple[str, ...]
    """Named dims, for instance ("2C", "T", "h", "w")."""
    sizes: tuple[int | None, ...]
    """Size of each dim; None where it differs from clip to clip."""
    channel_dim: int | None = None
    """The dim over which statistics are kept apart; None: one set for the whole tensor."""

    def __post_init__(self) -> None:
        assert len(self.dims) == len(self.sizes), f"{self.name}: dims {self.dims}, sizes {self.sizes}"

    def mismatch(self, array: np.ndarray, dtype: str) -> str | None:
        """Say how a tensor departs from this spec; None where it fits."""
        if dtype != self.dtype:
            return f"{self.name!r} has dtype {dtype}, expected {self.dtype}"
        fits = array.ndim == len(self.sizes) and all(
            want is None or got == want for got, want in zip(array.shape, self.sizes, strict=False)
        )
        if not fits:
            expected = ", ".join(f"{d}={'any' if s is None else s}" for d, s in zip(self.dims, self.sizes, strict=True))
            return f"{self.name!r} has dims {tuple(array.shape)}, expected ({expected})"
        return None


@dataclass(frozen=True)
class FeatureTensor:
    """A tensor on its way to or from disk: numpy storage (NUMPY_DTYPES) and its true dtype."""

    array: np.ndarray
    dtype: DType

    def __post_init__(self) -> None:
        want = NUMPY_DTYPES[self.dtype]
        assert self.array.dtype == want, f"{self.dtype} is held as {want}, got {self.array.dtype}"

    def to_float32(self) -> np.ndarray:
        """The values in float32, bf16 widened bit for bit."""
        if self.dtype == "bf16":
            return (self.array.astype(np.uint32) << 16).view(np.float32)
        return self.array.astype(np.float32)


def float32_to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 (to nearest, ties to even, as torch does); uint16 bits. NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    quiet_nan = ((bits >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16)
    return np.where(np.isnan(values), quiet_nan, rounded)
