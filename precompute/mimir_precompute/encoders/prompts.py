"""The prompts of the LLM branch, built in one place: `answers` generates from them, `llm` runs over the same tokens.

A prompt is  prefix | caption | separator and instruction | suffix.  Prefix and suffix are the model's own chat
template around the user's turn; the caption comes first, so that all prompts of a clip share their beginning.
Each part is tokenised apart: the caption's tokens are then the same in every prompt and known by position, and no
text in a caption can become one of the template's markers. Nothing heavy is imported here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mimir_precompute.config import Instruction
from mimir_shared.errors import InputError

Tokenizer = Any
"""A fast tokenizer of transformers; not imported, for the identity reads this module without that library."""

INSTRUCTION_SEPARATOR = "\n\n"
"""Between caption and instruction; tokenised with the instruction."""

TEMPLATE_ARGUMENTS: dict[str, str | bool] = {"date_string": "26 Jul 2024", "enable_thinking": False}
"""Given to every chat template: Llama writes today's date without the first, Qwen3 thinks aloud without the second."""

_SENTINEL = "MIMIRUSERTURN"
_ANSWER_SENTINEL = "MIMIRASSISTANTTURN"


@dataclass(frozen=True, kw_only=True)
class CaptionTokens:
    """A caption as the LLM reads it."""

    token_ids: list[int]
    """At most the caption's limit; never one of the template's markers."""
    offsets: list[tuple[int, int]]
    """(start, end) of each token in the caption, in characters."""
    full_length: int
    """Tokens before the caption was cut."""


class PromptBuilder:
    """A tokenizer's chat template, taken apart once, and the instructions put to every caption."""

    def __init__(self, tokenizer: Tokenizer, instructions: Sequence[Instruction], max_caption_tokens: int) -> None:
        """Raises: InputError for a slow tokenizer, or a template that fails, drops or repeats the user's text."""
        if not tokenizer.is_fast:
            raise InputError(f"tokenizer {tokenizer.name_or_path}: has no fast form, which character offsets need")
        self.tokenizer = tokenizer
        self.max_caption_tokens = max_caption_tokens
        prefix, suffix = _split_template(tokenizer)
        self.prefix_ids = _template_ids(tokenizer, prefix)
        self.suffix_ids = _template_ids(tokenizer, suffix)
        self._marker_ids = _marker_ids(tokenizer, prefix + suffix + str(tokenizer.chat_template))
        self.instruction_ids = [self.plain_tokens(INSTRUCTION_SEPARATOR + i.text)[0] for i in instructions]

    def caption(self, text: str) -> CaptionTokens:
        """Tokenise a caption and cut it to the limit."""
        token_ids, offsets = self.plain_tokens(text)
        limit = self.max_caption_tokens
        return CaptionTokens(token_ids=token_ids[:limit], offsets=offsets[:limit], full_length=len(token_ids))

    def answer_prompt(self, caption: CaptionTokens) -> list[int]:
        """The caption alone as the user's turn; its tokens start at `len(prefix_ids)`."""
        return [*self.prefix_ids, *caption.token_ids, *self.suffix_ids]

    def instruction_prompts(self, caption: CaptionTokens) -> list[list[int]]:
        """The caption and one instruction as the user's turn, for each instruction in order."""
        return [[*self.prefix_ids, *caption.token_ids, *ids, *self.suffix_ids] for ids in self.instruction_ids]

    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that can arise."""
        instructions = max((len(ids) for ids in self.instruction_ids), default=0)
        return len(self.prefix_ids) + self.max_caption_tokens + instructions + len(self.suffix_ids)

    def plain_tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenise text as text: what looks like a marker of the template is spelled out.

        Returns: token ids, and the (start, end) of each in characters.
        """
        cuts = {0, len(text)}
        while True:
            token_ids, offsets = self._encode_pieces(text, sorted(cuts))
            # switching special tokens off misses markers that the tokenizer does not flag as special, and those
            # that are in its vocabulary: such a span is cut between its characters and tokenised again
            markers = [offsets[i] for i, token_id in enumerate(token_ids) if token_id in self._marker_ids]
            new_cuts = {cut for start, end in markers for cut in range(start + 1, end)} - cuts
            if not new_cuts:
                kept = [i for i, token_id in enumerate(token_ids) if token_id not in self._marker_ids]
                return [token_ids[i] for i in kept], [offsets[i] for i in kept]
            cuts |= new_cuts

    def _encode_pieces(self, text: str, cuts: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        token_ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, end in pairwise(cuts):
            encoded = self.tokenizer(
                text[start:end],
                add_special_tokens=False,
                split_special_tokens=True,
                return_offsets_mapping=True,
                verbose=False,
            )
            token_ids += encoded["input_ids"]
            offsets += [(start + a, start + b) for a, b in encoded["offset_mapping"]]
        return token_ids, offsets


def end_token_ids(tokenizer: Tokenizer, configured: int | Sequence[int] | None) -> list[int]:
    """The tokens that end an answer: those of generation_config, the tokenizer's own, and the template's.

    Args:
        configured: `eos_token_id` of the model's generation_config.
    """
    ends = set([configured] if isinstance(configured, int) else configured or [])
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    after_answer = _after_answer(tokenizer)
    ids = _template_ids(tokenizer, after_answer)
    # only a marker can end a turn: a template that goes on with plain text ends it by eos
    if ids and ids[0] in tokenizer.added_tokens_decoder:
        ends.add(ids[0])
    return sorted(ends)


def _split_template(tokenizer: Tokenizer) -> tuple[str, str]:
    rendered = _render(tokenizer, [{"role": "user", "content": _SENTINEL}], generation_prompt=True)
    parts = rendered.split(_SENTINEL)
    if len(parts) != 2:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path}: its chat template writes the user's text {len(parts) - 1} times, "
            "expected once; this model cannot be used for answers"
        )
    return parts[0], parts[1]


def _after_answer(tokenizer: Tokenizer) -> str:
    """What the template writes after an assistant's turn."""
    turns = [{"role": "user", "content": _SENTINEL}, {"role": "assistant", "content": _ANSWER_SENTINEL}]
    return _render(tokenizer, turns, generation_prompt=False).rpartition(_ANSWER_SENTINEL)[2]


def _render(tokenizer: Tokenizer, turns: list[dict[str, str]], *, generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    where = f"tokenizer {tokenizer.name_or_path}"
    if "strftime_now" in str(tokenizer.chat_template) and "date_string" not in str(tokenizer.chat_template):
        raise InputError(f"{where}: its chat template writes today's date, so no two days would give the same features")
    try:
        return str(
            tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generation_prompt, **TEMPLATE_ARGUMENTS
            )
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise InputError(f"{where}: its chat template fails ({type(error).__name__}: {error})") from error


def _template_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenise a part of the template, markers included; the template itself writes the begin token."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"])


def _marker_ids(tokenizer: Tokenizer, template: str) -> frozenset[int]:
    """The tokens that a caption must never become: special ones, and added ones that the template writes."""
    added = tokenizer.added_tokens_decoder.items()
    markers = {
        token_id for token_id, token in added if token.special or (token.content.strip() and token.content in template)
    }
    # unk stands for ordinary text that the vocabulary lacks
    return frozenset((markers | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id})
