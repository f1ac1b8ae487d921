"""An identity changes with everything that changes a byte, and with nothing else."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mimir_precompute.config import (
    AnswersSettings,
    Bucket,
    EncodeSettings,
    Geometry,
    Instruction,
    LlmSettings,
    ModelSource,
    T5Settings,
    VaeSettings,
    VllmSettings,
)
from mimir_precompute.identity import (
    FeatureModels,
    attention_implementation,
    feature_identity,
    resolve_models,
    tensor_specs,
)
from mimir_precompute.model_files import ResolvedModel
from mimir_shared.errors import InputError
from mimir_shared.features import FEATURES, FeatureName, TensorSpec
from mimir_shared.fingerprint import differences, fingerprint

SOURCE = ModelSource(name="models")
SETTINGS = EncodeSettings(
    latents=VaeSettings(source=SOURCE),
    t5=T5Settings(text_encoder=SOURCE, tokenizer=SOURCE),
    answers=AnswersSettings(source=SOURCE),
    llm=LlmSettings(source=SOURCE),
)
GEOMETRY = Geometry(buckets=(Bucket(frames=49, height=480, width=720), Bucket(frames=1, height=480, width=720)), fps=8)
MODEL = ResolvedModel(
    folder=Path("/somewhere"),
    name="local",
    subfolder="",
    commit=None,
    digests={"config.json": "aa", "model.safetensors": "bb"},
    config={"_class_name": "AutoencoderKLCogVideoX", "d_model": 4096, "hidden_size": 3072, "num_hidden_layers": 32},
    chat_template_sha256="cc",
)
MODELS = FeatureModels(model=MODEL, tokenizer=MODEL)


def identity(
    feature: FeatureName,
    settings: EncodeSettings = SETTINGS,
    geometry: Geometry = GEOMETRY,
    models: FeatureModels = MODELS,
) -> dict[str, Any]:
    answers = identity("answers", settings, geometry, models) if feature == "llm" else None
    return feature_identity(feature, settings, geometry, models, answers)


def change(feature: str, **fields: Any) -> EncodeSettings:
    """The settings with fields of one feature changed; the LLM's two features keep what they must share."""
    changed = {feature: dataclasses.replace(getattr(SETTINGS, feature), **fields)}
    shared = {name: value for name, value in fields.items() if name in ("source", "max_caption_tokens")}
    if feature == "answers" and shared:
        changed["llm"] = dataclasses.replace(SETTINGS.llm, **shared)
    return dataclasses.replace(SETTINGS, **changed)


def changed_features(
    settings: EncodeSettings, geometry: Geometry = GEOMETRY, *, base: EncodeSettings = SETTINGS
) -> set[str]:
    return {f for f in FEATURES if fingerprint(identity(f, settings, geometry)) != fingerprint(identity(f, base))}


@pytest.mark.parametrize("feature", FEATURES)
def test_identity_is_plain_json(feature: FeatureName) -> None:
    made = identity(feature)
    assert json.loads(json.dumps(made)) == made
    assert (made["feature"], made["version"]) == (feature, 1)


@pytest.mark.parametrize(
    ("feature", "fields", "expected"),
    [
        ("latents", {"dtype": "float32"}, {"latents"}),
        ("latents", {"stored": ("moments", "mean")}, {"latents"}),
        ("latents", {"tiling": True}, {"latents"}),
        ("latents", {"engine": "diffusers"}, {"latents"}),
        ("latents", {"batch_size": 2}, {"latents"}),
        ("latents", {"seed": 1}, set()),
        ("t5", {"dtype": "float32"}, {"t5"}),
        ("t5", {"max_length": 64}, {"t5"}),
        ("t5", {"rows": "ragged"}, {"t5"}),
        ("t5", {"batch_size": 2}, {"t5"}),
        ("answers", {"dtype": "float32"}, {"answers", "llm"}),
        ("answers", {"instructions": (Instruction(name="a", text="b"),)}, {"answers", "llm"}),
        ("answers", {"max_caption_tokens": 64}, {"answers", "llm"}),
        ("answers", {"max_answer_tokens": 64}, {"answers", "llm"}),
        ("answers", {"max_instruction_tokens": 32}, {"answers", "llm"}),
        ("answers", {"variants": 2}, {"answers", "llm"}),
        ("answers", {"batch_size": 2}, {"answers", "llm"}),
        ("answers", {"engine": "vllm"}, {"answers", "llm"}),
        ("answers", {"vllm": VllmSettings(max_num_seqs=4)}, set()),
        ("answers", {"temperature": 0.5}, set()),
        ("answers", {"seed": 1}, set()),
        ("llm", {"dtype": "float32"}, {"llm"}),
        ("llm", {"batch_size": 2}, {"llm"}),
        ("llm", {"layer": 1}, {"llm"}),
        ("llm", {"layer": "mean"}, {"llm"}),
        ("llm", {"layer": -1}, set()),
        ("llm", {"instruction_pooling": "last"}, {"llm"}),
        ("llm", {"engine": "vllm"}, {"llm"}),
        ("llm", {"vllm": VllmSettings(max_num_seqs=4)}, set()),
        ("answers", {"source": ModelSource(name="moved")}, set()),
    ],
)
def test_a_setting_changes_exactly_the_features_whose_bytes_it_changes(
    feature: str, fields: dict[str, Any], expected: set[str]
) -> None:
    assert changed_features(change(feature, **fields)) == expected


