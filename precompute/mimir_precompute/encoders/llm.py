"""Feature `llm`: the LLM's hidden states over each prompt and the answer that `answers` recorded for it.

One teacher-forced pass per prompt; rows of the last layer after the final norm, of another, or of the mean over all;
the template's tokens are dropped by their positions. Who computes the rows is a source's matter (llm_rows.py); the
model is causal, so neither padding nor batch mates change a row beyond the last bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mimir_precompute.config import Instruction, LlmSettings
from mimir_precompute.encoders.answer_engine import EngineGaveUp, rejected
from mimir_precompute.encoders.arrays import to_feature
from mimir_precompute.encoders.base import Encoded, EncoderInput, JsonValue
from mimir_precompute.encoders.causal_lm import load_tokenizer
from mimir_precompute.encoders.llm_rows import RowSource, TransformersRows
from mimir_precompute.encoders.prompts import CaptionTokens, PromptBuilder
from mimir_precompute.model_files import ResolvedModel
from mimir_shared.errors import MachineError


@dataclass(frozen=True, kw_only=True)
class Passage:
    """One sequence of a clip that goes through the model, and which of its rows are kept."""

    clip: int
    variant: int
    instruction: int | None
    """None: the prompt is the caption alone."""
    token_ids: list[int]
    """Prompt, then answer."""
    prompt_length: int


class LlmEncoder:
    """The frozen LLM without its output head."""

    def __init__(
        self,
        model: ResolvedModel,
        settings: LlmSettings,
        instructions: Sequence[Instruction],
        device: str,
        *,
        longest_answer: int,
    ) -> None:
        """Raises: InputError if the folder holds no causal LM with a chat template.

        Args:
            instructions: those that `answers` put to the LLM, in the same order.
            longest_answer: tokens that an answer has at most.
        """
        self.settings = settings
        self.instructions = tuple(instructions)
        self.prompts = PromptBuilder(load_tokenizer(model), instructions, settings.max_caption_tokens)
        self.source = _row_source(model, settings, device, longest=self.prompts.longest_prompt() + longest_answer)

    def encode(self, batch: Sequence[EncoderInput]) -> list[Encoded]:
        """Encode clips whose answers are given.

        Returns: `query_hidden` (M, H), `query_offsets` (M, 2), and for each variant v `answer_hidden_v` (A, H) and
            `instruction_hidden_v` (K, H); M, A may be 0. A clip that the source gave up is rejected.
        """
        captions = [self.prompts.caption(item.caption) for item in batch]
        hidden = self.hidden_features(batch)
        encoded: list[Encoded] = []
        for caption, tensors in zip(captions, hidden, strict=True):
            if isinstance(tensors, EngineGaveUp):
                encoded.append(rejected(tensors))
                continue
            features = {name: to_feature(tensor) for name, tensor in tensors.items()}
            offsets = torch.tensor(caption.offsets, dtype=torch.int32).reshape(-1, 2)
            features["query_offsets"] = to_feature(offsets, "i32")
            encoded.append(Encoded(tensors=features))
        return encoded

    def encode_empty(self, answers: Mapping[str, JsonValue] | None) -> Encoded | None:
        """The features of an empty user's turn: `query_hidden` is (0, H)."""
        assert answers is not None, "llm needs the answers to the empty prompt"
        encoded = self.encode([EncoderInput(key="", caption="", answers=answers)])[0]
        if encoded.rejection is not None:
            raise MachineError(f"the engine does not read the empty prompt: {encoded.rejection.detail}; run it again")
        return encoded

    @torch.inference_mode()
    def hidden_features(self, batch: Sequence[EncoderInput]) -> list[dict[str, Tensor] | EngineGaveUp]:
        """The float features of `encode` before the cast: compute dtype, means in float32; on the CPU."""
        passages = [passage for clip, item in enumerate(batch) for passage in self._passages(clip, item)]
        features: list[dict[str, Tensor]] = [{} for _ in batch]
        pooled: dict[tuple[int, int, int], Tensor] = {}
        lost: dict[int, EngineGaveUp] = {}
        for i, rows in self.source.hidden_rows([passage.token_ids for passage in passages]):
            passage = passages[i]
            if isinstance(rows, EngineGaveUp):
                lost[passage.clip] = rows
                continue
            answer = rows[passage.prompt_length :]  # (A, H)
            # copies: a slice alone would keep all the rows of its passage in memory
            if passage.instruction is not None:
                token = self._pool(answer, last_of_prompt=rows[passage.prompt_length - 1])
                pooled[passage.clip, passage.variant, passage.instruction] = token.to("cpu", copy=True)
                continue
            features[passage.clip][f"answer_hidden_{passage.variant}"] = answer.to("cpu", copy=True)
            if passage.variant == 0:
                caption_start = len(self.prompts.prefix_ids)
                caption_stop = passage.prompt_length - len(self.prompts.suffix_ids)
                features[passage.clip]["query_hidden"] = rows[caption_start:caption_stop].to("cpu", copy=True)  # (M, H)
        for clip, tensors in enumerate(features):
            for variant in range(0 if clip in lost else len(_variants(batch[clip]))):
                tokens = [pooled[clip, variant, k] for k in range(len(self.instructions))]
                width = tensors[f"answer_hidden_{variant}"].shape[1]
                stacked = torch.stack(tokens) if tokens else torch.zeros(0, width)
                tensors[f"instruction_hidden_{variant}"] = stacked  # (K, H)
        return [lost.get(clip, tensors) for clip, tensors in enumerate(features)]

    def _pool(self, answer: Tensor, *, last_of_prompt: Tensor) -> Tensor:
        """One instruction's token, (H,) float32, from the rows (A, H) of its answer."""
        if self.settings.instruction_pooling == "query" or not len(answer):
            return last_of_prompt.float()
        if self.settings.instruction_pooling == "last":
            return answer[-1].float()
        return answer.float().mean(dim=0)

    def close(self) -> None:
        """Free the model's memory; the encoder is of no use afterwards."""
        self.source.close()

    def _passages(self, clip: int, item: EncoderInput) -> list[Passage]:
        caption: CaptionTokens = self.prompts.caption(item.caption)
        answer_prompt = self.prompts.answer_prompt(caption)
        instruction_prompts = self.prompts.instruction_prompts(caption)
        passages: list[Passage] = []
        for variant, document in enumerate(_variants(item)):
            names = [entry["name"] for entry in document["instructions"]]
            expected = [instruction.name for instruction in self.instructions]
            assert names == expected, f"{item.key}: answers hold the instructions {names}, expected {expected}"
            answers: list[tuple[int | None, list[int], Mapping[str, JsonValue]]]
            answers = [(None, answer_prompt, document["answer"])]
            answers += [(k, instruction_prompts[k], entry) for k, entry in enumerate(document["instructions"])]
            passages += [
                Passage(
                    clip=clip,
                    variant=variant,
                    instruction=instruction,
                    token_ids=[*prompt_ids, *answer["token_ids"]],
                    prompt_length=len(prompt_ids),
                )
                for instruction, prompt_ids, answer in answers
            ]
        return passages


def _row_source(model: ResolvedModel, settings: LlmSettings, device: str, *, longest: int) -> RowSource:
    if settings.engine == "vllm":
        from mimir_precompute.encoders.vllm_rows import VllmRows

        return VllmRows(model, settings, device, longest=longest)
    return TransformersRows(model, settings, device)


def _variants(item: EncoderInput) -> list[Mapping[str, JsonValue]]:
    assert item.answers is not None, f"{item.key}: llm needs the document of answers"
    return list(item.answers["variants"])
