"""The layers of the CogVideoX transformer (arXiv 2408.06072 section 2.2), in plain torch.

Modules and parameters carry the names that diffusers gives them, so that a folder of weights needs no translation.
Letters in shapes: B batch, T latent frames, h w latents, p patch side, N = T * h/p * w/p video tokens, L text tokens
(with those of the stabilizer), S = L + N, D width, A heads, d = D/A.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_train.model.attention import attention
from mimir_train.model.config import AttentionName
from mimir_train.model.packing import PackIndex, add_gated, modulate, reorder

Grid = tuple[int, int, int]
"""Patches of a clip: (T, h/p, w/p)."""

RotaryTable = tuple[Tensor, Tensor]
"""Cosine and sine of the angle by which each pair of channels turns at each position: (S, d) float32 each."""


# --- where a token is ---------------------------------------------------------------------------------------------


def sincos_positions(
    num_frames: int,
    height: int,
    width: int,
    dim: int,
    *,
    spatial_interpolation_scale: float,
    temporal_interpolation_scale: float,
    device: torch.device,
) -> Tensor:
    """Positions of the 2B model, to be added to its video tokens; a text token's position is zero.

    A quarter of the channels tells the frame, three eighths the column, three eighths the row (columns first).

    Args:
        num_frames, height, width: the grid of patches.
        dim: D, a multiple of 16.
    Returns: (N, D) float32.
    Source: diffusers models/embeddings.py get_3d_sincos_pos_embed. Its buffer has rows for 226 text tokens, which
        are zeros; adding none is the same, and leaves the number of text tokens open.
    """

    def embed(count: int, scale: float, axis_dim: int) -> Tensor:
        # float64, as the official table is made
        frequencies = 10000.0 ** -(torch.arange(axis_dim // 2, device=device, dtype=torch.float64) / (axis_dim / 2))
        positions = torch.arange(count, device=device, dtype=torch.float32) / scale
        angles = positions[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()  # (count, axis_dim)

    frames = embed(num_frames, temporal_interpolation_scale, dim // 4)
    rows = embed(height, spatial_interpolation_scale, dim * 3 // 8)
    columns = embed(width, spatial_interpolation_scale, dim * 3 // 8)
    grid = (num_frames, height, width, -1)
    table = torch.cat(
        [frames[:, None, None].expand(grid), columns[None, None].expand(grid), rows[None, :, None].expand(grid)], dim=-1
    )
    return table.flatten(0, 2)  # (N, D)


def resize_crop_region(height: int, width: int, base_height: int, base_width: int) -> tuple[tuple[int, int], ...]:
    """Lay a grid of patches centred over the base grid, scaled to fit inside it.

    Returns: (top, left), (bottom, right) in patches of the base grid.
    Source: diffusers pipelines/cogvideo/pipeline_cogvideox.py get_resize_crop_region_for_grid.
    """
    if height / width > base_height / base_width:
        fitted_height, fitted_width = base_height, round(base_height / height * width)
    else:
        fitted_height, fitted_width = round(base_width / width * height), base_width
    top, left = round((base_height - fitted_height) / 2), round((base_width - fitted_width) / 2)
    return (top, left), (top + fitted_height, left + fitted_width)


def rotary_positions(
    num_text_tokens: int,
    num_frames: int,
    height: int,
    width: int,
    head_dim: int,
    *,
    base_height: int,
    base_width: int,
    device: torch.device,
) -> RotaryTable:
    """Positions of the 5B model: how far the channels of a query or key turn. Text tokens do not turn.

    Args:
        num_frames, height, width: the grid of patches.
        head_dim: d, a multiple of 16: 2/8 tell the frame, 3/8 the row, 3/8 the column.
        base_height, base_width: the grid of patches at which the model was first trained.
    Source: diffusers pipeline_cogvideox.py _prepare_rotary_positional_embeddings, models/embeddings.py
        get_3d_rotary_pos_embed.
    """

    def angles(start: float, stop: float, count: int, axis_dim: int) -> Tensor:
        # stop * (count - 1) / count even where start is not 0: so the official grid has it
        positions = torch.linspace(start, stop * (count - 1) / count, count, device=device, dtype=torch.float32)
        channels = torch.arange(0, axis_dim, 2, device=device, dtype=torch.float32)
        turned = positions[:, None] * (1.0 / 10000.0 ** (channels / axis_dim))
        return turned.repeat_interleave(2, dim=1)  # (count, axis_dim): the two channels of a pair turn together

    (top, left), (bottom, right) = resize_crop_region(height, width, base_height, base_width)
    frames = angles(0, num_frames, num_frames, head_dim // 4)
    rows = angles(top, bottom, height, head_dim // 8 * 3)
    columns = angles(left, right, width, head_dim // 8 * 3)
    grid = (num_frames, height, width, -1)
    video_angles = torch.cat(
        [frames[:, None, None].expand(grid), rows[None, :, None].expand(grid), columns[None, None].expand(grid)], dim=-1
    ).flatten(0, 2)  # (N, d)
    token_angles = F.pad(video_angles, (0, 0, num_text_tokens, 0))  # (S, d), S = L + N
    return token_angles.cos(), token_angles.sin()


def rotate(x: Tensor, rotary: RotaryTable) -> Tensor:
    """Turn each pair of neighbouring channels by the angle of its token.

    Args:
        x: (B, A, S, d).
    Returns: (B, A, S, d) float32; a row whose angle is zero comes out unchanged.
    """
    cos, sin = rotary
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)  # (B, A, S, d/2) each
    quarter_turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return x.float() * cos + quarter_turned * sin


# --- what enters --------------------------------------------------------------------------------------------------


def timestep_sinusoid(timesteps: Tensor, dim: int) -> Tensor:
    """Cosines, then sines, of the timesteps at `dim`/2 frequencies.

    Args:
        timesteps: (B,), 0 is data and 999 is noise.
    Returns: (B, dim) float32.
    """
    half = torch.arange(dim // 2, device=timesteps.device, dtype=torch.float32)
    angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * half / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """(B, D) sinusoid to (B, time_embed_dim)."""

    def __init__(self, width: int, time_embed_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, time_embed_dim)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def forward(self, sinusoid: Tensor) -> Tensor:
        time_embed: Tensor = self.linear_2(F.silu(self.linear_1(sinusoid)))
        return time_embed


class PatchEmbed(nn.Module):
    """Text and video brought to one width."""

    def __init__(self, in_channels: int, patch_size: int, text_width: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)
        self.text_proj = nn.Linear(text_width, width)

    def forward(self, condition_tokens: Tensor, noisy_latents: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """
        Args:
            condition_tokens: (B, L, text_width).
            noisy_latents: (B, C, T, h, w); of a pack B times (C, T, h, w).
        Returns: text tokens (B, L, D), video tokens (B, N, D), frame by frame and row by row; of a pack (1, B*L, D),
            (1, tokens, D).
        """
        text_tokens: Tensor = self.text_proj(condition_tokens)
        if isinstance(noisy_latents, Tensor):
            return text_tokens, self.embed_patches(noisy_latents)
        video_tokens = torch.cat([self.embed_patches(clip[None]) for clip in noisy_latents], dim=1)
        return text_tokens.flatten(0, 1)[None], video_tokens

    def embed_patches(self, noisy_latents: Tensor) -> Tensor:
        """(B, C, T, h, w) to (B, N, D)."""
        frames = noisy_latents.transpose(1, 2).flatten(0, 1)  # (B*T, C, h, w)
        patches: Tensor = self.proj(frames).unflatten(0, (noisy_latents.shape[0], -1))  # (B, T, D, h/p, w/p)
        return patches.transpose(2, 3).transpose(3, 4).flatten(1, 3)


# --- a block ------------------------------------------------------------------------------------------------------


class ExpertAdaLayerNorm(nn.Module):
    """Layer norm whose shift, scale and gate follow the time, with one set for text and one for video.

    Source: CogVideoX section 2.2 "expert adaptive layernorm"; diffusers models/normalization.py
    CogVideoXLayerNormZero.
    """

    def __init__(self, width: int, time_embed_dim: int, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(time_embed_dim, 6 * width)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(
        self, text_tokens: Tensor, video_tokens: Tensor, time_embed: Tensor, pack: PackIndex | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            text_tokens, video_tokens, pack: as a block has them.
            time_embed: (B, time_embed_dim).
        Returns: all tokens (B, S, D), text first; the gates of text and of video, (B, D) each.
        """
        modulation = self.linear(F.silu(time_embed))  # (B, 6D)
        video_shift, video_scale, video_gate, text_shift, text_scale, text_gate = modulation.chunk(6, dim=-1)
        text_clips, video_clips = (None, None) if pack is None else (pack.text_clips, pack.video_clips)
        tokens = torch.cat(
            [
                modulate(self.norm(text_tokens), text_shift, text_scale, text_clips),
                modulate(self.norm(video_tokens), video_shift, video_scale, video_clips),
            ],
            dim=1,
        )
        return tokens, text_gate, video_gate


