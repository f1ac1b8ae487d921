"""What every attention backend must equal, on any device: SDPA of each clip alone, and of padded clips."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mimir_train.model.attention import Segments

LENGTHS = (7, 1, 33, 130, 2)
"""Of clips in a pack: one token alone, neighbours of very different lengths, one longer than a kernel's tile."""


def draw_heads(
    batch_size: int, num_tokens: int, *, num_heads: int = 2, head_dim: int = 16, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, A, S, d) float32, the same on every device, that take gradients."""
    generator = torch.Generator().manual_seed(num_tokens)
    shape = (batch_size, num_heads, num_tokens, head_dim)
    drawn = [torch.randn(shape, generator=generator).to(device).requires_grad_() for _ in range(3)]
    return drawn[0], drawn[1], drawn[2]


def one_by_one(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Each clip of a pack cut out and attended to in a call of its own."""
    attended, start = [], 0
    for length in lengths:
        clip = slice(start, start + length)
        attended.append(F.scaled_dot_product_attention(query[:, :, clip], key[:, :, clip], value[:, :, clip]))
        start += length
    return torch.cat(attended, dim=2)


def padded(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The clips of a pack as a batch, padded to the longest, with a mask over keys; packed again."""
    num_heads, head_dim = query.shape[1], query.shape[3]
    rows = torch.arange(max(lengths), device=query.device) < torch.tensor(lengths, device=query.device)[:, None]

    def unpack(packed: Tensor) -> Tensor:
        batch = packed.new_zeros(len(lengths), max(lengths), num_heads, head_dim)
        return batch.masked_scatter(rows[:, :, None, None], packed[0].transpose(0, 1)).transpose(1, 2)

    attended = F.scaled_dot_product_attention(
        unpack(query), unpack(key), unpack(value), attn_mask=rows[:, None, None, :]
    )
    return attended.transpose(1, 2)[rows].transpose(0, 1)[None]


def gradients(attended: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of a loss that weighs every output number differently."""
    weights = torch.linspace(-1, 1, attended.numel(), device=attended.device).reshape(attended.shape)
    return torch.autograd.grad((attended.float() * weights).sum(), inputs)


def segments_of(lengths: tuple[int, ...], device: torch.device | str = "cpu") -> Segments:
    return Segments(lengths, torch.device(device))
