"""How many operations a CogVideoX transformer takes for a clip, from its sizes alone; no torch here.

A clip has S = L + N tokens, of text and of video, D wide. A multiplication and an addition are two operations:
    linear      24 * D**2 * S a block: queries, keys, values and output are 4 D**2 weights, feed-forward 8 D**2
    attention   4 * S**2 * D a block: the scores, and the values weighed by them; every token attends to every token
    ends        patches, text projection, time embedding, the maps from time to norms and gates, output
Norms, softmax, activations and the token fuser are left out: at the sizes of CogVideoX below a thousandth.

Training takes three times the forward: the backward pass makes a gradient of the weights and one of the inputs, each
as large as the product itself. What activation checkpointing computes again is not counted, so that utilisation tells
how fast the model is trained and not how busy the device is kept. Weights that are frozen beside adapters want no
gradient of their own; what the adapters themselves take is left out, of rank R about R/D of the rest.
"""

from dataclasses import dataclass
from typing import Final

TRAINING_FACTOR: Final = 3
"""Forward and backward over the forward alone."""

LatentSize = tuple[int, int, int]
"""(T, h, w) of a clip's latents."""


@dataclass(frozen=True, kw_only=True)
class TransformerSizes:
    """What decides the operations of a transformer; the defaults are CogVideoX's."""

    width: int
    """D."""
    num_layers: int
    time_embed_dim: int = 512
    text_width: int = 4096
    in_channels: int = 16
    out_channels: int = 16
    patch_size: int = 2


COGVIDEOX_2B: Final = TransformerSizes(width=1920, num_layers=30)
COGVIDEOX_5B: Final = TransformerSizes(width=3072, num_layers=42)


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """Operations of the forward pass of one clip."""

    linear: int
    attention: int
    ends: int

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.ends


def num_video_tokens(sizes: TransformerSizes, latent_size: LatentSize) -> int:
    """N: patches of a clip."""
    frames, height, width = latent_size
    return frames * (height // sizes.patch_size) * (width // sizes.patch_size)


def forward_flops(sizes: TransformerSizes, latent_size: LatentSize, num_text_tokens: int) -> ForwardFlops:
    """Operations of one clip's way through the transformer.

    Args:
        num_text_tokens: L, those of the stabilizer among them.
    """
    width, layers, time_embed = sizes.width, sizes.num_layers, sizes.time_embed_dim
    num_video = num_video_tokens(sizes, latent_size)
    num_tokens = num_text_tokens + num_video
    patch_values = sizes.patch_size**2
    of_video = (sizes.in_channels + sizes.out_channels) * patch_values * width * num_video
    of_text = sizes.text_width * width * num_text_tokens
    # the time goes through two maps, then to 12 widths in every block and to 2 at the output
    of_time = width * time_embed + time_embed**2 + (12 * layers + 2) * width * time_embed
    return ForwardFlops(
        linear=24 * width**2 * num_tokens * layers,
        attention=4 * num_tokens**2 * width * layers,
        ends=2 * (of_video + of_text + of_time),
    )


def training_flops(
    sizes: TransformerSizes, latent_size: LatentSize, num_text_tokens: int, *, frozen: bool = False
) -> int:
    """Operations of one clip's forward and backward; see the head of this module for what is counted.

    Args:
        frozen: adapters are trained, and the transformer's own weights are not.
    """
    forward = forward_flops(sizes, latent_size, num_text_tokens)
    weight_gradients = forward.linear + forward.ends if frozen else 0  # those that are not wanted
    return TRAINING_FACTOR * forward.total - weight_gradients
