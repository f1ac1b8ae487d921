"""GPUs by the name that CUDA gives them, and by the name that people type."""

import pytest

from mimir_shared.errors import InputError
from mimir_shared.gpus import GPUS, find_gpu, known_gpu


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10G", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_a_device_is_found_by_its_own_name_and_no_other(name: str, tflops: float | None) -> None:
    gpu = known_gpu(name)
    assert (gpu.peak_tflops if gpu else None) == tflops


def test_a_gpu_is_typed_in_any_case_and_an_unknown_one_is_told_the_names() -> None:
    assert find_gpu("h100-pcie") == find_gpu("H100 PCIe") == GPUS["H100 PCIe"]
    assert {find_gpu(name).name for name in GPUS} == set(GPUS)
    with pytest.raises(InputError, match=r"--gpu 'tpu': expected one of b200, .*h100-pcie"):
        find_gpu("tpu")
