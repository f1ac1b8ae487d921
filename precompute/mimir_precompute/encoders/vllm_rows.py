"""The LLM's hidden rows from vLLM's per-token pooling, in a child process that may die (vllm_process.py)."""

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from mimir_precompute.config import LlmSettings
from mimir_precompute.encoders.answer_engine import EngineGaveUp
from mimir_precompute.encoders.arrays import TORCH_DTYPES
from mimir_precompute.encoders.vllm_process import Message, VllmProcess, require_vllm
from mimir_precompute.model_files import ResolvedModel

_SENT_AS: Final = {"f32": torch.float32, "bf16": torch.bfloat16}


class VllmRows:
    """Rows of the last layer after the final norm; vLLM forms the batches, and there is no padding."""

    def __init__(self, model: ResolvedModel, settings: LlmSettings, device: str, *, longest: int) -> None:
        """Start the child and wait until it is ready.

        Args:
            longest: tokens of the longest sequence.
        Raises: InputError where vLLM is not installed, MachineError where it does not start.
        """
        assert settings.layer == "last", f"vLLM pools the last layer alone, asked for {settings.layer!r}"
        require_vllm("--llm-hidden-engine")
        self._dtype = TORCH_DTYPES[settings.dtype]
        self.process = VllmProcess(
            model, settings.dtype, device, settings.vllm, max_model_len=longest, task={"task": "hidden"}
        )

    def hidden_rows(self, sequences: Sequence[list[int]]) -> Iterator[tuple[int, Tensor | EngineGaveUp]]:
        """As the interface says; the rows are on the CPU and come as they are finished.

        Raises: MachineError where the engine does not start again, or dies over sequence after sequence.
        """
        for i, result in self.process.results([{"prompt_ids": token_ids} for token_ids in sequences]):
            if isinstance(result, EngineGaveUp):
                yield i, result
                continue
            rows = _rows_of(result)
            assert len(rows) == len(sequences[i]), f"{len(rows)} rows for {len(sequences[i])} tokens"
            yield i, rows.to(self._dtype)

    def close(self) -> None:
        """End the child; the source is of no use afterwards."""
        self.process.close()


def _rows_of(message: Message) -> Tensor:
    """(n, H) in the dtype in which they were sent."""
    # a bytearray: torch wants memory that may be written to
    flat = torch.frombuffer(bytearray(message.payload), dtype=_SENT_AS[message.fields["dtype"]])
    return flat.reshape(message.fields["shape"])
