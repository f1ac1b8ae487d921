"""Tokens of two tokenizers lie on the same row where they cover the same characters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mimir_train.model.config import FUSERS, FuserConfig
from mimir_train.model.fuser import LlmFeatures, TokenFuser, join_llm_tokens
from mimir_train.text_alignment import align_by_characters


def features(
    query: Tensor, answer: Tensor, query_rows: int | None = None, answer_rows: int | None = None
) -> LlmFeatures:
    """One clip; rows from `query_rows` and `answer_rows` on are padding that holds nonsense."""

    def mask(rows: Tensor, count: int | None) -> Tensor:
        return (torch.arange(len(rows)) < (len(rows) if count is None else count))[None]

    return LlmFeatures(query[None], mask(query, query_rows), answer[None], mask(answer, answer_rows),
                       torch.zeros(1, 2, query.shape[1]))  # fmt: skip


def rows(*values: float) -> Tensor:
    return torch.tensor([[value, -value] for value in values], dtype=torch.float32).reshape(-1, 2)


def offsets(*pairs: tuple[int, int]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.int32).reshape(1, -1, 2)


def test_each_row_is_the_mean_of_the_tokens_that_cover_its_characters() -> None:
    # "red horse": T5 has red | hor | se, the LLM r | ed | horse
    llm = features(rows(1, 3, 10), rows(7, 8))
    t5 = offsets((0, 3), (4, 7), (7, 9), (0, 0), (0, 0), (0, 0), (0, 0))
    aligned = align_by_characters(llm, offsets((0, 1), (1, 3), (4, 9)), t5)
    assert aligned.query_hidden[0].tolist() == rows(2, 10, 10, 7, 8, 0, 0).tolist()
    assert aligned.answer_hidden.shape == (1, 0, 2)


def test_pads_of_either_side_add_nothing() -> None:
    llm = features(rows(1, 99), rows(7, 99), query_rows=1, answer_rows=1)
    aligned = align_by_characters(llm, offsets((0, 3), (0, 3)), offsets((0, 3), (0, 0), (0, 0)))
    assert aligned.query_hidden[0].tolist() == rows(1, 7, 0).tolist()


def test_an_answer_that_finds_no_row_is_cut_and_an_empty_caption_leaves_all_rows_to_it() -> None:
    llm = features(rows(1, 2), rows(5, 6, 7))
    assert (
        align_by_characters(llm, offsets((0, 1), (1, 2)), offsets((0, 1), (1, 2), (0, 0))).query_hidden[0].tolist()
        == rows(1, 2, 5).tolist()
    )
    empty = features(torch.zeros(0, 2), rows(5, 6, 7))
    aligned = align_by_characters(empty, offsets(), offsets((0, 0), (0, 0)))
    assert aligned.query_hidden[0].tolist() == rows(5, 6).tolist()


def test_a_caption_that_the_llm_has_cut_leaves_zeros_on_t5s_rows() -> None:
    aligned = align_by_characters(features(rows(1), rows()), offsets((0, 3)), offsets((0, 3), (4, 9), (0, 0)))
    assert aligned.query_hidden[0].tolist() == rows(1, 0, 0).tolist()


@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.integers(0, 4), st.integers(0, 5))
def test_with_equal_tokens_both_alignments_are_the_same(lengths: list[int], num_answers: int, num_pads: int) -> None:
    ends = torch.tensor(lengths).cumsum(0)
    pairs = [(int(end) - length, int(end)) for end, length in zip(ends, lengths, strict=True)]
    generator = torch.Generator().manual_seed(len(lengths))
    llm = features(torch.randn(len(pairs), 2, generator=generator), torch.randn(num_answers, 2, generator=generator))
    t5 = offsets(*pairs, *[(0, 0)] * num_pads)
    aligned, _ = join_llm_tokens(align_by_characters(llm, offsets(*pairs), t5), t5.shape[1])
    by_index, _ = join_llm_tokens(llm, t5.shape[1])
    assert torch.allclose(aligned, by_index, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fuser_takes_the_rows_as_they_lie(dtype: torch.dtype) -> None:
    fuser = TokenFuser(FuserConfig(switches=FUSERS["norm"], t5_rms=1.0, text_width=6, llm_width=2, num_instructions=2))
    llm = features(rows(1, 3, 10), rows(7, 8))
    llm = LlmFeatures(*(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in llm))
    aligned = align_by_characters(llm, offsets((0, 1), (1, 3), (4, 9)), offsets((0, 3), (4, 7), (7, 9), (0, 0), (0, 0)))
    assert aligned.query_hidden.dtype == dtype
    tokens, mask = join_llm_tokens(aligned, 5)
    assert torch.equal(tokens, aligned.query_hidden)
    assert bool(mask.all())
    assert fuser(torch.zeros(1, 5, 6), aligned).shape == (1, 5, 6)