def test_every_setting_of_every_feature_is_in_the_table_above() -> None:
    # a new field must be put into an identity, or declared here to change no byte
    known = {
        "latents": {"source", "dtype", "stored", "tiling", "batch_size", "seed", "engine"},
        "t5": {"text_encoder", "tokenizer", "dtype", "max_length", "rows", "batch_size"},
        "answers": {
            *("source", "dtype", "engine", "instructions", "max_caption_tokens", "max_answer_tokens"),
            *("max_instruction_tokens", "variants", "temperature", "seed", "batch_size", "vllm"),
        },
        "llm": {
            *("source", "dtype", "max_caption_tokens", "layer", "instruction_pooling", "batch_size", "engine", "vllm")
        },
    }
    for feature, names in known.items():
        assert {f.name for f in dataclasses.fields(getattr(SETTINGS, feature))} == names, feature


def test_a_layer_that_the_model_does_not_have_is_refused() -> None:
    for layer in (33, -34):
        with pytest.raises(InputError, match="32 layers"):
            identity("llm", change("llm", layer=layer))
    assert identity("llm", change("llm", layer=32)) == identity("llm", SETTINGS)


@pytest.mark.parametrize("layer", [1, -1, "mean"])
def test_another_layer_than_the_last_is_refused_of_vllm(layer: Any) -> None:
    with pytest.raises(InputError, match=f"--llm-hidden-engine vllm: gives --llm-layer last alone, got {layer}"):
        LlmSettings(source=SOURCE, engine="vllm", layer=layer)


def test_the_settings_of_vllm_count_once_it_is_the_engine() -> None:
    with_vllm = change("answers", engine="vllm")
    for field in ({"tensor_parallel_size": 2}, {"max_num_seqs": 4}, {"prefix_caching": False}):
        other = dataclasses.replace(with_vllm.answers, vllm=VllmSettings(**field))
        assert changed_features(dataclasses.replace(with_vllm, answers=other), base=with_vllm) == {"answers", "llm"}
    # how much memory it may take says how many prompts fit, not what comes out
    share = dataclasses.replace(with_vllm.answers, vllm=VllmSettings(gpu_memory_utilization=0.5))
    assert changed_features(dataclasses.replace(with_vllm, answers=share), base=with_vllm) == set()


def test_the_hidden_states_of_vllm_have_its_settings_in_place_of_those_of_transformers() -> None:
    assert "engine" not in identity("llm")
    with_vllm = change("llm", engine="vllm")
    written = identity("llm", with_vllm)
    assert written["engine"] == "vllm"
    assert set(written["engine_settings"]) == {"version", "tensor_parallel_size", "max_num_seqs"}
    assert not {"attention", "batch_size"} & set(written)
    # no prefix is cached where every token's row is wanted
    uncached = dataclasses.replace(with_vllm.llm, vllm=VllmSettings(prefix_caching=False))
    assert changed_features(dataclasses.replace(with_vllm, llm=uncached), base=with_vllm) == set()


def test_seeds_and_temperature_count_once_something_is_sampled() -> None:
    two = change("answers", variants=2)
    for field in ({"seed": 1}, {"temperature": 0.5}):
        other = dataclasses.replace(two, answers=dataclasses.replace(two.answers, **field))
        assert fingerprint(identity("answers", other)) != fingerprint(identity("answers", two))
    sampled = change("latents", stored=("sample",))
    other = change("latents", stored=("sample",), seed=1)
    assert fingerprint(identity("latents", sampled)) != fingerprint(identity("latents", other))


def test_geometry_changes_latents_alone() -> None:
    assert changed_features(SETTINGS, dataclasses.replace(GEOMETRY, fps=16)) == {"latents"}
    assert changed_features(SETTINGS, dataclasses.replace(GEOMETRY, buckets=GEOMETRY.buckets[:1])) == {"latents"}
    assert changed_features(SETTINGS, dataclasses.replace(GEOMETRY, buckets=GEOMETRY.buckets[::-1])) == set()
    assert changed_features(SETTINGS, dataclasses.replace(GEOMETRY, fps=8.0)) == set()


def test_a_changed_weight_file_changes_the_identity_and_is_named() -> None:
    other = dataclasses.replace(MODEL, digests={**MODEL.digests, "model.safetensors": "dd"})
    for feature in FEATURES:
        old, new = identity(feature), identity(feature, models=FeatureModels(model=other, tokenizer=MODEL))
        assert ('model.sha256["model.safetensors"]', "bb", "dd") in differences(old, new)


