"""Tiny models: the toy ones, and random ones of other LLM families."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GenerationConfig,
    PretrainedConfig,
    Qwen2Config,
)

from mimir_precompute.toy.models import write_toy_models

FAMILIES = ("phi3", "qwen2", "gemma2")
QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
GEMMA_TEMPLATE = (
    "<bos>{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the toy models."""
    directory = tmp_path_factory.mktemp("toy")
    write_toy_models(directory, 0)
    return directory / "models"


def write_family(
    folder: Path, toy_llm: Path, config: PretrainedConfig, template: str, markers: list[AddedToken]
) -> None:
    """A random model of another family, with the toy LLM's words and its own markers and template."""
    tokenizer = AutoTokenizer.from_pretrained(toy_llm)
    tokenizer.add_tokens(markers)
    tokenizer.chat_template = template
    config.vocab_size = len(tokenizer)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def families(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of three tiny LLMs whose final norms, templates and markers differ."""
    root = tmp_path_factory.mktemp("families")
    size: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        # wide weights: logits far apart, answers that are not one token again and again
        "initializer_range": 0.3,
    }
    # "<think>" as Qwen3 has it: written by the template, yet not flagged as special
    qwen = [
        AddedToken("<think>", special=False),
        *(AddedToken(m, special=True) for m in ("<|im_start|>", "<|im_end|>")),
    ]
    gemma = [AddedToken(marker, special=True) for marker in ("<bos>", "<start_of_turn>", "<end_of_turn>")]
    write_family(root / "qwen2", models / "llm", Qwen2Config(**size), QWEN_TEMPLATE, qwen)
    write_family(root / "gemma2", models / "llm", Gemma2Config(**size, head_dim=16), GEMMA_TEMPLATE, gemma)
    return {"phi3": models / "llm", "qwen2": root / "qwen2", "gemma2": root / "gemma2"}


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, families: dict[str, Path]) -> Path:
    """The LLM folder of each family in turn."""
    return families[request.param]
