"""Model FLOPs utilisation (MFU): what a step's operations would take at the device's peak, over what it took.

Counted are the operations of `mimir_shared.transformer_flops`: forward and backward, without what is computed again.
The peak is that of the data sheet for dense bfloat16, or `run.peak_tflops`. Where neither is known (a CPU, an unlisted
device, a run in float32) no MFU is told: a peak that was measured on the side would vary with whatever else runs.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch

from mimir_shared.transformer_flops import TransformerSizes
from mimir_train.config import Precision
from mimir_train.model.config import DiTConfig

PEAK_TFLOPS: Final[Mapping[str, float]] = MappingProxyType(
    {
        "B200": 2250.0,
        "H200 NVL": 835.0,
        "H200": 989.4,
        "H100 NVL": 835.0,
        "H100 PCIe": 756.0,
        "H100": 989.4,
        "H800": 989.4,
        "H20": 148.0,
        "A100": 312.0,
        "A800": 312.0,
        "L40S": 362.05,
        "L40": 181.05,
        "L4": 121.0,
        "A40": 149.7,
        "A10": 125.0,
    }
)
"""10^12 operations a second in dense bfloat16, by a part of the device's name as CUDA tells it. Source: NVIDIA's data
sheets, where figures with sparsity are halved."""


def transformer_sizes(config: DiTConfig) -> TransformerSizes:
    return TransformerSizes(
        width=config.width,
        num_layers=config.num_layers,
        time_embed_dim=config.time_embed_dim,
        text_width=config.text_embed_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        patch_size=config.patch_size,
    )


def known_peak_tflops(device_name: str) -> float | None:
    """The peak of a device by the name that CUDA gives it, for instance "NVIDIA H100 80GB HBM3"; None: not listed."""
    words = device_name.replace("-", " ").split()
    for name, tflops in PEAK_TFLOPS.items():  # longer names of one device stand before shorter ones
        if all(part in words for part in name.split()):
            return tflops
    return None


def device_peak_tflops(device: torch.device, precision: Precision, stated: float | None) -> float | None:
    """What utilisation is measured against, for one device; None: unknown, so that there is no MFU.

    Args:
        stated: `run.peak_tflops`; goes before the table.
    """
    if stated is not None:
        return stated
    if device.type != "cuda" or precision != "bfloat16":
        return None
    return known_peak_tflops(torch.cuda.get_device_name(device))
