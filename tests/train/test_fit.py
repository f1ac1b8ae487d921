"""A cache that does not fit the model is told before anything is built: each message, and that no model was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mimir_precompute.encoders.base import Encoded
from mimir_shared.errors import CacheError, InputError, MimirError
from mimir_train.cache_reader import open_cache
from mimir_train.config_document import overlay, train_config
from mimir_train.fit import describe_fit, fit
from mimir_train.loop import train
from mimir_train.model.config import DiTConfig
from mimir_train.model.dit import DiT
from mimir_train.presets import preset_document
from mimir_train.weights.transformer_folder import save_transformer
from tests.train import caches
from tests.train.caches import CHANNELS, T5_ROWS, T5_WIDTH, build_cache, tiny_config


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MimirError]:
    """Train, and give what it is refused with; nothing may have been built or written by then."""

    def attempt(cache: Path, **settings: object) -> MimirError:
        for name in ("build_model", "build_trainer"):
            monkeypatch.setattr(f"mimir_train.loop.{name}", lambda *_, **__: pytest.fail("a model was built"))
        with pytest.raises((InputError, CacheError)) as caught:
            train(tiny_config(cache, tmp_path / "run", **settings))
        assert not (tmp_path / "run").exists()
        return caught.value

    return attempt


def transformer_folder(folder: Path, **sizes: int) -> dict[str, object]:
    """Settings that start from a diffusers folder which fits the small cache, but for `sizes`."""
    fitting = {"in_channels": CHANNELS, "out_channels": CHANNELS, "text_embed_dim": T5_WIDTH}
    config = DiTConfig(num_attention_heads=2, attention_head_dim=16, num_layers=1, **{**fitting, **sizes})
    save_transformer(config, DiT(config).state_dict(), folder)
    return {"model__init_from": str(folder), "model__fit_to_cache": False}


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (
            {"in_channels": 16, "out_channels": 16},
            "its latents have 4 channels, but the transformer ({folder}) takes 16 and gives 16; they belong to "
            "different VAEs: train the transformer of the VAE that the cache was made with, or encode `latents` with "
            "its VAE",
        ),
        (
            {"text_embed_dim": 32},
            "its t5_embeds are 16 wide, but the transformer ({folder}) takes 32; encode `t5` with the text encoder of "
            "this transformer",
        ),
        (
            {"patch_size": 16},
            "latents of bucket 9x32x32 are 8 x 8, which cannot be cut into patches of 16, the transformer's ({folder})",
        ),
    ],
    ids=["other VAE", "other text width", "other patches"],
)
def test_a_cache_of_other_sizes_is_refused(
    small_cache: Path, tmp_path: Path, refused: Callable[..., MimirError], sizes: dict[str, int], said: str
) -> None:
    folder = tmp_path / "transformer"
    error = refused(small_cache, **transformer_folder(folder, **sizes))
    assert str(error) == f"{small_cache}: {said.format(folder=folder)}"
    assert error.exit_code == 4


def test_latents_of_a_vae_with_another_scale_are_refused(tmp_path: Path, refused: Callable[..., MimirError]) -> None:
    cache = build_cache(tmp_path / "cache", vae_name="THUDM/CogVideoX-2b")
    assert str(refused(cache, model__latent_scaling_factor=0.7)) == (
        f"{cache}: latents would be scaled by 0.7, but the VAE of THUDM/CogVideoX-2b, which made its latents, has the "
        f"scaling factor 1.15258; take the preset of that VAE, or --set model.latent_scaling_factor=1.15258"
    )


@pytest.mark.parametrize("fuser", ["mimir", "direct", "norm_ss"])
def test_a_fuser_that_reads_the_llm_is_refused_where_there_is_none(
    tmp_path: Path, refused: Callable[..., MimirError], fuser: str
) -> None:
    cache = build_cache(tmp_path / "cache", features=("latents", "t5"))
    error = refused(cache, model__fuser=fuser)
    assert str(error) == (
        f"--fuser {fuser} reads the feature `llm`, which {cache} does not have (it has latents, t5); make it: "
        f"`mimir-precompute encode --cache {cache} --features answers,llm` with its LLM, or train --fuser baseline"
    )
    assert error.exit_code == 2


def leave_out(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Caches that are built from here on lack some tensors."""
    whole, make = caches.identity_of, caches.make_feature

    def identity_without(feature: Any, *rest: Any) -> dict[str, Any]:
        identity = whole(feature, *rest)
        if feature == "llm":
            identity["tensors"] = [entry for entry in identity["tensors"] if entry["name"] not in names]
        return identity

    def made_without(feature: Any, key: str, bucket: str) -> Encoded:
        made = make(feature, key, bucket)
        kept = {name: tensor for name, tensor in made.tensors.items() if name not in names}
        return Encoded(tensors=kept, document=made.document, valid_rows=made.valid_rows)

    monkeypatch.setattr(caches, "identity_of", identity_without)
    monkeypatch.setattr(caches, "make_feature", made_without)


def test_a_tensor_that_training_reads_and_the_cache_lacks_is_named(
    tmp_path: Path, refused: Callable[..., MimirError], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out(monkeypatch, "query_offsets")
    cache = build_cache(tmp_path / "cache")
    said = str(refused(cache, model__text_align="char_offset"))
    assert "`llm` has no query_offsets, which training reads; it has query_hidden, answer_hidden_0" in said
    assert said.endswith("encode `llm` anew, with --on-mismatch new to keep what is there")


def test_one_answer_cannot_be_cycled(
    tmp_path: Path, refused: Callable[..., MimirError], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out(monkeypatch, "answer_hidden_1", "instruction_hidden_1")
    cache = build_cache(tmp_path / "cache")
    assert str(refused(cache, data__answer_variant="cycle")) == (
        f"--answer-variant cycle: {cache} holds one answer to each prompt; encode with --answer-variants 2 or more, or "
        f"train with --answer-variant fixed"
    )


def test_the_missing_empty_prompt_is_told_in_time(tmp_path: Path, refused: Callable[..., MimirError]) -> None:
    cache = build_cache(tmp_path / "cache")
    for path in cache.glob("t5/*/empty.safetensors"):
        path.unlink()
    error = refused(cache, data__empty_text="cached")
    assert "missing, the features of the empty prompt; train with --empty-text zeros" in str(error)


def test_the_preset_of_another_model_is_refused_without_a_look_at_the_hub(
    small_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mimir_train.fit.find_initial_transformer", lambda _: pytest.fail("the hub was asked"))
    given = {"data": {"cache": str(small_cache)}, "run": {"output_dir": str(tmp_path / "run"), "device": "cpu"}}
    for preset in ("cogvideox-2b", "cogvideox-5b"):
        with pytest.raises(CacheError, match=r"its latents have 4 channels, but the transformer \(THUDM/CogVideoX-"):
            train(train_config(overlay(preset_document(preset), given)))


def test_another_number_of_text_rows_is_told_and_trained_on(small_cache: Path, tmp_path: Path) -> None:
    def told(rows: int) -> str:
        settings = transformer_folder(tmp_path / str(rows), max_text_seq_length=rows)
        cache = open_cache(str(small_cache))
        return "\n".join(describe_fit(fit(tiny_config(small_cache, tmp_path / "run", **settings), cache), cache))

    assert f"was trained on 226 rows of text, pad rows among them, and the cache has {T5_ROWS}" in told(226)
    assert "rows of text" not in told(T5_ROWS)
