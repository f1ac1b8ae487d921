"""Answers from transformers' generate: the engine of CPUs, and the reference of the other.

Greedy requests are greedy. Each sampled one draws from its own random numbers, so that what it gets depends neither on
its batch mates nor on the order. Batching can still change the last bits of a logit, and with them a choice between two
tokens that are all but equal.
"""

import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from mimir_precompute.config import ComputeDType
from mimir_precompute.encoders.answer_engine import Answer, Request, until_end
from mimir_precompute.encoders.arrays import free_memory
from mimir_precompute.encoders.causal_lm import load_causal_lm
from mimir_precompute.model_files import ResolvedModel

GenerationConfig: Any = transformers.GenerationConfig
"""Its constructor takes anything by keyword and has no types."""


class TransformersEngine:
    """A causal LM in this process."""

    def __init__(
        self,
        model: ResolvedModel,
        dtype: ComputeDType,
        device: str,
        *,
        end_ids: Sequence[int],
        temperature: float,
        batch_size: int,
    ) -> None:
        """Raises: InputError if the folder holds no causal LM.

        Args:
            end_ids: the tokens that end an answer.
            temperature: of sampled requests.
            batch_size: prompts in a launch.
        """
        self.device = torch.device(device)
        self.end_ids = list(end_ids)
        self.temperature = temperature
        self.batch_size = batch_size
        self._prompts = self._prompt_tokens = self._answer_tokens = 0
        self._busy_s = 0.0
        began = time.monotonic()
        self.lm = load_causal_lm(model, dtype, device)
        self._start_s = time.monotonic() - began
        # generate() fills what a call leaves open from here: a model's own sampling defaults or repetition
        # penalty would make variant 0 something else than greedy
        self.lm.generation_config = GenerationConfig()

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer prompts, in order; token ids without the end token.

        Launches hold prompts of like length, `batch_size` at most; greedy and sampled ones never share one.
        """

        # greedy and sampled ask for other processing, and the answers' limit is one number for a launch
        def launch_kind(i: int) -> tuple[bool, int]:
            return requests[i].seed is not None, requests[i].max_new_tokens

        began = time.monotonic()
        order = sorted(range(len(requests)), key=lambda i: (launch_kind(i), len(requests[i].prompt_ids), i))
        answers: list[Answer] = [[] for _ in requests]
        for _, kind in groupby(order, key=launch_kind):
            members = list(kind)
            for start in range(0, len(members), self.batch_size):
                launch = members[start : start + self.batch_size]
                for i, answer in zip(launch, self._launch([requests[i] for i in launch]), strict=True):
                    answers[i] = answer
                    self._answer_tokens += len(answer)
        self._prompts += len(requests)
        self._prompt_tokens += sum(len(request.prompt_ids) for request in requests)
        self._busy_s += time.monotonic() - began
        return answers

    def report(self) -> dict[str, float | int | str]:
        """What the engine did, for the log."""
        return {
            "engine": f"transformers {transformers.__version__}",
            "start_s": round(self._start_s, 2),
            "prompts": self._prompts,
            "prompt_tokens": self._prompt_tokens,
            "answer_tokens": self._answer_tokens,
            "answer_tokens_per_s": round(self._answer_tokens / self._busy_s, 1) if self._busy_s else 0.0,
        }

    def close(self) -> None:
        """Free the model's memory; the engine is of no use afterwards."""
        del self.lm
        free_memory()

    @torch.inference_mode()
    def _launch(self, requests: list[Request]) -> list[list[int]]:
        width = max(len(request.prompt_ids) for request in requests)
        pad_id = self.end_ids[0] if self.end_ids else 0
        # padded on the left: the last token of every row is then the one that is answered
        input_ids = torch.full((len(requests), width), pad_id)
        attention_mask = torch.zeros(len(requests), width, dtype=torch.int64)
        for row, request in enumerate(requests):
            input_ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids, dtype=torch.int64)
            attention_mask[row, width - len(request.prompt_ids) :] = 1
        seeds = [request.seed for request in requests if request.seed is not None]
        processors = LogitsProcessorList([SeededSampling(seeds, self.temperature)] if seeds else [])
        output = self.lm.generate(
            input_ids=input_ids.to(self.device),
            attention_mask=attention_mask.to(self.device),
            logits_processor=processors,
            generation_config=GenerationConfig(
                do_sample=False,
                num_beams=1,
                max_new_tokens=requests[0].max_new_tokens,
                eos_token_id=self.end_ids or None,
                pad_token_id=pad_id,
                use_cache=True,
            ),
        )
        return [until_end(row, self.end_ids) for row in output[:, width:].tolist()]


class SeededSampling(LogitsProcessor):
    """Sample at a temperature, each row from its own generator, by the Gumbel-max trick.

    The largest of logit/temperature − log(E), E exponential, is a draw from the softmax; so greedy search over the
    scores returned here is sampling, and no row sees the random numbers of another.
    """

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        # on the CPU: the same numbers whatever the device
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) logits → (B, V) float32 scores."""
        exponential = torch.stack(
            [torch.empty(scores.shape[1]).exponential_(generator=generator) for generator in self.generators]
        )
        return scores.float() / self.temperature - exponential.to(scores.device).log()