def test_a_changed_tokenizer_or_commit_changes_the_identity() -> None:
    other = dataclasses.replace(MODEL, digests={"tokenizer.json": "dd"})
    assert fingerprint(identity("t5", models=FeatureModels(model=MODEL, tokenizer=other))) != fingerprint(
        identity("t5")
    )
    hub = FeatureModels(model=dataclasses.replace(MODEL, commit="0" * 40), tokenizer=MODEL)
    assert all(fingerprint(identity(f, models=hub)) != fingerprint(identity(f)) for f in FEATURES)


def test_llm_identity_holds_the_fingerprint_of_the_answers() -> None:
    assert identity("llm")["answers"] == fingerprint(identity("answers"))


def test_attention_is_eager_where_logits_are_capped() -> None:
    assert attention_implementation({"attn_logit_softcapping": 50.0}) == "eager"
    assert attention_implementation({"attn_logit_softcapping": None}) == "sdpa"
    assert attention_implementation({}) == "sdpa"


def sizes(specs: tuple[TensorSpec, ...]) -> dict[str, tuple[int | None, ...]]:
    return {spec.name: spec.sizes for spec in specs}


def test_latents_of_cogvideox_have_the_published_shape() -> None:
    config = {"latent_channels": 16, "block_out_channels": [128, 256, 256, 512], "temporal_compression_ratio": 4}
    for values in (config, {}):
        specs = tensor_specs("latents", SETTINGS, values, GEOMETRY.buckets[0])
        assert sizes(specs) == {"vae_moments": (32, 13, 60, 90)}
        assert (specs[0].dims, specs[0].dtype, specs[0].channel_dim) == (("2C", "T", "h", "w"), "bf16", 0)
    still = tensor_specs("latents", change("latents", stored=("mean", "sample")), config, GEOMETRY.buckets[1])
    assert sizes(still) == {"vae_mean": (16, 1, 60, 90), "vae_sample": (16, 1, 60, 90)}


def test_latents_identity_lists_tensors_by_bucket() -> None:
    assert list(identity("latents")["tensors"]) == ["1x480x720", "49x480x720"]


def test_a_bucket_that_the_vae_cannot_compress_is_refused() -> None:
    with pytest.raises(InputError, match="--bucket 9x64x80: the VAE compresses 4x32x32"):
        tensor_specs("latents", SETTINGS, {"block_out_channels": [8] * 6}, Bucket(frames=9, height=64, width=80))


def test_a_bucket_that_tiling_would_put_together_wrongly_is_refused() -> None:
    # at 480x720 the published tiles meet; elsewhere diffusers returns latents of another size, and says nothing
    tiled = change("latents", tiling=True)
    assert sizes(tensor_specs("latents", tiled, {}, GEOMETRY.buckets[0])) == {"vae_moments": (32, 13, 60, 90)}
    small = {"block_out_channels": [8, 8, 8], "sample_height": 64, "sample_width": 96}
    with pytest.raises(InputError, match="tiling gives latents of 17x25 where 16x24 are expected"):
        tensor_specs("latents", tiled, small, Bucket(frames=9, height=64, width=96))


def test_text_features_have_the_widths_of_their_models() -> None:
    assert sizes(tensor_specs("t5", SETTINGS, {"d_model": 4096}, None)) == {
        "t5_embeds": (226, 4096),
        "t5_ids": (226,),
        "t5_offsets": (226, 2),
    }
    ragged = tensor_specs("t5", change("t5", rows="ragged"), {"d_model": 4096}, None)
    assert sizes(ragged) == {"t5_embeds": (None, 4096), "t5_ids": (None,), "t5_offsets": (None, 2)}
    assert tensor_specs("answers", SETTINGS, {}, None) == ()
    expected: dict[str, tuple[int | None, ...]] = {"query_hidden": (None, 3072), "query_offsets": (None, 2)}
    for variant in (0, 1):
        expected |= {f"answer_hidden_{variant}": (None, 3072), f"instruction_hidden_{variant}": (4, 3072)}
    two = change("answers", variants=2)
    assert sizes(tensor_specs("llm", two, {"hidden_size": 3072}, None)) == expected
    assert sizes(tensor_specs("llm", two, {"text_config": {"hidden_size": 3072}}, None)) == expected
    with pytest.raises(InputError, match="has no hidden_size"):
        tensor_specs("llm", two, {"text_config": {}}, None)


def test_a_model_of_another_class_is_refused_as_vae(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    settings = change("latents", source=ModelSource(name=str(tmp_path)))
    with pytest.raises(InputError, match="says 'AutoencoderKL', expected 'AutoencoderKLCogVideoX'"):
        resolve_models(settings, ("latents",))


def test_settings_refuse_an_llm_that_did_not_write_the_answers() -> None:
    with pytest.raises(InputError, match="answers and llm must have the same model and caption limit"):
        change("llm", max_caption_tokens=3)
    with pytest.raises(InputError, match="two instructions have the same name"):
        change("answers", instructions=(Instruction(name="a", text="b"), Instruction(name="a", text="c")))


def test_identity_needs_no_model_library() -> None:
    code = (
        "import sys, mimir_precompute.identity\n"
        "print([m for m in ('torch', 'transformers', 'diffusers', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
