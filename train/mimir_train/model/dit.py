"""The video diffusion transformer (DiT) of CogVideoX 1.0, 2B and 5B, in plain torch.

Latents are (B, C, T, h, w) here, as they are cached; diffusers' model takes (B, T, C, h, w).
Weights in a folder are read and written by `mimir_train.weights.transformer_folder`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mimir_train.model.config import AttentionName, DiTConfig
from mimir_train.model.layers import (
    Block,
    Grid,
    OutputAdaLayerNorm,
    PatchEmbed,
    RotaryTable,
    TimeEmbedding,
    rotary_positions,
    sincos_positions,
    timestep_sinusoid,
)
from mimir_train.model.packing import PackIndex


class DiT(nn.Module):
    """Predict v from noisy latents, the tokens of the text, and the time.

    Computes what diffusers' CogVideoXTransformer3DModel computes, under the same parameter names, and without its
    limit on the number of text tokens. It has no buffers, so it can be built on the meta device and filled later.
    Source: diffusers models/transformers/cogvideox_transformer_3d.py.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, time_embed_dim, patch_size = config.width, config.time_embed_dim, config.patch_size
        self.time_embedding = TimeEmbedding(width, time_embed_dim)
        self.patch_embed = PatchEmbed(config.in_channels, patch_size, config.text_embed_dim, width)
        self.transformer_blocks = nn.ModuleList(
            Block(width, config.num_attention_heads, time_embed_dim, config.attention_bias, config.norm_eps)
            for _ in range(config.num_layers)
        )
        self.norm_final = nn.LayerNorm(width, eps=config.norm_eps)
        self.norm_out = OutputAdaLayerNorm(width, time_embed_dim, config.norm_eps)
        self.proj_out = nn.Linear(width, patch_size**2 * config.out_channels)
        self.init_weights()

    def use_attention(self, backend: AttentionName) -> None:
        """Choose who computes attention in every block; `model.attention.why_not` tells whether it can here."""
        for block in self.transformer_blocks:
            assert isinstance(block, Block)
            block.attn1.backend = backend

    def forward(
        self, noisy_latents: Tensor | Sequence[Tensor], condition_tokens: Tensor, timesteps: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        """
        Args:
            noisy_latents: (B, C, T, h, w), any T; h and w multiples of the patch. Or a pack: B clips (C, T, h, w), each
                of any size, that are computed in one sequence. Their dtype is the one computed in.
            condition_tokens: (B, L, text_embed_dim), any L, any float dtype. All of them are read: there is no mask.
            timesteps: (B,), 0 (data) to 999 (noise).
        Returns: the predicted v, shapes as noisy_latents.
        Raises: ValueError where h or w is no multiple of the patch.
        """
        if isinstance(noisy_latents, Tensor):
            return self.predict_batch(noisy_latents, condition_tokens, timesteps)
        return self.predict_pack(noisy_latents, condition_tokens, timesteps)

    def predict_batch(self, noisy_latents: Tensor, condition_tokens: Tensor, timesteps: Tensor) -> Tensor:
        """Clips of one size: (B, C, T, h, w) to (B, C, T, h, w)."""
        grid = self.grid_of(noisy_latents)
        dtype = noisy_latents.dtype
        time_embed = self.time_embedding(timestep_sinusoid(timesteps, self.config.width).to(dtype))
        text_tokens, video_tokens = self.patch_embed(condition_tokens.to(dtype), noisy_latents)  # (B, L, D), (B, N, D)
        added, rotary = self.positions(text_tokens.shape[1], grid, video_tokens.device)
        patches = self.run_blocks(text_tokens, add_positions(video_tokens, added), time_embed, rotary)
        return self.unpatchify(patches, grid)  # (B, C, T, h, w)

    def predict_pack(
        self, noisy_latents: Sequence[Tensor], condition_tokens: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, ...]:
        """Clips of any sizes in one sequence: B times (C, T, h, w) to the same. Equals each clip alone."""
        assert len(noisy_latents) == len(condition_tokens), f"{len(noisy_latents)} clips, {len(condition_tokens)} texts"
        grids = [self.grid_of(clip) for clip in noisy_latents]
        num_video_tokens = [math.prod(grid) for grid in grids]
        dtype, device = noisy_latents[0].dtype, noisy_latents[0].device
        num_text_tokens = condition_tokens.shape[1]
        pack = PackIndex.build(num_text_tokens, num_video_tokens, device)

        time_embed = self.time_embedding(timestep_sinusoid(timesteps, self.config.width).to(dtype))  # (B, …)
        text_tokens, video_tokens = self.patch_embed(
            condition_tokens.to(dtype), noisy_latents
        )  # (1, B*L, D), (1, N, D)
        of_grid = {grid: self.positions(num_text_tokens, grid, device) for grid in set(grids)}
        added, rotary = join_positions([of_grid[grid] for grid in grids])
        patches = self.run_blocks(text_tokens, add_positions(video_tokens, added), time_embed, rotary, pack)
        parts = torch.split(patches, num_video_tokens, dim=1)
        return tuple(self.unpatchify(part, grid)[0] for part, grid in zip(parts, grids, strict=True))

    def run_blocks(
        self,
        text_tokens: Tensor,
        video_tokens: Tensor,
        time_embed: Tensor,
        rotary: RotaryTable | None,
        pack: PackIndex | None = None,
    ) -> Tensor:
        """The transformer itself; arguments as a block has them. Returns: (B, N, C*p*p), of a pack (1, N, C*p*p)."""
        for block in self.transformer_blocks:
            text_tokens, video_tokens = block(text_tokens, video_tokens, time_embed, rotary, pack)
        video_tokens = self.norm_out(self.norm_final(video_tokens), time_embed, pack)
        patches: Tensor = self.proj_out(video_tokens)
        return patches

    def grid_of(self, latents: Tensor) -> Grid:
        """The patches of latents (…, T, h, w). Raises ValueError where they cannot be cut into such."""
        patch_size = self.config.patch_size
        num_frames, height, width = latents.shape[-3:]
        if height % patch_size or width % patch_size:
            raise ValueError(f"latents of {height} x {width} cannot be cut into patches of {patch_size}")
        return num_frames, height // patch_size, width // patch_size

    def positions(
        self, num_text_tokens: int, grid: Grid, device: torch.device
    ) -> tuple[Tensor | None, RotaryTable | None]:
        """How the tokens of a clip are told where they are: by what is added to them (2B), or by a rotation in
        attention (5B).

        Returns: (N, D) for the video tokens, or None; the rotation of all S tokens, or None.
        """
        config = self.config
        if config.use_rotary_positional_embeddings:
            return None, rotary_positions(
                num_text_tokens,
                *grid,
                config.attention_head_dim,
                base_height=config.sample_height // config.patch_size,
                base_width=config.sample_width // config.patch_size,
                device=device,
            )
        added = sincos_positions(
            *grid,
            config.width,
            spatial_interpolation_scale=config.spatial_interpolation_scale,
            temporal_interpolation_scale=config.temporal_interpolation_scale,
            device=device,
        )
        return added, None

    def unpatchify(self, patches: Tensor, grid: Grid) -> Tensor:
        """(B, N, C*p*p) to (B, C, T, h, w), for a grid of (T, h/p, w/p) patches."""
        p = self.config.patch_size
        x = patches.reshape(patches.shape[0], *grid, -1, p, p)  # (B, T, h/p, w/p, C, p, p)
        return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)  # (B, C, T, h/p, p, w/p, p) → (B, C, T, h, w)

    def init_weights(self) -> None:
        """Set every parameter as training from scratch starts; what a folder holds replaces all of it."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)  # signals and gradients keep their size through a layer
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()  # scale 1, shift 0: a plain norm
        patch_proj = self.patch_embed.proj
        nn.init.xavier_uniform_(patch_proj.weight.flatten(1))  # a patch is one linear map, not a 2-D filter
        assert patch_proj.bias is not None
        nn.init.zeros_(patch_proj.bias)
        for block in self.transformer_blocks:
            assert isinstance(block, Block)
            nn.init.zeros_(block.norm1.linear.weight)  # gates shut: each block starts as the identity (adaLN-zero)
            nn.init.zeros_(block.norm2.linear.weight)
        nn.init.zeros_(self.norm_out.linear.weight)  # the output depends on time only as far as it learns to
        nn.init.zeros_(self.proj_out.weight)  # the first prediction is v = 0, so the first loss is v's own variance


def add_positions(video_tokens: Tensor, added: Tensor | None) -> Tensor:
    """(B, N, D) and (N, D), or None where positions are rotary."""
    return video_tokens if added is None else video_tokens + added.to(video_tokens.dtype)


def join_positions(
    of_clips: Sequence[tuple[Tensor | None, RotaryTable | None]],
) -> tuple[Tensor | None, RotaryTable | None]:
    """Those of a pack, clip by clip, of those of its clips."""
    added = [positions for positions, _ in of_clips if positions is not None]
    rotary = [table for _, table in of_clips if table is not None]
    joined = None if not rotary else (torch.cat([cos for cos, _ in rotary]), torch.cat([sin for _, sin in rotary]))
    return torch.cat(added) if added else None, joined