class JointAttention(nn.Module):
    """Attention over text and video together, queries and keys normalised head by head."""

    def __init__(self, width: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend: AttentionName = "sdpa"
        self.to_q = nn.Linear(width, width, bias=qkv_bias)
        self.to_k = nn.Linear(width, width, bias=qkv_bias)
        self.to_v = nn.Linear(width, width, bias=qkv_bias)
        self.norm_q = nn.LayerNorm(width // num_heads, eps=1e-6)
        self.norm_k = nn.LayerNorm(width // num_heads, eps=1e-6)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])  # a list for its name in checkpoints: to_out.0

    def forward(self, tokens: Tensor, rotary: RotaryTable | None, pack: PackIndex | None) -> Tensor:
        """(B, S, D) to (B, S, D); `rotary` is None where positions are already in the tokens."""
        if pack is not None:
            tokens = reorder(tokens, pack.clip_by_clip, pack.kind_by_kind)
        query, key, value = (
            project(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, A, S, d)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        query, key = self.norm_q(query), self.norm_k(key)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        # norms and rotation may have widened them to float32
        segments = None if pack is None else pack.segments
        attended = attention(query.to(value.dtype), key.to(value.dtype), value, segments, self.backend)
        out: Tensor = self.to_out[0](attended.transpose(1, 2).flatten(2))  # (B, S, D)
        return out if pack is None else reorder(out, pack.kind_by_kind, pack.clip_by_clip)


class GeluProjection(nn.Module):
    """A linear map, then GELU in its tanh form."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner_width)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.gelu(self.proj(tokens), approximate="tanh")


class FeedForward(nn.Module):
    """(B, S, D) to (B, S, D) through 4D channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # index 1 is dropout in the official checkpoints' numbering: net.0.proj, net.2
        self.net = nn.Sequential(GeluProjection(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.net(tokens)
        return out


class Block(nn.Module):
    """One layer of the transformer: joint attention, then feed-forward, each behind its expert norm."""

    def __init__(self, width: int, num_heads: int, time_embed_dim: int, qkv_bias: bool, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = ExpertAdaLayerNorm(width, time_embed_dim, norm_eps)
        self.attn1 = JointAttention(width, num_heads, qkv_bias)
        self.norm2 = ExpertAdaLayerNorm(width, time_embed_dim, norm_eps)
        self.ff = FeedForward(width)

    def forward(
        self,
        text_tokens: Tensor,
        video_tokens: Tensor,
        time_embed: Tensor,
        rotary: RotaryTable | None,
        pack: PackIndex | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            text_tokens, video_tokens: (B, L, D), (B, N, D); of a pack (1, B*L, D), (1, tokens, D).
            time_embed: (B, time_embed_dim).
            rotary: of all S tokens, of a pack clip by clip; or None.
            pack: which token is of which clip; None for a batch of clips of one size.
        Returns: text and video tokens, shapes as they came.
        """
        num_text_tokens = text_tokens.shape[1]
        text_clips, video_clips = (None, None) if pack is None else (pack.text_clips, pack.video_clips)

        tokens, text_gate, video_gate = self.norm1(text_tokens, video_tokens, time_embed, pack)  # (B, S, D)
        update = self.attn1(tokens, rotary, pack)
        text_tokens = add_gated(text_tokens, update[:, :num_text_tokens], text_gate, text_clips)
        video_tokens = add_gated(video_tokens, update[:, num_text_tokens:], video_gate, video_clips)

        tokens, text_gate, video_gate = self.norm2(text_tokens, video_tokens, time_embed, pack)  # (B, S, D)
        update = self.ff(tokens)
        text_tokens = add_gated(text_tokens, update[:, :num_text_tokens], text_gate, text_clips)
        video_tokens = add_gated(video_tokens, update[:, num_text_tokens:], video_gate, video_clips)
        return text_tokens, video_tokens


class OutputAdaLayerNorm(nn.Module):
    """The last norm: shift and scale follow the time. Source: diffusers models/normalization.py AdaLayerNorm."""

    def __init__(self, width: int, time_embed_dim: int, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(time_embed_dim, 2 * width)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, video_tokens: Tensor, time_embed: Tensor, pack: PackIndex | None) -> Tensor:
        """(B, N, D) and (B, time_embed_dim) to (B, N, D); of a pack (1, tokens, D)."""
        shift, scale = self.linear(F.silu(time_embed)).chunk(2, dim=-1)  # (B, D) each
        return modulate(self.norm(video_tokens), shift, scale, None if pack is None else pack.video_clips)
