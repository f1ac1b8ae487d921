"""GPUs by name: how many operations and bytes a second their data sheets promise."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from mimir_shared.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The rates of a data sheet; nobody reaches them, so an estimate takes a share of both."""

    name: str
    """Words that the device's name has, as CUDA tells it."""
    peak_tflops: float
    """10^12 operations a second in dense bfloat16 matrix products."""
    peak_bytes_per_s: float
    """Of its memory."""


GPUS: Final[Mapping[str, Gpu]] = MappingProxyType(
    {
        name: Gpu(name=name, peak_tflops=tflops, peak_bytes_per_s=terabytes * 1e12)
        for name, tflops, terabytes in (
            ("B200", 2250.0, 7.7),
            ("H200 NVL", 835.0, 4.8),
            ("H200", 989.4, 4.8),
            ("H100 NVL", 835.0, 3.9),
            ("H100 PCIe", 756.0, 2.0),
            ("H100", 989.4, 3.35),
            ("H800", 989.4, 3.35),
            ("H20", 148.0, 4.0),
            ("A100", 312.0, 2.039),
            ("A800", 312.0, 2.039),
            ("L40S", 362.05, 0.864),
            ("L40", 181.05, 0.864),
            ("L4", 121.0, 0.3),
            ("A40", 149.7, 0.696),
            ("A10", 125.0, 0.6),
        )
    }
)
"""Longer names of one device stand before shorter ones. Source: NVIDIA's data sheets, where figures with sparsity are
halved; of the A100 and A800 that with 80 GB."""


def find_gpu(name: str) -> Gpu:
    """As typed: "h100", "h100-pcie". Raises InputError that lists the GPUs there are."""
    names = {known.lower().replace(" ", "-"): gpu for known, gpu in GPUS.items()}
    if name.lower().replace(" ", "-") not in names:
        raise InputError(f"--gpu {name!r}: expected one of {', '.join(names)}")
    return names[name.lower().replace(" ", "-")]


def known_gpu(device_name: str) -> Gpu | None:
    """A device by the name that CUDA gives it, for instance "NVIDIA H100 80GB HBM3"; None: not listed."""
    words = device_name.replace("-", " ").split()
    return next((gpu for gpu in GPUS.values() if all(part in words for part in gpu.name.split())), None)
