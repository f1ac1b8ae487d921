"""Running averages of the weights (EMA): float32, updated after every step, each rank its own part of them.

An average is cut over the ranks as its parameter is, so a rank holds as much of it as of the weights, and an update
needs no exchange. How fast it forgets is a function of the step (`ema_profile`), so a run that goes on needs only the
averages themselves.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mimir_train.ema_profile import EmaProfile
from mimir_train.parallel.sharding import let_go_of_whole


class EmaWeights:
    """One average over the parameters that are trained. It is a part of checkpoints (`CheckpointPart`).

    Args:
        parameters: name → parameter as the optimizer holds it, sharded or whole; frozen ones are left out.
    """

    def __init__(self, profile: EmaProfile, parameters: Mapping[str, nn.Parameter]) -> None:
        self.profile = profile
        self._parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        for name, parameter in self._parameters.items():
            assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}; weights are float32 in training"
        self._averages = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._own_averages = [own_part(average) for average in self._averages.values()]

    @torch.no_grad()
    def update(self, steps_done: int) -> None:
        """Take in the weights as they are after `steps_done` steps of the whole training."""
        own_parameters = [own_part(parameter) for parameter in self._parameters.values()]
        new_share = 1.0 - self.profile.kept_share(steps_done)
        torch._foreach_lerp_(self._own_averages, own_parameters, new_share)

    @contextmanager
    def in_place_of_weights(self, model: nn.Module) -> Iterator[None]:
        """Inside, the parameters of the model hold the averages; behind, they are what they were, bit for bit."""
        let_go_of_whole(model)
        self._swap()
        try:
            yield
        finally:
            let_go_of_whole(model)
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self._parameters.values(), self._own_averages, strict=True):
            own = own_part(parameter)
            before = own.clone()
            own.copy_(average)
            average.copy_(before)

    def tensors(self) -> dict[str, Tensor]:
        """Name of a parameter → its average."""
        return dict(self._averages)

    def to_fill(self, saved: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return self.tensors()

    def filled(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to do: they are the averages themselves."""


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, as a view: all of it, or its shard of a DTensor."""
    if isinstance(tensor, DTensor):
        local: Tensor = tensor.to_local()
        return local
    return tensor
