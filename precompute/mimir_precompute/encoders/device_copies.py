"""Copies between the host and one device that nobody waits for until the data is wanted.

On a CUDA device: through page-locked memory, which torch keeps and reuses, and upwards in a stream of its own, so that
a copy and the work before it run at once. On a CPU nothing is copied.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimir_precompute.encoders.arrays import feature_of, stored_form
from mimir_shared.features import DType, FeatureTensor

Stream: Any = torch.cuda.Stream
Event: Any = torch.cuda.Event
"""Their constructors have no types."""


@dataclass(frozen=True, kw_only=True)
class Download:
    """A tensor on its way to the host, in the form in which it is stored."""

    host: Tensor
    dtype: DType
    arrived: torch.cuda.Event | None
    """None: it is there."""

    def wait(self) -> FeatureTensor:
        """Wait for the copy, and for the work that it follows; from any thread."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return feature_of(self.host, self.dtype)


class DeviceCopies:
    """Copies of one device, in the order of the calls."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._uploads = Stream(device) if device.type == "cuda" else None

    def upload(self, array: np.ndarray) -> Tensor:
        """Hand an array to the work that is queued next on the device; the array may change when this returns.

        On a CPU the tensor is the array's own memory.
        """
        host = torch.from_numpy(array)
        if self._uploads is None:
            return host.to(self.device)
        staged = torch.empty(host.shape, dtype=host.dtype, pin_memory=True).copy_(host)
        working = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._uploads):
            moved = staged.to(self.device, non_blocking=True)
        working.wait_stream(self._uploads)
        # it was allocated for the stream of uploads, which must not reuse its memory while the work reads it
        moved.record_stream(working)
        return moved

    def download(self, tensor: Tensor, dtype: DType = "bf16") -> Download:
        """Begin to fetch a tensor in its stored dtype, once the work queued so far has made it."""
        stored = stored_form(tensor, dtype)
        if self._uploads is None:
            return Download(host=stored, dtype=dtype, arrived=None)
        host = torch.empty(stored.shape, dtype=stored.dtype, pin_memory=True)
        # in the stream of the work: it is ordered with it, and 5 MB are a thousandth of what encoding them took
        host.copy_(stored, non_blocking=True)
        # blocking: the thread that waits sleeps, and leaves its core to the decoders
        arrived = Event(blocking=True)
        arrived.record(torch.cuda.current_stream(self.device))
        return Download(host=host, dtype=dtype, arrived=arrived)
