"""The frozen models behind a checkpoint: encoded as in training, or refused."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mimir_precompute.toy.models import load_toy_vae
from mimir_shared.errors import CacheError
from mimir_train.sampling.frozen_models import FrozenModels, ModelLocations
from tests.train.hand_made_checkpoint import (
    SCALING_FACTOR,
    T5_ROWS,
    flip_last_bit,
    identities,
    random_model,
    sample,
    write_checkpoint,
)

CAT, DOG = "a red circle moves to the left", "two blue squares"


@pytest.fixture(scope="module")
def models(toy_world: Path) -> Path:
    return toy_world / "models"


@pytest.fixture(scope="module")
def recorded(models: Path) -> dict[str, dict[str, Any]]:
    return identities(models)


class Quiet:
    """Progress that remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def start(self, what: str, total: int) -> None:
        self.said.append(what)

    def advance(self) -> None:
        pass


def found(recorded: dict[str, Any], models: Path) -> FrozenModels:
    return FrozenModels(recorded, ("t5", "answers", "llm"), ModelLocations(models=str(models)), "cpu")  # type: ignore[arg-type]


def test_prompts_are_encoded_as_captions_were(recorded: dict[str, Any], models: Path) -> None:
    frozen = found(recorded, models)
    text = frozen.encode_texts([CAT, DOG], T5_ROWS, 0, Quiet())[CAT]
    alone = frozen.encode_texts([CAT], T5_ROWS, 0, Quiet())[CAT]
    assert text.t5_embeds.shape == (1, T5_ROWS, 64)
    assert text.t5_embeds.dtype == torch.bfloat16
    assert torch.equal(text.t5_embeds, alone.t5_embeds)
    assert text.llm is not None
    assert alone.llm is not None
    assert all(torch.equal(a, b) for a, b in zip(text.llm, alone.llm, strict=True))
    assert text.llm.instruction_hidden.shape == (1, 4, 64)
    assert text.llm.query_mask.all()


def test_a_text_that_t5_cuts_is_told(recorded: dict[str, Any], models: Path) -> None:
    progress = Quiet()
    found(recorded, models).encode_texts(["a red circle " * 30], T5_ROWS, 0, progress)
    assert any("T5 reads 24 tokens" in line for line in progress.said)


def test_latents_are_unscaled_before_the_vae_decodes_them(recorded: dict[str, Any], models: Path) -> None:
    latents = torch.randn(8, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    with found(recorded, models).decoder(SCALING_FACTOR) as decode:
        pixels = decode(latents * SCALING_FACTOR)
    with torch.no_grad():
        expected = load_toy_vae().decode(latents[None]).sample[0].permute(1, 2, 3, 0)
    difference = np.abs(pixels.astype(float) - (expected.numpy() * 127.5 + 127.5).clip(0, 255))
    assert difference.max() <= 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("vae/diffusion_pytorch_model.safetensors", "latents model.sha256"),
        ("text_encoder/model.safetensors", "t5 model.sha256"),
        ("llm/model.safetensors", "answers model.sha256"),
    ],
)
def test_models_that_differ_from_those_of_training_are_refused_by_field(
    recorded: dict[str, Any], models: Path, tmp_path: Path, changed: str, said: str
) -> None:
    copy = shutil.copytree(models, tmp_path / "models")
    flip_last_bit(copy / changed)
    write_checkpoint(tmp_path / "run", recorded, random_model("mimir"))
    with pytest.raises(CacheError, match=said) as caught:
        sample(tmp_path / "run", copy, tmp_path / "out", "--prompt", CAT)
    assert " → " in str(caught.value)
    assert str(caught.value).startswith(f"{copy / changed.split('/')[0]}: not the models")  # and no other folder
    assert not re.search("[0-9a-f]{13}", str(caught.value))
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_a_field_that_this_release_makes_otherwise_is_refused(
    recorded: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    older = {**recorded, "t5": {**recorded["t5"], "version": 0}}
    write_checkpoint(tmp_path / "run", older, random_model("baseline"))
    with pytest.raises(CacheError, match=r"t5 version: 0 → \d"):
        sample(tmp_path / "run", models, tmp_path / "out", "--prompt", CAT)


def test_how_the_latents_were_encoded_does_not_matter_for_decoding(
    recorded: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    otherwise = {"engine": "diffusers", "engine_version": 0}
    write_checkpoint(
        tmp_path / "run", {**recorded, "latents": {**recorded["latents"], **otherwise}}, random_model("baseline")
    )
    sample(tmp_path / "run", models, tmp_path / "out", "--prompt", CAT)
    assert (tmp_path / "out" / f"{CAT}-0.mp4").exists()


def test_hidden_states_by_vllm_are_made_by_transformers_for_a_prompt(recorded: dict[str, Any], models: Path) -> None:
    kept = {field: value for field, value in recorded["llm"].items() if field not in ("attention", "batch_size")}
    settings = {"version": "0", "tensor_parallel_size": 1, "max_num_seqs": 256}
    by_vllm = {**kept, "engine": "vllm", "engine_settings": settings}
    text = found({**recorded, "llm": by_vllm}, models).encode_texts([CAT], T5_ROWS, "index", Quiet())[CAT]
    own = found(recorded, models).encode_texts([CAT], T5_ROWS, "index", Quiet())[CAT]
    assert text.llm is not None
    assert own.llm is not None
    assert all(torch.equal(a, b) for a, b in zip(text.llm, own.llm, strict=True))


def test_a_model_under_another_name_with_the_same_files_is_the_same_model(
    recorded: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    on_the_hub = {"name": "somebody/t5", "subfolder": "text_encoder", "commit": "a" * 40}
    renamed = {**recorded["t5"], "model": {**recorded["t5"]["model"], **on_the_hub}}
    write_checkpoint(tmp_path / "run", {**recorded, "t5": renamed}, random_model("baseline"))
    sample(tmp_path / "run", models, tmp_path / "out", "--prompt", CAT)
    assert (tmp_path / "out" / f"{CAT}-0.mp4").exists()
