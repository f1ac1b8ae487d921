"""What of a run goes into its checkpoints: parts, each a set of named tensors that are saved and filled in place.

To have something else in checkpoints, write a part and name it in `loop.checkpoint_parts`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load

from mimir_shared.errors import CacheError
from mimir_train.checkpoint.folder import CheckpointInfo
from mimir_train.checkpoint.storage import PieceReader, faults_of_ranks
from mimir_train.parallel.sharding import let_go_of_whole

Dims = tuple[int, ...]


class CheckpointPart(Protocol):
    """One folder of a checkpoint. Tensors may be sharded over ranks (DTensor), or the same on all of them."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Name → tensor as it is now; no copies."""

    def to_fill(self, saved: Mapping[str, Dims]) -> Mapping[str, Tensor]:
        """Name → tensor that a checkpoint is read into.

        Args:
            saved: name → dims of what the checkpoint has of this part. What is not filled of it is refused, but for
                names that begin with "rank", which are those ranks' own.
        """

    def filled(self, tensors: Mapping[str, Tensor]) -> None:
        """Take note that the tensors of `to_fill` now hold what was saved."""


class ModelPart:
    """The weights that are trained, in whichever way the model is spread over ranks."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def tensors(self) -> dict[str, Tensor]:
        # values are of any type there; of a model without buffers they are its weights
        options = StateDictOptions(ignore_frozen_params=True)
        return cast(dict[str, Tensor], get_model_state_dict(self._model, options=options))

    def to_fill(self, saved: Mapping[str, Dims]) -> dict[str, Tensor]:
        return self.tensors()

    def filled(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to do: they are the weights themselves."""


class OptimizerPart:
    """What an optimizer keeps of each parameter, named "parameter.exp_avg" and so on; its rates follow from the step.

    Parameters that no step has reached have no state, before and after.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self._optimizer = optimizer
        self._model = model

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{field}": value
            for name, parameter in trained_parameters(self._model).items()
            for field, value in self._optimizer.state.get(parameter, {}).items()
        }

    def to_fill(self, saved: Mapping[str, Dims]) -> dict[str, Tensor]:
        parameters = trained_parameters(self._model)
        wanted = {}
        for name, dims in saved.items():
            parameter = parameters.get(name.rpartition(".")[0])
            if parameter is not None:  # a count of steps is a scalar; all else is as large as its parameter
                scalar = torch.zeros((), device=parameter.device)
                wanted[name] = torch.zeros_like(parameter.detach()) if dims else scalar
        return wanted

    def filled(self, tensors: Mapping[str, Tensor]) -> None:
        parameters = trained_parameters(self._model)
        for full_name, tensor in tensors.items():
            name, _, field = full_name.rpartition(".")
            self._optimizer.state[parameters[name]][field] = tensor


class RandomPart:
    """The state of this rank's generators; ranks that were not there when it was saved keep what they have.

    No step draws from them: what is random in a step is keyed by seed, step and sample. It is kept for what others
    put into a model.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self._prefix = f"rank{rank:05d}"
        self._device = device

    def tensors(self) -> dict[str, Tensor]:
        states = {f"{self._prefix}.cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            states[f"{self._prefix}.cuda"] = torch.cuda.get_rng_state(self._device)
        return states

    def to_fill(self, saved: Mapping[str, Dims]) -> dict[str, Tensor]:
        own = self.tensors()
        return {name: own[name] for name, dims in saved.items() if name in own and dims == tuple(own[name].shape)}

    def filled(self, tensors: Mapping[str, Tensor]) -> None:
        for name, state in tensors.items():
            if name.endswith(".cpu"):
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state, self._device)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by its name, as the optimizer holds it: this rank's shard where the model is sharded."""
    let_go_of_whole(model)  # until then the whole parameter may stand in the shard's place
    return dict(model.named_parameters())


def live_tensors(parts: Mapping[str, CheckpointPart]) -> dict[str, Tensor]:
    """ "part.name" → tensor of all parts."""
    return {f"{part}.{name}": tensor for part, of in parts.items() for name, tensor in of.tensors().items()}


def fill_parts(folder: Path, info: CheckpointInfo, parts: Mapping[str, CheckpointPart]) -> None:
    """Read a checkpoint that was checked into the parts of a run, each rank what it holds. All ranks call it together.

    Raises: CacheError where the checkpoint is of another model.
    """
    for part, of in parts.items():
        reader = PieceReader(folder, info.files_of(part))
        saved = {name.partition(".")[2]: dims for name, dims in reader.dims.items()}
        tensors = of.to_fill(saved)
        left = sorted(name for name in saved.keys() - tensors.keys() if not name.startswith("rank"))
        if left:
            raise CacheError(f"{folder / part}: has {left[0]!r}, which this run's {part} does not have")
        fill_tensors(folder, reader, part, tensors)
        of.filled(tensors)


def fill_tensors(folder: Path, reader: PieceReader, part: str, tensors: Mapping[str, Tensor]) -> None:
    """Read tensors of one part into those given. Raises CacheError where it has none such, or of other dims."""
    dims = reader.dims
    for name, tensor in tensors.items():
        saved = dims.get(f"{part}.{name}")
        if saved != tuple(tensor.shape):
            found = "no such tensor" if saved is None else f"one of dims {saved}"
            raise CacheError(f"{folder / part}: expected {name!r} of dims {tuple(tensor.shape)}, got {found}")
    with faults_of_ranks():
        load({f"{part}.{name}": tensor for name, tensor in tensors.items()}, storage_reader=reader)
