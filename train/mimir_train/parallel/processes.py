"""The processes that train together, and what they tell each other: a few numbers a step, through here alone.

What they share of the model is `mimir_train.parallel.sharding`'s.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]  # public, but not in its own list

from mimir_shared.errors import InputError, MachineError
from mimir_train.config import TrainConfig
from mimir_train.parallel.launch import Place, find_place
from mimir_train.parallel.watchdog import Watchdog

EXCHANGE_TIMEOUT: Final = timedelta(hours=1)
"""Of one exchange: as long as the slowest checkpoint may hold the others up."""
_ARRIVAL_TIMEOUT: Final = timedelta(minutes=10)
_BACKENDS = ("gloo", "nccl", "connection closed", "connection reset")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """This process among its peers."""

    place: Place
    device: torch.device
    watchdog: Watchdog | None = None
    """None: nobody watches."""

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def world_size(self) -> int:
        return self.place.world_size

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks to the user and writes files."""
        return self.rank == 0

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The values of every rank, by rank; each gives equally many. Raises MachineError where a peer is gone."""
        if self.world_size == 1:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(own) for _ in range(self.world_size)]
        with peer_faults():
            dist.all_gather(everyone, own)
        return [other.tolist() for other in everyone]

    def watched(self, name: str) -> AbstractContextManager[None]:
        """Inside, this rank takes its usual time, or it is ended."""
        return nullcontext() if self.watchdog is None else self.watchdog.watch(name)

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
            f"rank {find_place().rank}: another rank is gone or does not answer "
            f"({str(fault).splitlines()[0][:200]}); look at what the other ranks said, then run the same command again "
            f"with --resume-from-checkpoint latest"
        ) from fault


@contextmanager
def start_parallel(config: TrainConfig) -> Iterator[Parallel]:
    """Join the ranks that the environment names; a group of them that stands already is used as it is.

    One process alone gets a group only where it is to shard: that goes through the same code as over many ranks.

    Raises: InputError for a device that is not there; MachineError where ranks do not come.
    """
    place = find_place()
    device = _device(config.run.device, place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    needs_group = place.world_size > 1 or config.parallel.strategy in ("fsdp", "hsdp")
    joined = needs_group and not dist.is_initialized()
    if joined:
        _join(place, device)
    parallel = Parallel(place=place, device=device)
    watchdog = Watchdog(place, config.run.watchdog_s, parallel.gather)
    try:
        yield replace(parallel, watchdog=watchdog)
    except BaseException:
        watchdog.stop(in_peace=False)  # the others learn of it at once, and wait no longer
        if joined and place.world_size == 1:  # else taking leave may wait for those that are gone
            dist.destroy_process_group()
        raise
    if joined:
        dist.destroy_process_group()
    watchdog.stop(in_peace=True)


def _join(place: Place, device: torch.device) -> None:
    where = f"{place.master_address}:{place.master_port}"
    store: HashStore | TCPStore | None = (
        None  # torchrun keeps the meeting point itself, and sees to it that all ranks come
    )
    if place.world_size == 1:
        store = HashStore()
    elif place.launcher == "slurm":
        try:
            store = TCPStore(
                place.master_address, place.master_port, place.world_size, place.rank == 0, timeout=_ARRIVAL_TIMEOUT
            )
        except RuntimeError as fault:
            raise MachineError(
                f"rank {place.rank}: not all of {place.world_size} ranks came to {where} in {_ARRIVAL_TIMEOUT} "
                f"({str(fault).splitlines()[0][:200]}); start the program once for each task, by `srun`"
            ) from fault
    with peer_faults():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.world_size,
            timeout=EXCHANGE_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )


def _device(name: str, place: Place) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as fault:
        raise InputError(f"run.device {name!r}: expected auto, cpu, cuda or cuda:N") from fault
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"run.device {name!r}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise InputError(f"run.device {name}: torch sees no CUDA device here; give cpu or auto")
    count = torch.cuda.device_count()
    # Slurm may show each task its own device alone
    index = 0 if place.launcher == "slurm" and count == 1 else place.local_rank
    index = index if device.index is None else device.index
    if index >= count:
        wanted = f"{place.local_world_size} ranks of this machine want one each" if device.index is None else name
        raise InputError(f"run.device {name}: there are {count} CUDA devices here, and {wanted}")
    return torch.device("cuda", index)
