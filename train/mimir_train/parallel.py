"""The processes that train together: one, or those that torchrun started.

Gradients are averaged by DistributedDataParallel; besides, ranks exchange a few numbers a step, through here alone.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mimir_shared.errors import InputError, MachineError

_TIMEOUT = timedelta(minutes=30)
_BACKENDS = ("gloo", "nccl", "connection closed", "connection reset")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks to the user and writes files."""
        return self.rank == 0

    def wrap(self, model: nn.Module, *, find_unused: bool) -> nn.Module:
        """The module whose backward averages gradients over the ranks.

        Args:
            find_unused: some parameters take part in some steps only.
        """
        if self.world_size == 1:
            return model
        return DistributedDataParallel(model, find_unused_parameters=find_unused)

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The values of every rank, by rank; each gives equally many. Raises MachineError where a peer is gone."""
        if self.world_size == 1:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(own) for _ in range(self.world_size)]
        with peer_faults():
            dist.all_gather(everyone, own)
        return [other.tolist() for other in everyone]

    def wait_for_all(self) -> None:
        """Return when every rank is here."""
        self.gather([0.0])


@contextmanager
def peer_faults() -> Iterator[None]:
    """Turn a failed exchange into a MachineError; other faults pass as they are."""
    try:
        yield
    except RuntimeError as fault:
        # backward raises the backend's fault as a plain RuntimeError: its text alone tells
        if not isinstance(fault, dist.DistError) and not any(name in str(fault).lower() for name in _BACKENDS):
            raise
        raise MachineError(
            f"rank {os.environ.get('RANK', '0')}: another rank is gone or does not answer "
            f"({str(fault).splitlines()[0][:200]}); look at what the other ranks said, then run the same command again "
            f"with --resume-from-checkpoint latest"
        ) from fault


@contextmanager
def start_parallel(device: str) -> Iterator[Parallel]:
    """Join the ranks that the environment names (RANK, WORLD_SIZE, LOCAL_RANK, as torchrun sets them).

    Args:
        device: auto, cpu, cuda or cuda:N.
    Raises: InputError for a device that is not there.
    """
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1:
        yield Parallel(rank=0, world_size=1, device=chosen)
        return
    with peer_faults():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield Parallel(rank=rank, world_size=world_size, device=chosen)
    finally:
        dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as fault:
        raise InputError(f"run.device {name!r}: expected auto, cpu, cuda or cuda:N") from fault
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"run.device {name}: torch sees no CUDA device here; give cpu or auto")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise InputError(f"run.device {device}: there are {torch.cuda.device_count()} CUDA devices here")
    elif device.type != "cpu":
        raise InputError(f"run.device {name!r}: expected auto, cpu, cuda or cuda:N")
    return device
