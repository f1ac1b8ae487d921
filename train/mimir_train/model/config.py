"""Sizes of the models: frozen, checked where they are made, and without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

AttentionName = Literal["sdpa", "xformers", "varlen", "flex"]
"""Who computes attention: torch's scaled_dot_product_attention, xformers, torch's varlen_attn or its flex_attention."""


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """A CogVideoX 1.0 transformer; fields and defaults are those of its config.json (the defaults are 2B's)."""

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    num_layers: int = 30
    in_channels: int = 16
    out_channels: int = 16
    time_embed_dim: int = 512
    text_embed_dim: int = 4096
    """Width of the condition tokens, which is T5's."""
    attention_bias: bool = True
    """Whether the maps to queries, keys and values have a bias."""
    norm_eps: float = 1e-5
    """Of every layer norm but those of queries and keys, whose epsilon is 1e-6."""
    patch_size: int = 2
    """Latent pixels of a patch's side; a patch is one latent frame deep."""
    sample_height: int = 60
    """Height in latent pixels at which the model was first trained: the base grid of the rotary positions."""
    sample_width: int = 90
    sample_frames: int = 49
    """Pixel frames; read by diffusers alone (for its position buffer), and kept for it."""
    temporal_compression_ratio: int = 4
    """Pixel frames to a latent frame; read by diffusers alone."""
    max_text_seq_length: int = 226
    """Text tokens of diffusers' position buffer; read by diffusers alone: here any number of text tokens will do."""
    spatial_interpolation_scale: float = 1.875
    """Of the sin-cos positions: distance between two patches is 1/scale."""
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False
    """Positions are rotary in attention (5B), or sines and cosines added to the video tokens (2B)."""

    def __post_init__(self) -> None:
        if self.use_rotary_positional_embeddings and self.attention_head_dim % 16:
            raise ValueError(
                f"attention_head_dim must be a multiple of 16, for rotary positions split it into 2/8, 3/8 and 3/8 "
                f"of pairs; got {self.attention_head_dim}"
            )
        if self.width % 16:
            raise ValueError(
                f"num_attention_heads * attention_head_dim must be a multiple of 16, got {self.num_attention_heads} "
                f"* {self.attention_head_dim} = {self.width}"
            )

    @property
    def width(self) -> int:
        """D of the video and text tokens inside the transformer."""
        return self.num_attention_heads * self.attention_head_dim


FuserName = Literal["baseline", "direct", "norm", "norm_ss", "zeroconv", "zeroconv_ss", "norm_zeroconv", "mimir"]


@dataclass(frozen=True, kw_only=True)
class FuserSwitches:
    """Which parts of the token fuser are there. Each is independent of the others."""

    decoder: bool
    """The LLM's tokens are added to T5's."""
    norm: bool = False
    """What comes of the LLM is normalised and scaled to T5's range first."""
    zero_conv: bool = False
    """Zero-initialised maps stand on both branches; without them T5 passes unchanged, and a map that starts
    from values of a fixed seed brings the LLM's tokens to T5's width."""
    stabilizer: bool = False
    """One token for each instruction is appended."""

    @property
    def needs_llm(self) -> bool:
        """Whether the cache must hold the feature `llm`."""
        return self.decoder or self.stabilizer


FUSERS: Mapping[FuserName, FuserSwitches] = MappingProxyType(
    {
        "baseline": FuserSwitches(decoder=False),
        "direct": FuserSwitches(decoder=True),
        "norm": FuserSwitches(decoder=True, norm=True),
        "norm_ss": FuserSwitches(decoder=True, norm=True, stabilizer=True),
        "zeroconv": FuserSwitches(decoder=True, zero_conv=True),
        "zeroconv_ss": FuserSwitches(decoder=True, zero_conv=True, stabilizer=True),
        "norm_zeroconv": FuserSwitches(decoder=True, norm=True, zero_conv=True),
        "mimir": FuserSwitches(decoder=True, norm=True, zero_conv=True, stabilizer=True),
    }
)
"""The seven rows of the paper's table 3 and the one that it leaves out (norm_zeroconv)."""


@dataclass(frozen=True, kw_only=True)
class FuserConfig:
    """A token fuser: its switches and sizes."""

    switches: FuserSwitches
    t5_rms: float
    """Root mean square of the cache's T5 embeddings over non-pad rows: where the learnable scale starts."""
    text_width: int = 4096
    """D of T5 and of the condition tokens."""
    llm_width: int = 3072
    """H of the LLM's hidden states."""
    num_instructions: int = 4
    """K: tokens of the stabilizer, one for each instruction."""
    decoder_gain: float = 1.0
    """The paper's alpha. Constant: with a zero map behind it, a learnable gain has no gradient to start on."""
    stabilizer_start_step: int = 0
    """Training step from which the stabilizer tokens are appended; until then the text has T5's length."""

    def __post_init__(self) -> None:
        if not self.t5_rms > 0:
            raise ValueError(f"t5_rms must be positive, got {self.t5_rms}")
        if self.switches.norm and not self.switches.needs_llm:
            raise ValueError("norm has nothing to normalise: neither decoder nor stabilizer is on")

    def appends_stabilizer(self, step: int) -> bool:
        """Whether the condition of training step `step` (0 is the first) has the stabilizer tokens."""
        return self.switches.stabilizer and step >= self.stabilizer_start_step
