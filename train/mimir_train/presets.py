"""Named settings of stage two, as documents: what a file, --set and flags are laid over."""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from mimir_shared.errors import InputError
from mimir_train.config_document import Document

_TINY: Final[Document] = {
    "data": {"global_batch_size": 8},
    "model": {
        "fuser": "mimir",
        "init_from": "scratch",
        "fit_to_cache": True,
        "latent_scaling_factor": None,  # from the cache: whatever small VAE made it
        "transformer": {
            "num_attention_heads": 3,
            "attention_head_dim": 32,
            "num_layers": 3,
            "time_embed_dim": 64,
            # added positions: so small a model learns places from them sooner than from rotary ones
            "use_rotary_positional_embeddings": False,
            "spatial_interpolation_scale": 1.0,
        },
    },
    "objective": {"snr_shift_scale": 3.0},  # 2B's: more of the steps where the places of things are settled
    "optimizer": {"learning_rate": 3e-3, "fuser_learning_rate": 3e-3, "warmup_steps": 10},
    "run": {
        "max_train_steps": 300,
        "checkpointing_steps": 100,
        "validation_steps": 50,
        "precision": "float32",
    },
}

_COGVIDEOX: Final[Document] = {
    "data": {"global_batch_size": 32, "micro_batch_size": 1},
    "optimizer": {"learning_rate": 1e-5, "fuser_learning_rate": 1e-4, "warmup_steps": 100},
    # 17,776 tokens: without it 2B's activations alone are some 50 GB, by counting what autograd keeps
    "parallel": {"activation_checkpointing": "selective"},
    "run": {"max_train_steps": 10_000, "precision": "bfloat16"},
}

_COGVIDEOX_2B: Final[Document] = {
    **_COGVIDEOX,
    "model": {
        "fuser": "mimir",
        "init_from": "THUDM/CogVideoX-2b",
        "latent_scaling_factor": 1.15258426,
        "transformer": {},  # the defaults of DiTConfig are 2B's
    },
    "objective": {"snr_shift_scale": 3.0},
}

_COGVIDEOX_5B: Final[Document] = {
    **_COGVIDEOX,
    "model": {
        "fuser": "mimir",
        "init_from": "THUDM/CogVideoX-5b",
        "latent_scaling_factor": 0.7,
        "transformer": {
            "num_attention_heads": 48,
            "num_layers": 42,
            "use_rotary_positional_embeddings": True,
        },
    },
    "objective": {"snr_shift_scale": 1.0},
}

PRESETS: Final[Mapping[str, Document]] = MappingProxyType(
    {"tiny": _TINY, "cogvideox-2b": _COGVIDEOX_2B, "cogvideox-5b": _COGVIDEOX_5B}
)

LORA_LEARNING_RATES: Final[Mapping[str, float]] = MappingProxyType({"cogvideox-2b": 1e-4, "cogvideox-5b": 1e-4})
"""In place of a preset's learning rate where adapters are trained: they start from nothing, and want more."""

VAE_SCALING_FACTORS: Final[Mapping[str, float]] = MappingProxyType(
    {
        "THUDM/CogVideoX-2b": 1.15258426,
        "zai-org/CogVideoX-2b": 1.15258426,
        "THUDM/CogVideoX-5b": 0.7,
        "zai-org/CogVideoX-5b": 0.7,
    }
)
"""Of the VAEs that a cache may name as its model."""


def preset_document(name: str) -> Document:
    """A copy of a preset's settings. Raises InputError that lists the presets there are."""
    if name not in PRESETS:
        raise InputError(f"--preset {name!r}: expected one of {', '.join(PRESETS)}")
    return {"preset": name, **copy.deepcopy(PRESETS[name])}
