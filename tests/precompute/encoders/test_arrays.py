"""Tensors reach the cache with every bit of their stored dtype."""

import dataclasses

import numpy as np
import torch

from mimir_precompute.encoders.arrays import to_feature
from mimir_shared.features import float32_to_bf16_bits


def test_to_feature_keeps_bfloat16_bit_for_bit_and_rounds_as_numpy_does() -> None:
    values = torch.tensor([[1.0, -0.0, 3.1415927, float("inf")], [1e-40, 65504.0, -2.7, 0.1]])
    np.testing.assert_array_equal(to_feature(values).array, float32_to_bf16_bits(values.numpy()))
    back = torch.from_numpy(to_feature(values.to(torch.bfloat16)).array).view(torch.bfloat16)
    assert torch.equal(back, values.to(torch.bfloat16))
    assert to_feature(values[:0]).array.shape == (0, 4)
    assert dataclasses.asdict(to_feature(values[:, ::2], "f32"))["array"].tolist() == values[:, ::2].tolist()
