"""Load the LLM that `answers` and `llm` share: the same tokenizer, weights and attention for both."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mimir_precompute.config import ComputeDType
from mimir_precompute.encoders.arrays import TORCH_DTYPES, prepare_to_load
from mimir_precompute.identity import attention_implementation
from mimir_precompute.model_files import ResolvedModel, loading_from, refuse_incomplete

CausalLM = Any
"""A causal LM of transformers: its concrete class depends on config.json."""


def load_tokenizer(model: ResolvedModel) -> Any:
    """Load the tokenizer beside the LLM. Raises: InputError if it cannot be."""
    with loading_from(model):
        return AutoTokenizer.from_pretrained(model.folder, local_files_only=True, trust_remote_code=False)


def load_causal_lm(model: ResolvedModel, dtype: ComputeDType, device: str) -> CausalLM:
    """Load the frozen LLM onto the device. Raises: InputError if the folder does not hold one, whole."""
    prepare_to_load()
    with loading_from(model):
        # Any: the library types the call as if it gave the model alone
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model.folder,
            local_files_only=True,
            trust_remote_code=False,
            dtype=TORCH_DTYPES[dtype],
            attn_implementation=attention_implementation(model.config),
            output_loading_info=True,
        )
    lm, info = loaded
    refuse_incomplete(model, list(info["missing_keys"]), [str(key) for key in info["mismatched_keys"]])
    return lm.to(torch.device(device)).eval().requires_grad_(False)


def configured_end_ids(model: ResolvedModel) -> int | list[int] | None:
    """The end tokens that generation_config.json names, else config.json."""
    with loading_from(model):
        if (model.folder / "generation_config.json").exists():
            configured: int | list[int] | None = GenerationConfig.from_pretrained(model.folder).eos_token_id
        else:
            text_config = model.config.get("text_config") or {}
            configured = model.config.get("eos_token_id", text_config.get("eos_token_id"))
    return configured
