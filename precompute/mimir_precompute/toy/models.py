"""Tiny models in the formats of the real ones: what `from_pretrained` loads, small enough to run on a CPU.

The VAE is trained (scripts/train_toy_vae.py); everything else has random weights that depend on the seed alone.
"""

import contextlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from safetensors import safe_open
from transformers import (
    GenerationConfig,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.utils import logging as transformers_logging

from mimir_precompute.toy.vocabulary import (
    LLM_MAX_TOKENS,
    T5_MAX_TOKENS,
    build_llm_tokenizer,
    build_t5_tokenizer,
    training_text,
)

VAE_WEIGHTS = Path(__file__).parent / "vae_weights.safetensors"
TEXT_WIDTH = 64

# `Any`: diffusers' constructors take unlike types by keyword, and have no stubs.
VAE_CONFIG: dict[str, Any] = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 3,
    "up_block_types": ("CogVideoXUpBlock3D",) * 3,
    "block_out_channels": (16, 32, 32),
    "latent_channels": 8,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "temporal_compression_ratio": 4,
    "sample_height": 64,
    "sample_width": 96,
}
TRANSFORMER_CONFIG: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": VAE_CONFIG["latent_channels"],
    "out_channels": VAE_CONFIG["latent_channels"],
    "num_layers": 4,
    "time_embed_dim": 64,
    "text_embed_dim": TEXT_WIDTH,
    "max_text_seq_length": T5_MAX_TOKENS,
    "patch_size": 2,
    "sample_height": 16,
    "sample_width": 24,
    "sample_frames": 9,
    "temporal_compression_ratio": VAE_CONFIG["temporal_compression_ratio"],
    "use_rotary_positional_embeddings": True,
}
SCHEDULER_CONFIG: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
}


def write_toy_models(directory: Path, seed: int) -> None:
    """Write directory/models/{vae,text_encoder,tokenizer,llm,transformer,scheduler}; equal seeds give equal bytes.

    The folder is also a CogVideoXPipeline (model_index.json), to which `llm` is an extra.
    """
    models_dir = directory / "models"
    models_dir.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]), _no_progress_bars():
        torch.manual_seed(seed)
        load_toy_vae().save_pretrained(models_dir / "vae")
        CogVideoXTransformer3DModel(**TRANSFORMER_CONFIG).save_pretrained(models_dir / "transformer")
        _write_text_encoder(models_dir)
        _write_llm(models_dir / "llm")
    CogVideoXDDIMScheduler(**SCHEDULER_CONFIG).save_pretrained(models_dir / "scheduler")
    index = {
        "_class_name": "CogVideoXPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    (models_dir / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Each save of transformers would draw a bar for its one file."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def load_toy_vae() -> AutoencoderKLCogVideoX:
    """The trained VAE in float32: 4x4x4 compression, 8 channels; scaled latents of toy clips have unit variance."""
    with safe_open(VAE_WEIGHTS, framework="pt") as weights:
        scaling_factor = float(weights.metadata()["scaling_factor"])
        tensors = {name: weights.get_tensor(name).float() for name in weights.keys()}  # noqa: SIM118
    vae = AutoencoderKLCogVideoX(**VAE_CONFIG, scaling_factor=scaling_factor)
    vae.load_state_dict(tensors)
    return vae.eval()


def _write_text_encoder(models_dir: Path) -> None:
    tokenizer = build_t5_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    T5EncoderModel(config).save_pretrained(models_dir / "text_encoder")
    tokenizer.save_pretrained(models_dir / "tokenizer")


def _write_llm(llm_dir: Path) -> None:
    tokenizer = build_llm_tokenizer()
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=128,
        num_hidden_layers=2,
        # 32 a head: vLLM has no kernel for narrower ones.
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=LLM_MAX_TOKENS,
        original_max_position_embeddings=LLM_MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = Phi3ForCausalLM(config)  # type: ignore[no-untyped-call]
    _teach_to_babble(model, tokenizer)
    end_ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end_ids, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(llm_dir)
    tokenizer.save_pretrained(llm_dir)


@torch.no_grad()
def _teach_to_babble(model: Phi3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Set the LLM's two token matrices so that it writes words in a likely order and ends its answers.

    The embedding of a token is a random vector, and the head of a token is the sum of those of the tokens that come
    before it in the training text, each times how often: an associative memory of token pairs. What attention and
    the MLPs add is random but no small part of the whole, so that answers differ with the prompt.
    """
    counts = torch.zeros(len(tokenizer), len(tokenizer), dtype=torch.float64)
    for line in training_text():
        ids = tokenizer(f"<|assistant|>\n{line}<|end|>").input_ids
        for token, following in itertools.pairwise(ids):
            counts[token, following] += 1
    likelihood = counts / counts.sum(1, keepdim=True).clamp(min=1)
    vectors = torch.randn(len(tokenizer), TEXT_WIDTH, dtype=torch.float64)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    weights = likelihood.sqrt()
    weights.fill_diagonal_(-1)  # a word seldom follows itself; without this, greedy answers stutter
    weights[:, counts.sum(0) == 0] = 0  # nor do tokens that no text has, such as halves of characters
    head = weights.T @ vectors
    # Common tokens follow so many others that their heads would match everything: most of that length is taken away.
    head = 3 * head / head.norm(dim=1, keepdim=True).clamp(min=1e-3) ** 0.7
    head[tokenizer.convert_tokens_to_ids("<|end|>")] *= 1.5
    model.model.embed_tokens.weight.copy_(vectors * math.sqrt(TEXT_WIDTH))
    # To a coarse grid: matrix products differ in their last bits between machines, the file must not.
    model.lm_head.weight.copy_((head * 4096).round() / 4096)
    for name, weight in model.model.layers.named_parameters():
        if "proj" in name:
            weight.mul_(6)
