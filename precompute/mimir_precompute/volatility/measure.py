"""How far the LLM's words and states differ when it is asked again, and how its values lie beside T5's.

After figure 7 of Mimir (arXiv 2412.03085): for each prompt one greedy answer and `repeats` sampled ones are written,
and the LLM reads every prompt with each of its answers. Tokens are averaged to one point a repeat: the caption's
(query), the answer's, and both together (final: what a fuser is given).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mimir_precompute.encoders.answer_engine import EngineGaveUp
from mimir_precompute.encoders.base import Encoded
from mimir_precompute.encoders.llm import LlmEncoder
from mimir_precompute.volatility.fusing import FusingWeights, normalise

KINDS = ("query", "answer", "final")


@dataclass(frozen=True, kw_only=True)
class PromptStates:
    """What the models made of one prompt."""

    prompt: str
    answers: tuple[str, ...]
    """Texts: the greedy one, then those of the repeats."""
    repeats: dict[str, np.ndarray]
    """kind → (R, H) float32: one point for each repeat."""
    t5_rows: np.ndarray
    """(L, D) float32: T5's tokens, pads left out."""
    llm_rows: np.ndarray
    """(M + A, H) float32: the LLM's over the caption and the greedy answer."""


@dataclass(frozen=True, kw_only=True)
class Branches:
    """One point a prompt for each branch, all of T5's width: (P, D) float32."""

    t5: np.ndarray
    llm: np.ndarray
    fused: np.ndarray


def relative_spread(points: np.ndarray) -> float:
    """How far points (R, H) lie from their centre: root mean square distance over the centre's length."""
    centre = points.astype(np.float64).mean(axis=0)
    distance = np.sqrt(np.square(points - centre).sum(axis=1).mean())
    return float(distance / max(np.linalg.norm(centre), 1e-30))


def read_states(
    encoder: LlmEncoder, prompts: Sequence[str], t5: Sequence[Encoded], answers: Sequence[Encoded]
) -> list[PromptStates]:
    """Run the LLM over every prompt with each of its answers.

    Args:
        t5, answers: of the prompts, in order; variant 0 of the answers is the greedy one.
    """
    return [
        _read_prompt(encoder, prompt, text, answered.document["variants"])
        for prompt, text, answered in zip(prompts, t5, answers, strict=True)
    ]


def _read_prompt(encoder: LlmEncoder, prompt: str, t5: Encoded, variants: Sequence[Any]) -> PromptStates:
    caption = encoder.prompts.caption(prompt)
    prompt_ids = encoder.prompts.answer_prompt(caption)
    start = len(encoder.prompts.prefix_ids)
    points: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    greedy = np.zeros((0, 0), np.float32)
    sequences = [[*prompt_ids, *variant["answer"]["token_ids"]] for variant in variants]
    for number, rows in enumerate(_rows_of(encoder, sequences)):
        query = rows[start : start + len(caption.token_ids)]
        answer = rows[len(prompt_ids) :]
        final = np.concatenate([query, answer])
        if number == 0:
            greedy = final
            continue
        # an answer, or a caption, without a word: the state from which it would have gone on
        empty = rows[len(prompt_ids) - 1][None]
        for kind, tokens in zip(KINDS, (query, answer, final), strict=True):
            points[kind].append((tokens if len(tokens) else empty).mean(axis=0))
    embeds = t5.tensors["t5_embeds"].to_float32()
    return PromptStates(
        prompt=prompt,
        answers=tuple(variant["answer"]["text"] for variant in variants),
        repeats={kind: np.stack(points[kind]) for kind in KINDS},
        t5_rows=embeds[: max(1, t5.valid_rows.get("t5_embeds", len(embeds)))],
        llm_rows=greedy,
    )


def _rows_of(encoder: LlmEncoder, sequences: Sequence[list[int]]) -> Iterator[np.ndarray]:
    """Each sequence's hidden rows, in order."""
    size = encoder.settings.batch_size
    for start in range(0, len(sequences), size):
        hidden = dict(encoder.source.hidden_rows(sequences[start : start + size]))
        for i in range(len(hidden)):
            rows = hidden[i]
            assert not isinstance(rows, EngineGaveUp), f"{rows}: the source of volatility is transformers"
            yield rows.to(torch.float32).cpu().numpy()


def fuse_prompts(states: Sequence[PromptStates], weights: FusingWeights) -> Branches:
    """The mean token of each branch for each prompt, and of their sum: row by row, as a fuser adds them."""
    t5, llm, fused = [], [], []
    for state in states:
        encoder_tokens = weights.encoder_tokens(state.t5_rows)
        decoder_tokens = weights.decoder_tokens(state.llm_rows)
        length = max(len(encoder_tokens), len(decoder_tokens))
        total = np.zeros((length, encoder_tokens.shape[1]), np.float32)
        total[: len(encoder_tokens)] += encoder_tokens
        total[: len(decoder_tokens)] += decoder_tokens
        t5.append(encoder_tokens.mean(axis=0))
        llm.append(decoder_tokens.mean(axis=0))
        fused.append(total.mean(axis=0))
    return Branches(t5=np.stack(t5), llm=np.stack(llm), fused=np.stack(fused))


def summarise(states: Sequence[PromptStates]) -> dict[str, Any]:
    """The numbers behind the pictures, as plain JSON."""
    t5 = np.concatenate([state.t5_rows.ravel() for state in states])
    llm = np.concatenate([state.llm_rows.ravel() for state in states])
    normalised = np.concatenate([normalise(state.llm_rows).ravel() for state in states])
    spreads = {kind: [relative_spread(state.repeats[kind]) for state in states] for kind in KINDS}
    return {
        "prompts": len(states),
        "repeats": len(states[0].repeats["query"]),
        "spread": {kind: {"mean": float(np.mean(each)), "max": float(np.max(each))} for kind, each in spreads.items()},
        "values": {
            "t5": _describe_values(t5),
            "llm": _describe_values(llm),
            "llm_normalised": _describe_values(normalised),
        },
        "per_prompt": [
            {
                "prompt": state.prompt,
                "different_answers": len(set(state.answers[1:])),
                "spread": {kind: spreads[kind][i] for kind in KINDS},
            }
            for i, state in enumerate(states)
        ],
    }  # fmt: skip


def _describe_values(values: np.ndarray) -> dict[str, float]:
    wide = values.astype(np.float64)
    return {
        "rms": float(np.sqrt(np.mean(np.square(wide)))),
        "min": float(wide.min()),
        "max": float(wide.max()),
        "share_within_half": float(np.mean(np.abs(wide) <= 0.5)),
        "share_beyond_one": float(np.mean(np.abs(wide) > 1.0)),
    }
