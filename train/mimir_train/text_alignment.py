"""Lays the LLM's tokens onto T5's by the characters that both cover, so that row i of both speaks of the same words.

By position alone (`index`) row 7 of the one may be "horse" and row 7 of the other "meadow": the two cut a caption into
pieces of their own. The offsets that the cache keeps beside the tokens tell which pieces overlap.
"""

import torch
from torch import Tensor

from mimir_train.model.fuser import LlmFeatures


def align_by_characters(llm: LlmFeatures, query_offsets: Tensor, t5_offsets: Tensor) -> LlmFeatures:
    """Put on each row of T5's the mean of the caption's LLM tokens that share a character with it.

    The answer's tokens follow on the rows behind the caption's last, those of the end token and of the pads; those
    that find no row are left out, as are tokens of the LLM that no token of T5 covers. Rows without any are zeros.

    Args:
        query_offsets: (B, M, 2) first character and the one after the last of each LLM token.
        t5_offsets: (B, L, 2) of each T5 token; equal numbers where a row stands for no character.
    Returns: the same features with `query_hidden` (B, L, H) laid out so, and an answer without rows: the fuser then
        takes row after row as they are. In the dtype of `llm`, on its device.
    """
    shares = _overlaps(query_offsets, llm.query_mask, t5_offsets)  # (B, L, M)
    weights = shares / shares.sum(dim=2, keepdim=True).clamp(min=1)
    # float32: a mean of bfloat16 rows taken in bfloat16 would lose what the rows differ by
    rows = weights @ llm.query_hidden.float().masked_fill(~llm.query_mask.bool()[:, :, None], 0)  # (B, L, H)
    num_rows = rows.shape[1]
    is_text = t5_offsets[:, :, 1] > t5_offsets[:, :, 0]  # (B, L)
    numbers = torch.arange(1, num_rows + 1, device=is_text.device)
    first_free = (is_text * numbers).amax(dim=1)  # (B,): one behind the caption's last row
    answer_mask = llm.answer_mask.bool()
    order = torch.cumsum(answer_mask, dim=1) - 1  # (B, A): real rows count from 0
    target = first_free[:, None] + order
    sample, answer = torch.nonzero(answer_mask & (target < num_rows), as_tuple=True)
    rows[sample, target[sample, answer]] = llm.answer_hidden[sample, answer].float()
    return LlmFeatures(
        query_hidden=rows.to(llm.query_hidden.dtype),
        query_mask=torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device),
        answer_hidden=llm.answer_hidden[:, :0],
        answer_mask=llm.answer_mask[:, :0],
        instruction_hidden=llm.instruction_hidden,
    )


def _overlaps(query_offsets: Tensor, query_mask: Tensor, t5_offsets: Tensor) -> Tensor:
    """(B, L, M) float32: 1 where a T5 token and an LLM token share a character."""
    begin = torch.maximum(t5_offsets[:, :, None, 0], query_offsets[:, None, :, 0])
    end = torch.minimum(t5_offsets[:, :, None, 1], query_offsets[:, None, :, 1])
    return ((end > begin) & query_mask.bool()[:, None, :]).float()
