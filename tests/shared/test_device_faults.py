"""A device without memory, or one that fails, is the machine's fault: one line and exit code 5."""

import pytest
import torch

from mimir_shared.device_faults import device_faults
from mimir_shared.errors import MachineError


def test_a_device_without_memory_is_told_with_what_takes_less() -> None:
    told = (
        r"^t5: the device has not memory enough \(CUDA out of memory\. Tried to allocate 2\.00 GiB\); use less, or take"
    )
    with pytest.raises(MachineError, match=told), device_faults("t5", for_want_of_memory="use less"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more")


def test_a_device_that_fails_is_told() -> None:
    told = r"^t5: the device failed \(CUDA error: uncorrectable ECC error encountered\); nothing that was committed"
    with pytest.raises(MachineError, match=told), device_faults("t5", for_want_of_memory="use less"):
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nCompile with …")


def test_other_faults_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), device_faults("t5", for_want_of_memory="use less"):
        raise RuntimeError("shapes differ")
