"""What gives the LLM's hidden rows: the interface behind which transformers and vLLM stand, and transformers' part."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mimir_precompute.config import LlmSettings
from mimir_precompute.encoders.answer_engine import EngineGaveUp
from mimir_precompute.encoders.arrays import free_memory
from mimir_precompute.encoders.causal_lm import load_causal_lm
from mimir_precompute.model_files import ResolvedModel


class RowSource(Protocol):
    """A frozen causal LM without its head. A sequence's rows depend on nothing but the sequence, up to rounding."""

    def hidden_rows(self, sequences: Sequence[list[int]]) -> Iterator[tuple[int, Tensor | EngineGaveUp]]:
        """Run over sequences of token ids; gives (number of the sequence, its rows), each once, in any order.

        Returns: rows (n, H) for n tokens, in the compute dtype; of the layer "mean" float32.
        """
        ...

    def close(self) -> None:
        """Free the model's memory; the source is of no use afterwards."""
        ...


class TransformersRows:
    """Launches of `batch_size` sequences, padded on the right; any layer. The default, and what vLLM is held to."""

    def __init__(self, model: ResolvedModel, settings: LlmSettings, device: str) -> None:
        """Raises: InputError if the folder holds no causal LM."""
        self.settings = settings
        self.device = torch.device(device)
        # the body only: its last_hidden_state is what the head would read, after the final norm
        self.body = load_causal_lm(model, settings.dtype, device).base_model

    def hidden_rows(self, sequences: Sequence[list[int]]) -> Iterator[tuple[int, Tensor | EngineGaveUp]]:
        """As the interface says; the rows are on the device, like lengths come together."""
        # least padding; the index breaks ties, so that equal batches are split equally
        order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i))
        for start in range(0, len(order), self.settings.batch_size):
            launch = order[start : start + self.settings.batch_size]
            hidden = self._padded_rows([sequences[i] for i in launch])
            for rows, i in zip(hidden, launch, strict=True):
                yield i, rows[: len(sequences[i])]

    def close(self) -> None:
        """Free the model's memory; the source is of no use afterwards."""
        del self.body
        free_memory()

    @torch.inference_mode()
    def _padded_rows(self, sequences: Sequence[list[int]]) -> Tensor:
        """One pass over sequences padded on the right: (B, longest, H) on the device."""
        width = max(len(token_ids) for token_ids in sequences)
        input_ids = torch.zeros(len(sequences), width, dtype=torch.int64)
        for row, token_ids in enumerate(sequences):
            input_ids[row, : len(token_ids)] = torch.tensor(token_ids, dtype=torch.int64)
        # no mask: in a causal model no token sees the padding behind it, and without a mask attention takes its
        # fastest kernel
        layer = self.settings.layer
        output = self.body(
            input_ids=input_ids.to(self.device), use_cache=False, output_hidden_states=None if layer == "last" else True
        )
        if layer == "last":
            rows: Tensor = output.last_hidden_state
        elif layer == "mean":
            rows = mean_over_layers(output.hidden_states[1:])
        else:
            rows = output.hidden_states[layer]
        return rows


def mean_over_layers(layers: Sequence[Tensor]) -> Tensor:
    """Average layers (…, H) whose rows are first normalised to mean 0 and variance 1, in float32.

    Source: the layer-normalised average of arXiv 2506.08210.
    """
    total = torch.zeros_like(layers[0], dtype=torch.float32)
    for layer in layers:
        total += torch.nn.functional.layer_norm(layer.float(), layer.shape[-1:])
    return total / len(layers)
