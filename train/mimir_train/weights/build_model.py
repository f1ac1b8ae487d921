"""The model of a run, with the weights that it starts from: built so that no rank ever holds more than its part.

Parameters are made on the meta device, cut, given storage, and filled: from the rows of a folder, or drawn piece by
piece. What is drawn depends on the seed and the piece alone: any strategy and number of ranks begins alike.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from mimir_train.block_execution import set_block_execution
from mimir_train.fit import FittedRun
from mimir_train.model.config import DiTConfig
from mimir_train.model.dit import DiT
from mimir_train.model.fuser import TokenFuser
from mimir_train.parallel.processes import Parallel
from mimir_train.parallel.sharding import (
    Sharing,
    replicate_model,
    rows_held,
    settle_sharing,
    shard_model,
    state_bytes,
    write_held_rows,
)
from mimir_train.trained_model import TrainedModel
from mimir_train.weights.lora import adapted_maps, add_adapters, first_adapter
from mimir_train.weights.transformer_folder import check_weights, read_rows


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """A model that is ready to be trained."""

    model: TrainedModel
    wrapped: nn.Module
    """The same, as its gradients are averaged over ranks: what is called in training."""
    sharing: Sharing


def build_model(fitted: FittedRun, parallel: Parallel, *, filled_later: bool) -> BuiltModel:
    """Build transformer and fuser in float32 on this rank's device, shared as the settings say.

    Args:
        filled_later: leave the weights as the memory is, for a checkpoint is read into them.
    Raises: InputError, CacheError where the initial transformer's folder is not what it should be.
    """
    config = fitted.config
    with torch.device("meta"):
        model = TrainedModel(DiT(fitted.initial.config), TokenFuser(fitted.fuser))
    if fitted.initial.folder is not None:
        check_weights(fitted.initial.folder, model.dit)
    if config.model.lora is not None:
        add_adapters(model.dit, config.model.lora)
    set_block_execution(
        model.dit, checkpointing=config.parallel.activation_checkpointing, compiled=config.parallel.compile
    )
    sharing = settle_sharing(config.parallel, parallel, state_bytes(model, len(config.ema.profiles)))
    shard_model(model, sharing, parallel, config.run.precision)
    model.to_empty(device=parallel.device)
    if not filled_later or config.model.lora is not None:  # a checkpoint of adapters does not have their base
        fill_first_weights(model, fitted)
    wrapped = replicate_model(model, sharing, find_unused=fitted.fuser.stabilizer_start_step > 0)
    return BuiltModel(model=model, wrapped=wrapped, sharing=sharing)


def fill_first_weights(model: TrainedModel, fitted: FittedRun) -> None:
    """Give every parameter the value that training starts from; each rank the rows that it holds."""
    missing = dict(model.named_parameters())

    def fill(name: str, rows: Tensor) -> None:
        write_held_rows(missing.pop(name), rows)

    folder, seed = fitted.initial.folder, fitted.config.run.seed
    if folder is not None:
        for name, rows in read_rows(folder, lambda name: rows_held(missing[f"dit.{name}"])):
            fill(f"dit.{name}", rows)
    else:
        for name, tensor in drawn_transformer(model.dit.config, seed):
            fill(f"dit.{name}", _held(missing[f"dit.{name}"], tensor))
    for map_name, adapted in adapted_maps(model.dit):
        make = partial(first_adapter, adapted.in_features, adapted.out_features, adapted.rank)
        for name, tensor in _drawn(f"adapter {map_name}", seed, make):
            fill(f"dit.{map_name}.{name}", _held(missing[f"dit.{map_name}.{name}"], tensor))
    for name, tensor in _drawn("fuser", seed, lambda: TokenFuser(fitted.fuser)):
        fill(f"fuser.{name}", _held(missing[f"fuser.{name}"], tensor))
    assert not missing, f"without a first value: {sorted(missing)}"


def drawn_transformer(config: DiTConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The first weights of a transformer from scratch, on the CPU: a block at a time, for all would be too much."""
    yield from _drawn("ends", seed, lambda: DiT(replace(config, num_layers=0)))
    one_block = replace(config, num_layers=1)
    for index in range(config.num_layers):
        for name, tensor in _drawn(f"block {index}", seed, lambda: DiT(one_block)):
            if name.startswith("transformer_blocks.0."):
                yield name.replace(".0.", f".{index}.", 1), tensor


def _drawn(piece: str, seed: int, make: Callable[[], nn.Module]) -> list[tuple[str, Tensor]]:
    """The parameters of a module made with random numbers of its own."""
    digest = hashlib.blake2b(f"first weights:{seed}:{piece}".encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(int.from_bytes(digest, "little") >> 1)  # 63 bits: a signed number
        return [(name, parameter.detach()) for name, parameter in make().named_parameters()]


def _held(parameter: Tensor, whole: Tensor) -> Tensor:
    start, stop = rows_held(parameter)
    return whole[start:stop]
