"""On which device the models run."""

import os
import re
from pathlib import Path

from mimir_shared.errors import InputError


def choose_device(text: str) -> str:
    """Turn auto, cpu, cuda or cuda:N into a torch device name. Raises InputError for a device that is not there."""
    if text == "cpu":
        return "cpu"
    if text != "auto" and not re.fullmatch(r"cuda(:\d+)?", text):
        raise InputError(f"--device {text!r}: expected auto, cpu, cuda or cuda:N")
    if text == "auto" and not _may_have_cuda():
        return "cpu"
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto":
        return "cuda" if count else "cpu"
    index = int(text.partition(":")[2] or 0)
    if index >= count:
        raise InputError(f"--device {text}: this machine has {count} CUDA devices; use --device cpu or auto")
    return text


def visible_gpus() -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES is to be for a process that gets one of the GPUs of this one; empty without GPUs."""
    if not _may_have_cuda():
        return ()
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(named[:count] if named else map(str, range(count)))


def _may_have_cuda() -> bool:
    # Looked up without torch, whose import costs a call with nothing to do more than all the rest.
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-ctrl", "/dev/kfd"))
