"""The video diffusion transformer (DiT) of CogVideoX 1.0, 2B and 5B, in plain torch.

Latents are (B, C, T, h, w) here, as they are cached; diffusers' model takes (B, T, C, h, w).
Weights in a folder are read and written by `mimir_train.transformer_folder`.
"""

from torch import Tensor, nn

from mimir_train.model.config import AttentionName, DiTConfig
from mimir_train.model.layers import (
    Block,
    OutputAdaLayerNorm,
    PatchEmbed,
    RotaryTable,
    TimeEmbedding,
    rotary_positions,
    sincos_positions,
    timestep_sinusoid,
)


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

    def forward(self, noisy_latents: Tensor, condition_tokens: Tensor, timesteps: Tensor) -> Tensor:
        """
        Args:
            noisy_latents: (B, C, T, h, w), any T; h and w multiples of the patch. Its dtype is the one computed in.
            condition_tokens: (B, L, text_embed_dim), any L, any float dtype. All of them are read: there is no mask.
            timesteps: (B,), 0 (data) to 999 (noise).
        Returns: the predicted v, (B, C, T, h, w).
        Raises: ValueError where h or w is no multiple of the patch.
        """
        patch_size = self.config.patch_size
        num_frames, height, width = noisy_latents.shape[2:]
        if height % patch_size or width % patch_size:
            raise ValueError(f"latents of {height} x {width} cannot be cut into patches of {patch_size}")
        grid = (num_frames, height // patch_size, width // patch_size)
        dtype = noisy_latents.dtype

        time_embed = self.time_embedding(timestep_sinusoid(timesteps, self.config.width).to(dtype))
        text_tokens, video_tokens = self.patch_embed(condition_tokens.to(dtype), noisy_latents)  # (B, L, D), (B, N, D)
        video_tokens, rotary = self.place(video_tokens, text_tokens.shape[1], grid)
        for block in self.transformer_blocks:
            text_tokens, video_tokens = block(text_tokens, video_tokens, time_embed, rotary)
        video_tokens = self.norm_out(self.norm_final(video_tokens), time_embed)
        return self.unpatchify(self.proj_out(video_tokens), grid)  # (B, C, T, h, w)

    def place(
        self, video_tokens: Tensor, num_text_tokens: int, grid: tuple[int, int, int]
    ) -> tuple[Tensor, RotaryTable | None]:
        """Tell tokens where they are: by what is added to them (2B), or by a rotation in attention (5B).

        Args:
            video_tokens: (B, N, D).
            grid: (T, h/p, w/p).
        Returns: video tokens (B, N, D), and the rotation of all S tokens or None.
        """
        config, device = self.config, video_tokens.device
        if config.use_rotary_positional_embeddings:
            rotary = rotary_positions(
                num_text_tokens,
                *grid,
                config.attention_head_dim,
                base_height=config.sample_height // config.patch_size,
                base_width=config.sample_width // config.patch_size,
                device=device,
            )
            return video_tokens, rotary
        positions = sincos_positions(
            *grid,
            config.width,
            spatial_interpolation_scale=config.spatial_interpolation_scale,
            temporal_interpolation_scale=config.temporal_interpolation_scale,
            device=device,
        )
        return video_tokens + positions.to(video_tokens.dtype), None

    def unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
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
