"""How the ranks share the model: each has all of it (DDP), each a part (FSDP2), or both (HSDP).

Applied to a plain model from outside. Transformer and fuser are sharded as two roots, so that either may also be
called alone, as sampling does.

Precision is the same whatever the strategy: parameters, their gradients once averaged, and the optimizer are float32,
and autocast decides in what each operation computes. Under FSDP the parameters of a block travel in that lower
precision: for matrices and their biases, these are the very bits that autocast would make of them; scales and shifts of
a block's norms are rounded too. All else is gathered in float32.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mimir_shared.errors import InputError
from mimir_shared.wording import counted
from mimir_train.config import ParallelConfig, Precision
from mimir_train.parallel.processes import Parallel
from mimir_train.trained_model import TrainedModel

_STATE_BYTES = 16
"""Of a parameter in training: itself, its gradient and two moments of AdamW, float32 each."""
_DDP_SHARE = 0.5
"""Of a device's memory that states may take before `auto` shards them; activations want the rest."""


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """A strategy that has been settled."""

    strategy: Literal["none", "ddp", "fsdp", "hsdp"]
    shard_size: int = 1
    """Ranks over which the parameters are cut; the world is so many times repeated."""

    @property
    def is_sharded(self) -> bool:
        """Whether every forward is an exchange, so that all ranks must take part in it."""
        return self.strategy in ("fsdp", "hsdp")

    def describe(self, world_size: int) -> str:
        if self.strategy == "none":
            return "1 process, which holds the whole model"
        share = "the whole model" if self.strategy == "ddp" else f"1/{self.shard_size} of the model"
        return f"{counted(world_size, 'rank')}, each with {share} ({self.strategy})"


def state_bytes(model: nn.Module, num_averages: int) -> int:
    """What a model in training takes without its activations: frozen parameters only themselves, float32."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trained
    return trained * (_STATE_BYTES + 4 * num_averages) + frozen * 4


def settle_sharing(config: ParallelConfig, parallel: Parallel, num_state_bytes: int) -> Sharing:
    """Choose where the settings leave it open, by what all ranks have: all must call it, and all choose alike.

    `auto` takes ddp while the states fit into half of a device's memory, else fsdp, and hsdp where several machines
    take part; on the CPU it takes ddp. HSDP cuts the model over the ranks of one machine unless told otherwise.

    Raises: InputError for a shard size that does not divide the ranks.
    """
    world_size, strategy = parallel.world_size, config.strategy
    ranks = parallel.gather([parallel.place.local_world_size, _memory_bytes(parallel.device)])
    machine = int(max(of_machine for of_machine, _ in ranks))
    if strategy == "auto":
        fits = world_size == 1 or num_state_bytes <= _DDP_SHARE * min(memory_bytes for _, memory_bytes in ranks)
        are_alike = all(of_machine == machine for of_machine, _ in ranks)
        several_machines = 1 < machine < world_size and world_size % machine == 0 and are_alike
        strategy = "ddp" if fits else "hsdp" if several_machines else "fsdp"
    if strategy == "ddp":
        return Sharing(strategy="none" if world_size == 1 else "ddp")
    if strategy == "fsdp":
        return Sharing(strategy="fsdp", shard_size=world_size)
    shard_size = config.shard_size or machine
    if world_size % shard_size:
        raise InputError(f"--shard-size {shard_size}: the {world_size} ranks cannot be cut into groups of so many")
    return Sharing(strategy="hsdp", shard_size=shard_size)


def _memory_bytes(device: torch.device) -> float:
    """Of a CUDA device; on the CPU nothing is chosen by it."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")


