"""Answers from vLLM, in a child process that may die (vllm_process.py)."""

import time
from collections.abc import Sequence

from mimir_precompute.config import ComputeDType, VllmSettings
from mimir_precompute.encoders.answer_engine import Answer, EngineGaveUp, Request, until_end
from mimir_precompute.encoders.vllm_process import VllmProcess, require_vllm, vllm_version
from mimir_precompute.model_files import ResolvedModel


class VllmEngine:
    """A causal LM in a child process of vLLM's."""

    def __init__(
        self,
        model: ResolvedModel,
        dtype: ComputeDType,
        device: str,
        settings: VllmSettings,
        *,
        end_ids: Sequence[int],
        temperature: float,
        max_model_len: int,
    ) -> None:
        """Start the engine and wait until it is ready.

        Args:
            end_ids: the tokens that end an answer.
            temperature: of sampled requests.
            max_model_len: tokens of the longest prompt with its answer.
        Raises: InputError where vLLM is not installed, MachineError where it does not start.
        """
        require_vllm("--llm-engine")
        self.end_ids = list(end_ids)
        task = {"task": "generate", "end_ids": self.end_ids, "temperature": temperature}
        self.process = VllmProcess(model, dtype, device, settings, max_model_len=max_model_len, task=task)
        self._prompts = self._prompt_tokens = self._cached_tokens = self._answer_tokens = 0
        self._busy_s = 0.0

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer prompts, in order; token ids without the end token.

        Raises: MachineError where the engine does not start again, or dies over prompt after prompt.
        """
        began = time.monotonic()
        answers: dict[int, Answer] = {}
        asked = [
            {"prompt_ids": request.prompt_ids, "max_new_tokens": request.max_new_tokens, "seed": request.seed}
            for request in requests
        ]
        for i, result in self.process.results(asked):
            if isinstance(result, EngineGaveUp):
                answers[i] = result
                continue
            token_ids: list[int] = result.fields["token_ids"]
            self._prompts += 1
            self._prompt_tokens += len(requests[i].prompt_ids)
            self._cached_tokens += int(result.fields["cached"])
            self._answer_tokens += len(token_ids)
            answers[i] = until_end(token_ids, self.end_ids)
        self._busy_s += time.monotonic() - began
        return [answers[i] for i in range(len(requests))]

    def report(self) -> dict[str, float | int | str]:
        """What the engine did, for the log: times, tokens, and how much of the prompts came out of the cache."""
        return {
            "engine": f"vllm {vllm_version()}",
            "starts": self.process.starts,
            "start_s": round(self.process.start_s, 2),
            "prompts": self._prompts,
            "prompt_tokens": self._prompt_tokens,
            "cached_prompt_tokens": self._cached_tokens,
            "answer_tokens": self._answer_tokens,
            "answer_tokens_per_s": round(self._answer_tokens / self._busy_s, 1) if self._busy_s else 0.0,
        }

    def close(self) -> None:
        """End the child; the engine is of no use afterwards."""
        self.process.close()
