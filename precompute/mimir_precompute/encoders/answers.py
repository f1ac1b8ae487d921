"""Feature `answers`: what the LLM says to a caption and to each instruction about it.

Variant 0 is greedy. The others are sampled: every prompt draws from its own random numbers, keyed by seed, clip,
variant and prompt, so that what a clip gets depends neither on its batch mates nor on the order. Who generates is an
engine's matter (answer_engine.py); prompts, seeds and the document are the same for all.
"""

import hashlib
from collections.abc import Mapping, Sequence

from mimir_precompute.config import AnswersSettings
from mimir_precompute.encoders.answer_engine import Answer, AnswerEngine, EngineGaveUp, Request, rejected
from mimir_precompute.encoders.base import Encoded, EncoderInput, JsonValue
from mimir_precompute.encoders.causal_lm import configured_end_ids, load_tokenizer
from mimir_precompute.encoders.prompts import CaptionTokens, PromptBuilder, end_token_ids
from mimir_precompute.model_files import ResolvedModel
from mimir_shared.errors import InputError, MachineError


class AnswersEncoder:
    """A frozen causal LM that answers; `encode` gives a document and no tensors."""

    def __init__(self, model: ResolvedModel, settings: AnswersSettings, device: str) -> None:
        """Raises: InputError if the folder holds no causal LM with a chat template, or prompts exceed its context."""
        self.settings = settings
        self.tokenizer = load_tokenizer(model)
        self.prompts = PromptBuilder(self.tokenizer, settings.instructions, settings.max_caption_tokens)
        longest = self.prompts.longest_prompt() + max(settings.max_answer_tokens, settings.max_instruction_tokens)
        _refuse_beyond_context(model, longest)
        self.end_ids = end_token_ids(self.tokenizer, configured_end_ids(model))
        self.engine = _build_engine(model, settings, device, self.end_ids, longest)

    def encode(self, batch: Sequence[EncoderInput]) -> list[Encoded]:
        """Answer every prompt of every clip.

        Returns: documents `{"variants": [{"seed", "answer": {"text", "token_ids"}, "instructions": [{"name", "text",
            "token_ids"}, …]}, …], "caption_tokens", "caption_truncated"}`; token ids are without the end token, and
            an answer may be empty.
        """
        captions = [self.prompts.caption(item.caption) for item in batch]
        requests = [request for item in batch for request in self.requests(item)]
        answers = self.engine.generate(requests)
        per_clip = len(requests) // len(batch) if batch else 0
        return [
            self._document(item, caption, answers[n * per_clip : (n + 1) * per_clip])
            for n, (item, caption) in enumerate(zip(batch, captions, strict=True))
        ]

    def encode_empty(self, answers: Mapping[str, JsonValue] | None) -> Encoded | None:
        """The answers to an empty user's turn, and to the instructions alone."""
        encoded = self.encode([EncoderInput(key="", caption="")])[0]
        if encoded.rejection is not None:
            raise MachineError(f"the engine does not answer the empty prompt: {encoded.rejection.detail}; run it again")
        return encoded

    def report(self) -> Mapping[str, float | int | str]:
        """What the engine did so far."""
        return self.engine.report()

    def close(self) -> None:
        """Free the model's memory; the encoder is of no use afterwards."""
        self.engine.close()

    def _document(self, item: EncoderInput, caption: CaptionTokens, answers: Sequence[Answer]) -> Encoded:
        """One clip's answers, in the order of `requests`, as they are stored."""
        given: list[dict[str, JsonValue]] = []
        for answer in answers:
            if isinstance(answer, EngineGaveUp):
                return rejected(answer)
            given.append(self._answer(answer))
        variants = []
        names = [instruction.name for instruction in self.settings.instructions]
        for variant in range(self.settings.variants):
            to_caption, *to_instructions = given[variant * (1 + len(names)) : (variant + 1) * (1 + len(names))]
            variants.append(
                {
                    "seed": variant_seed(self.settings.seed, item.key, variant),
                    "answer": to_caption,
                    "instructions": [{"name": n, **told} for n, told in zip(names, to_instructions, strict=True)],
                }
            )
        document = {
            "variants": variants,
            "caption_tokens": caption.full_length,
            "caption_truncated": caption.full_length > self.settings.max_caption_tokens,
        }
        return Encoded(document=document)

    def requests(self, item: EncoderInput) -> list[Request]:
        """For each variant the caption alone, then each instruction: the order in which `encode` takes the answers."""
        settings = self.settings
        caption = self.prompts.caption(item.caption)
        answer_prompt = self.prompts.answer_prompt(caption)
        instruction_prompts = self.prompts.instruction_prompts(caption)
        prompts: list[tuple[str | None, list[int], int]] = [(None, answer_prompt, settings.max_answer_tokens)]
        prompts += [
            (instruction.name, prompt_ids, settings.max_instruction_tokens)
            for instruction, prompt_ids in zip(settings.instructions, instruction_prompts, strict=True)
        ]
        requests: list[Request] = []
        for variant in range(settings.variants):
            seed = variant_seed(settings.seed, item.key, variant)
            requests += [
                Request(
                    prompt_ids=prompt_ids,
                    max_new_tokens=max_new_tokens,
                    seed=None if seed is None else prompt_seed(seed, name),
                )
                for name, prompt_ids, max_new_tokens in prompts
            ]
        return requests

    def _answer(self, token_ids: list[int]) -> dict[str, JsonValue]:
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return {"text": text, "token_ids": token_ids}


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


def _build_engine(
    model: ResolvedModel, settings: AnswersSettings, device: str, end_ids: Sequence[int], longest: int
) -> AnswerEngine:
    if settings.engine == "vllm":
        from mimir_precompute.encoders.vllm_engine import VllmEngine

        return VllmEngine(
            model,
            settings.dtype,
            device,
            settings.vllm,
            end_ids=end_ids,
            temperature=settings.temperature,
            max_model_len=longest,
        )
    from mimir_precompute.encoders.transformers_engine import TransformersEngine

    return TransformersEngine(
        model,
        settings.dtype,
        device,
        end_ids=end_ids,
        temperature=settings.temperature,
        batch_size=settings.batch_size,
    )


def _refuse_beyond_context(model: ResolvedModel, longest: int) -> None:
    context = model.config.get("max_position_embeddings")
    if isinstance(context, int) and longest > context:
        raise InputError(
            f"model folder {model.folder}: prompt and answer take up to {longest} tokens, its context is {context}; "
            "lower the limits of caption or answer tokens, shorten the instructions, or take another model"
        )
