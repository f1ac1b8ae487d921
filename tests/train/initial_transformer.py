"""A small transformer with no zero in it, in a diffusers folder that fits the small cache: what runs start from."""

from dataclasses import replace
from pathlib import Path

import torch

from mimir_train.model.config import DiTConfig
from mimir_train.model.dit import DiT
from mimir_train.weights.transformer_folder import save_transformer
from tests.train.caches import CHANNELS, HEIGHT, T5_ROWS, T5_WIDTH, WIDTH

CONFIG = DiTConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    in_channels=CHANNELS,
    out_channels=CHANNELS,
    time_embed_dim=24,
    text_embed_dim=T5_WIDTH,
    sample_height=HEIGHT,
    sample_width=WIDTH,
    sample_frames=9,
)


def write_transformer(folder: Path, *, text_tokens: int = T5_ROWS) -> Path:
    """Random weights that keep the size of what goes in, so that no part is hidden from a comparison."""
    torch.manual_seed(1)
    model = DiT(CONFIG)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    save_transformer(replace(CONFIG, max_text_seq_length=text_tokens), model.state_dict(), folder)
    return folder
