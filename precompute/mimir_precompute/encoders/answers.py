"""Feature `answers`: what the LLM says to a caption and to each instruction about it. The transformers engine.

Variant 0 is greedy. The others are sampled: every prompt draws from its own random numbers, keyed by seed, clip,
variant and prompt, so that what a clip gets depends neither on its batch mates nor on the order. Batching can still
change the last bits of a logit, and with them a choice between two tokens that are all but equal.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from mimir_precompute.config import AnswersSettings
from mimir_precompute.encoders.arrays import free_memory
from mimir_precompute.encoders.base import Encoded, EncoderInput, JsonValue
from mimir_precompute.encoders.causal_lm import load_causal_lm, load_tokenizer
from mimir_precompute.encoders.prompts import CaptionTokens, PromptBuilder, end_token_ids
from mimir_precompute.model_files import ResolvedModel
from mimir_shared.errors import InputError

GenerationConfig: Any = transformers.GenerationConfig
"""Its constructor takes anything by keyword and has no types."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to be answered once."""

    prompt_ids: list[int]
    max_new_tokens: int
    seed: int | None
    """None: greedy."""


class AnswersEncoder:
    """A frozen causal LM that answers; `encode` gives a document and no tensors."""

    def __init__(self, model: ResolvedModel, settings: AnswersSettings, device: str) -> None:
        """Raises: InputError if the folder holds no causal LM with a chat template, or prompts exceed its context."""
        self.settings = settings
        self.device = torch.device(device)
        self.tokenizer = load_tokenizer(model)
        self.prompts = PromptBuilder(self.tokenizer, settings.instructions, settings.max_caption_tokens)
        _refuse_beyond_context(model, self.prompts.longest_prompt() + _longest_answer(settings))
        self.lm = load_causal_lm(model, settings.dtype, device)
        self.end_ids = end_token_ids(self.tokenizer, self.lm.generation_config.eos_token_id)
        # generate() fills what a call leaves open from here: a model's own sampling defaults or repetition
        # penalty would make variant 0 something else than greedy
        self.lm.generation_config = GenerationConfig()

    def encode(self, batch: Sequence[EncoderInput]) -> list[Encoded]:
        """Answer every prompt of every clip.

        Returns: documents `{"variants": [{"seed", "answer": {"text", "token_ids"}, "instructions": [{"name", "text",
            "token_ids"}, …]}, …], "caption_tokens", "caption_truncated"}`; token ids are without the end token, and
            an answer may be empty.
        """
        captions = [self.prompts.caption(item.caption) for item in batch]
        requests = [
            request
            for item, caption in zip(batch, captions, strict=True)
            for request in self._requests(item.key, caption)
        ]
        answers = iter(self.generate(requests))
        documents: list[Encoded] = []
        for item, caption in zip(batch, captions, strict=True):
            variants = []
            for variant in range(self.settings.variants):
                answer = self._answer(next(answers))
                instructions = [{"name": i.name, **self._answer(next(answers))} for i in self.settings.instructions]
                seed = variant_seed(self.settings.seed, item.key, variant)
                variants.append({"seed": seed, "answer": answer, "instructions": instructions})
            document = {
                "variants": variants,
                "caption_tokens": caption.full_length,
                "caption_truncated": caption.full_length > self.settings.max_caption_tokens,
            }
            documents.append(Encoded(document=document))
        return documents

    def encode_empty(self, answers: Mapping[str, JsonValue] | None) -> Encoded | None:
        """The answers to an empty user's turn, and to the instructions alone."""
        return self.encode([EncoderInput(key="", caption="")])[0]

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """Answer prompts, in order; token ids without the end token.

        Launches hold prompts of like length, `batch_size` at most; greedy and sampled ones never share one.
        """

        # greedy and sampled ask for other processing, and the answers' limit is one number for a launch
        def launch_kind(i: int) -> tuple[bool, int]:
            return requests[i].seed is not None, requests[i].max_new_tokens

        order = sorted(range(len(requests)), key=lambda i: (launch_kind(i), len(requests[i].prompt_ids), i))
        answers: list[list[int]] = [[] for _ in requests]
        for _, kind in groupby(order, key=launch_kind):
            members = list(kind)
            for start in range(0, len(members), self.settings.batch_size):
                launch = members[start : start + self.settings.batch_size]
                for i, answer in zip(launch, self._launch([requests[i] for i in launch]), strict=True):
                    answers[i] = answer
        return answers

    def close(self) -> None:
        """Free the model's memory; the encoder is of no use afterwards."""
        del self.lm
        free_memory()

    def _requests(self, key: str, caption: CaptionTokens) -> list[Request]:
        """For each variant the caption alone, then each instruction: the order in which `encode` takes the answers."""
        settings = self.settings
        answer_prompt = self.prompts.answer_prompt(caption)
        instruction_prompts = self.prompts.instruction_prompts(caption)
        prompts: list[tuple[str | None, list[int], int]] = [(None, answer_prompt, settings.max_answer_tokens)]
        prompts += [
            (instruction.name, prompt_ids, settings.max_instruction_tokens)
            for instruction, prompt_ids in zip(settings.instructions, instruction_prompts, strict=True)
        ]
        requests: list[Request] = []
        for variant in range(settings.variants):
            seed = variant_seed(settings.seed, key, variant)
            requests += [
                Request(
                    prompt_ids=prompt_ids,
                    max_new_tokens=max_new_tokens,
                    seed=None if seed is None else prompt_seed(seed, name),
                )
                for name, prompt_ids, max_new_tokens in prompts
            ]
        return requests

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
        processors = LogitsProcessorList([SeededSampling(seeds, self.settings.temperature)] if seeds else [])
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
        return [self._until_end(row) for row in output[:, width:].tolist()]

    def _until_end(self, token_ids: list[int]) -> list[int]:
        ends = [i for i, token_id in enumerate(token_ids) if token_id in self.end_ids]
        return token_ids[: ends[0]] if ends else token_ids

    def _answer(self, token_ids: list[int]) -> dict[str, JsonValue]:
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return {"text": text, "token_ids": token_ids}


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


def variant_seed(seed: int, key: str, variant: int) -> int | None:
    """The seed that is recorded for a clip's variant; None for the greedy one."""
    return None if variant == 0 else _hash_to_seed(f"{seed}/{variant}/{key}")


def prompt_seed(recorded_seed: int, instruction: str | None) -> int:
    """The seed of one prompt of a variant; `instruction` None: the answer to the caption itself."""
    prompt = "answer" if instruction is None else f"instruction/{instruction}"
    return _hash_to_seed(f"{recorded_seed}/{prompt}")


def _hash_to_seed(text: str) -> int:
    # 53 bits: exact in every JSON reader, those that hold numbers as doubles included
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11


def _longest_answer(settings: AnswersSettings) -> int:
    return max(settings.max_answer_tokens, settings.max_instruction_tokens)


def _refuse_beyond_context(model: ResolvedModel, longest: int) -> None:
    context = model.config.get("max_position_embeddings")
    if isinstance(context, int) and longest > context:
        raise InputError(
            f"model folder {model.folder}: prompt and answer take up to {longest} tokens, its context is {context}; "
            "lower the limits of caption or answer tokens, shorten the instructions, or take another model"
        )
