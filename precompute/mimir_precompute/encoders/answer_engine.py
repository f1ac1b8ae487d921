"""What answers a prompt: the interface behind which transformers and vLLM stand. Imports no model library."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mimir_precompute.clips.rejection import ClipRejected
from mimir_precompute.encoders.base import Encoded


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to be answered once."""

    prompt_ids: list[int]
    max_new_tokens: int
    seed: int | None
    """None: greedy."""


@dataclass(frozen=True)
class EngineGaveUp:
    """Stands for an answer, or hidden rows, that no engine could be brought to give."""

    detail: str


def rejected(given_up: EngineGaveUp) -> Encoded:
    """What is left of a clip when a part of it was given up."""
    return Encoded(rejection=ClipRejected("encode", "crashed_engine", given_up.detail))


Answer = list[int] | EngineGaveUp
"""Token ids without the end token."""


class AnswerEngine(Protocol):
    """A frozen causal LM that generates. A request's answer depends on nothing but the request, up to rounding."""

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer prompts, in order."""
        ...

    def report(self) -> dict[str, float | int | str]:
        """How it fared: the engine's name, and among the rest `answer_tokens_per_s`."""
        ...

    def close(self) -> None:
        """Free the model's memory; the engine is of no use afterwards."""
        ...


def until_end(token_ids: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """Cut an answer before its first end token."""
    ends = [i for i, token_id in enumerate(token_ids) if token_id in end_ids]
    return list(token_ids[: ends[0]] if ends else token_ids)
