"""Model FLOPs utilisation (MFU): what a step's operations would take at the device's peak, over what it took.

Counted are the operations of `mimir_shared.transformer_flops`: forward and backward, without what is computed again.
The peak is that of the data sheet for dense bfloat16 (`mimir_shared.gpus`), or `run.peak_tflops`. Where neither is
known (a CPU, an unlisted device, a run in float32) no MFU is told: a peak that was measured on the side would vary with
whatever else runs.
"""

import torch

from mimir_shared.gpus import known_gpu
from mimir_shared.transformer_flops import TransformerSizes
from mimir_train.config import Precision
from mimir_train.model.config import DiTConfig


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


def device_peak_tflops(device: torch.device, precision: Precision, stated: float | None) -> float | None:
    """What utilisation is measured against, for one device; None: unknown, so that there is no MFU.

    Args:
        stated: `run.peak_tflops`; goes before the table.
    """
    if stated is not None:
        return stated
    if device.type != "cuda" or precision != "bfloat16":
        return None
    gpu = known_gpu(torch.cuda.get_device_name(device))
    return gpu.peak_tflops if gpu else None