def shard_model(model: TrainedModel, sharing: Sharing, parallel: Parallel, precision: Precision) -> None:
    """Cut the parameters of a model where the strategy does; none holds its weights yet, so it may be on meta."""
    if not sharing.is_sharded:
        return
    # the prediction is a view, and nothing writes into it
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPDiT\) returned a view", UserWarning)
    mesh = _mesh(sharing, parallel)
    blocks = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bfloat16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # angles of the rotary positions come in float32, and stay
    )
    for block in model.dit.transformer_blocks:
        fully_shard(block, mesh=mesh, mp_policy=blocks)
    for root in (model.dit, model.fuser):
        if any(True for _ in root.parameters()):
            fully_shard(root, mesh=mesh)


def replicate_model(model: TrainedModel, sharing: Sharing, *, find_unused: bool) -> nn.Module:
    """The module whose backward averages gradients over the ranks; its weights are in place.

    Args:
        find_unused: some parameters take part in some steps only.
    """
    if sharing.strategy != "ddp":
        return model
    return DistributedDataParallel(model, find_unused_parameters=find_unused, gradient_as_bucket_view=True)


def _mesh(sharing: Sharing, parallel: Parallel) -> DeviceMesh:
    device_type, shard_size = parallel.device.type, sharing.shard_size
    if sharing.strategy == "fsdp":
        return init_device_mesh(device_type, (shard_size,), mesh_dim_names=("shard",))
    sizes = (parallel.world_size // shard_size, shard_size)
    return init_device_mesh(device_type, sizes, mesh_dim_names=("replicate", "shard"))


# --- gradients ----------------------------------------------------------------------------------------------------


@contextmanager
def average_gradients(wrapped: nn.Module, *, now: bool) -> Iterator[None]:
    """Exchange gradients in this backward only if `now`: once a step, not once a micro-batch.

    Sharded gradients are brought to their shards in every backward, for whole ones would not fit; only the average
    over replicas waits.
    """
    for module in _sharded_modules(wrapped):
        module.set_requires_all_reduce(now, recurse=False)
    waits = isinstance(wrapped, DistributedDataParallel) and not now
    with wrapped.no_sync() if waits else nullcontext():  # type: ignore[operator]  # a method of that class alone
        yield


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scale gradients down to the norm allowed.

    Returns: the norm that they had, over all parameters and ranks: the same on every rank.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    norm = whole_tensor(nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None]))
    nn.utils.clip_grads_with_norm_(with_gradient, limit, norm)
    return float(norm)


# --- parts and wholes ---------------------------------------------------------------------------------------------


def rows_held(parameter: Tensor) -> tuple[int, int]:
    """Which rows of a parameter, start and stop along its first dim, this rank holds."""
    num_rows = parameter.shape[0]
    if not isinstance(parameter, DTensor):
        return 0, num_rows
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, f"this rank is not part of {mesh}"
    # the last axis of the mesh shards; as torch.chunk cuts, the last ranks may have fewer rows, or none
    share = -(-num_rows // mesh.size(-1))
    start = min(share * coordinate[-1], num_rows)
    return start, min(start + share, num_rows)


@torch.no_grad()
def write_held_rows(parameter: Tensor, rows: Tensor) -> None:
    """Put the rows that `rows_held` names into a parameter, of any float dtype and device."""
    held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    assert held.shape == rows.shape, f"this rank holds {tuple(held.shape)}, and was given {tuple(rows.shape)}"
    held.copy_(rows)


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of it where ranks hold parts; all ranks must call it together."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole: Tensor = tensor.full_tensor()
    return whole


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, the parameters of a module are whole on every rank; all ranks must enter together. For small ones."""
    sharded = list(_sharded_modules(module))
    for part in sharded:
        part.unshard()
    try:
        yield
    finally:
        for part in sharded:
            part.reshard()


def let_go_of_whole(module: nn.Module) -> None:
    """Drop whole parameters that are still there from a forward: the next one gathers them from the shards anew."""
    for part in _sharded_modules(module):
        part.reshard()


def _sharded_modules(module: nn.Module) -> Iterator[FSDPModule]:
    return (child for child in module.modules() if isinstance(child, FSDPModule))
