"""The identity of each feature: everything that changes a byte of it, as plain JSON values. No torch here.

What may differ between two equal runs (folders, hosts, devices, library versions) is provenance and stays out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mimir_precompute.config import (
    AnswersSettings,
    Bucket,
    EncodeSettings,
    Geometry,
    LlmLayer,
    LlmSettings,
    ModelSource,
    VaeEngine,
)
from mimir_precompute.decoding.frames import RESIZE_KERNEL
from mimir_precompute.encoders.prompts import INSTRUCTION_SEPARATOR, TEMPLATE_ARGUMENTS
from mimir_precompute.encoders.vllm_process import vllm_version
from mimir_precompute.model_files import ModelPart, ResolvedModel, resolve_model
from mimir_shared.errors import InputError
from mimir_shared.features import FeatureName, TensorSpec
from mimir_shared.fingerprint import fingerprint

JsonValue = Any
"""What `json` reads and writes; the library gives it no type."""

VERSIONS: Mapping[FeatureName, int] = {"latents": 1, "t5": 1, "answers": 1, "llm": 1}
"""Raised for a feature whenever our own code changes its bytes."""

VAE_FRAMES_PER_CHUNK = 8
"""Frames that the VAE sees at once, after a first chunk of one more; its GroupNorm makes them part of the result."""

VAE_CLASS = "AutoencoderKLCogVideoX"

VAE_ENGINE_VERSIONS: Mapping[VaeEngine, int] = {"fast": 1, "diffusers": 1}
"""Raised for an engine whenever our own code changes the bytes that it gives."""

LLM_LAYER_NAMES: Mapping[LlmLayer, str] = {
    "last": "last, after the final norm",
    "mean": "mean over the normalised outputs of all blocks",
}
"""As an identity has them; any other layer stands there as its number."""

PARTS: Mapping[FeatureName, tuple[ModelPart, ...]] = {
    "latents": ("weights",),
    "t5": ("weights",),
    "answers": ("weights", "tokenizer", "chat_template"),
    "llm": ("weights", "tokenizer", "chat_template"),
}
"""What each feature loads from its model; the tokenizer of `t5` has a source of its own."""


@dataclass(frozen=True, kw_only=True)
class FeatureModels:
    """The model files of one feature."""

    model: ResolvedModel
    tokenizer: ResolvedModel | None = None
    """Only for `t5`, whose tokenizer lies apart."""


def resolve_models(settings: EncodeSettings, features: Iterable[FeatureName]) -> dict[FeatureName, FeatureModels]:
    """Find, check and digest the models of some features; one that two features share is read once.

    Raises: InputError naming the folder or hub id and what is missing there.
    """
    resolved: dict[tuple[ModelSource, tuple[ModelPart, ...]], ResolvedModel] = {}

    def resolve(source: ModelSource, parts: tuple[ModelPart, ...]) -> ResolvedModel:
        if (source, parts) not in resolved:
            resolved[source, parts] = resolve_model(source, parts)
        return resolved[source, parts]

    sources: dict[FeatureName, ModelSource] = {
        "latents": settings.latents.source,
        "t5": settings.t5.text_encoder,
        "answers": settings.answers.source,
        "llm": settings.llm.source,
    }
    models: dict[FeatureName, FeatureModels] = {}
    for feature in features:
        model = resolve(sources[feature], PARTS[feature])
        if feature == "latents" and model.config.get("_class_name") != VAE_CLASS:
            raise InputError(
                f"model folder {model.folder}: config.json says {model.config.get('_class_name')!r}, "
                f"expected {VAE_CLASS!r}: give the folder of a CogVideoX VAE"
            )
        tokenizer = resolve(settings.t5.tokenizer, ("tokenizer",)) if feature == "t5" else None
        models[feature] = FeatureModels(model=model, tokenizer=tokenizer)
    return models


def feature_identity(
    feature: FeatureName,
    settings: EncodeSettings,
    geometry: Geometry,
    models: FeatureModels,
    answers: Mapping[str, JsonValue] | None = None,
) -> dict[str, JsonValue]:
    """Write down everything that changes a byte of a feature.

    Args:
        geometry: read for `latents` only: captions are encoded alike at every size.
        answers: the identity of `answers`; for `llm`.
    Returns: plain JSON. "tensors" is a list of tensor specs, for `latents` one list per bucket.
    """
    common: dict[str, JsonValue] = {"feature": feature, "version": VERSIONS[feature]}
    common["model"] = model_identity(models.model)
    if feature == "latents":
        return {**common, **_latents_settings(settings, geometry, models)}
    if feature == "t5":
        own = _t5_settings(settings, models)
    elif feature == "answers":
        own = _answers_settings(settings, models)
    else:
        assert answers is not None, "llm is made from answers: give their identity"
        own = _llm_settings(settings, models, answers)
    specs = tensor_specs(feature, settings, models.model.config, None)
    return {**common, **own, "tensors": [spec_as_json(spec) for spec in specs]}


def model_identity(model: ResolvedModel) -> dict[str, JsonValue]:
    """What names a model's bytes wherever they lie."""
    return {
        "name": model.name,
        "subfolder": model.subfolder,
        "commit": model.commit,
        "sha256": dict(model.digests),
    }


def attention_implementation(config: Mapping[str, JsonValue]) -> str:
    """The attention that the LLM runs with; chosen here, for it changes the last bits.

    Fused attention leaves out the soft cap on attention logits that Gemma 2 was trained with.
    """
    return "eager" if config.get("attn_logit_softcapping") is not None else "sdpa"


def tensor_specs(
    feature: FeatureName, settings: EncodeSettings, config: Mapping[str, JsonValue], bucket: Bucket | None
) -> tuple[TensorSpec, ...]:
    """The tensors of one clip, from the values of the model's config.json.

    Args:
        config: of the VAE, the T5 encoder or the LLM, as the feature wants it; unread for `answers`.
        bucket: for `latents`.
    Raises: InputError if config.json lacks a width, or the bucket does not divide by the VAE's compression.
    """
    if feature == "latents":
        assert bucket is not None, "latents have one shape per bucket"
        return _latents_specs(settings, config, bucket)
    if feature == "t5":
        length = settings.t5.max_length if settings.t5.rows == "all" else None
        return (
            TensorSpec(
                name="t5_embeds", dtype="bf16", dims=("L", "D"), sizes=(length, _config_value(config, "d_model"))
            ),
            TensorSpec(name="t5_ids", dtype="i32", dims=("L",), sizes=(length,)),
            TensorSpec(name="t5_offsets", dtype="i32", dims=("L", "2"), sizes=(length, 2)),
        )
    if feature == "answers":
        return ()
    width, num_instructions = _config_value(config, "hidden_size"), len(settings.answers.instructions)
    specs = [
        TensorSpec(name="query_hidden", dtype="bf16", dims=("M", "H"), sizes=(None, width)),
        TensorSpec(name="query_offsets", dtype="i32", dims=("M", "2"), sizes=(None, 2)),
    ]
    for variant in range(settings.answers.variants):
        answer, instruction = f"answer_hidden_{variant}", f"instruction_hidden_{variant}"
        specs.append(TensorSpec(name=answer, dtype="bf16", dims=("A", "H"), sizes=(None, width)))
        specs.append(TensorSpec(name=instruction, dtype="bf16", dims=("K", "H"), sizes=(num_instructions, width)))
    return tuple(specs)


def spec_as_json(spec: TensorSpec) -> dict[str, JsonValue]:
    """A tensor spec as it stands in spec.json."""
    return {
        "name": spec.name,
        "dtype": spec.dtype,
        "dims": list(spec.dims),
        "sizes": list(spec.sizes),
        "channel_dim": spec.channel_dim,
    }


def _latents_settings(settings: EncodeSettings, geometry: Geometry, models: FeatureModels) -> dict[str, JsonValue]:
    vae = settings.latents
    # the order in which buckets were typed changes nothing
    buckets = sorted(set(geometry.buckets), key=lambda b: (b.frames, b.height, b.width))
    tensors = {
        str(bucket): [spec_as_json(spec) for spec in tensor_specs("latents", settings, models.model.config, bucket)]
        for bucket in buckets
    }
    return {
        "dtype": vae.dtype,
        "engine": vae.engine,
        "engine_version": VAE_ENGINE_VERSIONS[vae.engine],
        "batch_size": vae.batch_size,
        "stored": list(vae.stored),
        # the seed changes no byte where no sample is kept
        "sample_seed": vae.seed if "sample" in vae.stored else None,
        "tiling": vae.tiling,
        "frames_per_chunk": VAE_FRAMES_PER_CHUNK,
        "geometry": {
            "buckets": [str(bucket) for bucket in buckets],
            "fps": float(geometry.fps),
            "resize_kernel": RESIZE_KERNEL,
        },
        "tensors": tensors,
    }


def _t5_settings(settings: EncodeSettings, models: FeatureModels) -> dict[str, JsonValue]:
    assert models.tokenizer is not None, "t5 has a tokenizer"
    t5 = settings.t5
    return {
        "tokenizer": model_identity(models.tokenizer),
        "dtype": t5.dtype,
        "batch_size": t5.batch_size,
        "max_length": t5.max_length,
        "rows": t5.rows,
        "attention_mask": False,
    }


def _answers_settings(settings: EncodeSettings, models: FeatureModels) -> dict[str, JsonValue]:
    answers = settings.answers
    sampling = {"temperature": float(answers.temperature), "seed": answers.seed} if answers.variants > 1 else None
    return {
        "dtype": answers.dtype,
        "engine": answers.engine,
        **_engine_settings(settings.answers, models),
        "chat_template_sha256": models.model.chat_template_sha256,
        "chat_template_arguments": dict(TEMPLATE_ARGUMENTS),
        "instruction_separator": INSTRUCTION_SEPARATOR,
        "instructions": [{"name": i.name, "text": i.text} for i in answers.instructions],
        "max_caption_tokens": answers.max_caption_tokens,
        "max_answer_tokens": answers.max_answer_tokens,
        "max_instruction_tokens": answers.max_instruction_tokens,
        "variants": answers.variants,
        # temperature and seed change no byte while every variant is greedy
        "sampling": sampling,
    }


def _engine_settings(settings: AnswersSettings | LlmSettings, models: FeatureModels) -> dict[str, JsonValue]:
    """What of an engine may change the last bits, or a choice between two tokens that are all but equal."""
    if settings.engine == "transformers":
        return {"attention": attention_implementation(models.model.config), "batch_size": settings.batch_size}
    of_vllm: dict[str, JsonValue] = {
        "version": vllm_version(),
        "tensor_parallel_size": settings.vllm.tensor_parallel_size,
        "max_num_seqs": settings.vllm.max_num_seqs,
    }
    if isinstance(settings, AnswersSettings):
        of_vllm["prefix_caching"] = settings.vllm.prefix_caching
    return {"engine_settings": of_vllm}


def _llm_settings(
    settings: EncodeSettings, models: FeatureModels, answers: Mapping[str, JsonValue]
) -> dict[str, JsonValue]:
    llm = settings.llm
    return {
        # prompts, instructions and variants are those of the answers
        "answers": fingerprint(answers),
        "dtype": llm.dtype,
        # transformers is not named: it was the only engine once, and its identity stays what it was
        **({"engine": llm.engine} if llm.engine != "transformers" else {}),
        **_engine_settings(llm, models),
        "max_caption_tokens": llm.max_caption_tokens,
        "layer": _layer_identity(llm.layer, models.model.config),
        "instruction_pooling": llm.instruction_pooling,
    }


def _layer_identity(layer: LlmLayer, config: Mapping[str, JsonValue]) -> str | int:
    """One name for each choice of rows: the number of the last layer, and -1, are "last"."""
    if isinstance(layer, str):
        return LLM_LAYER_NAMES[layer]
    last = _config_value(config, "num_hidden_layers")
    if not -last - 1 <= layer <= last:
        raise InputError(
            f"--llm-layer {layer}: the model has {last} layers; expected {-last - 1} to {last}, last or mean"
        )
    number = layer if layer >= 0 else last + 1 + layer
    return LLM_LAYER_NAMES["last"] if number == last else number


def _latents_specs(settings: EncodeSettings, config: Mapping[str, JsonValue], bucket: Bucket) -> tuple[TensorSpec, ...]:
    # the defaults are those of the class: a config.json may leave them out
    channels = int(config.get("latent_channels", 16))
    stride = 2 ** (len(config.get("block_out_channels", (128, 256, 256, 512))) - 1)
    time_stride = int(config.get("temporal_compression_ratio", 4))
    if bucket.height % stride or bucket.width % stride or (bucket.frames - 1) % time_stride:
        raise InputError(
            f"--bucket {bucket}: the VAE compresses {time_stride}x{stride}x{stride}; height and width must be "
            f"multiples of {stride}, frames one more than a multiple of {time_stride}"
        )
    frames, height, width = (bucket.frames - 1) // time_stride + 1, bucket.height // stride, bucket.width // stride
    if settings.latents.tiling:
        tiled = _tiled_latent_size(config, bucket, stride)
        if tiled != (height, width):
            raise InputError(
                f"--bucket {bucket}: tiling gives latents of {tiled[0]}x{tiled[1]} where {height}x{width} are "
                "expected, for the VAE's tiles do not meet at this size: encode it without tiling"
            )
    return tuple(
        TensorSpec(
            name=f"vae_{stored}",
            dtype="bf16",
            dims=("2C" if stored == "moments" else "C", "T", "h", "w"),
            sizes=(2 * channels if stored == "moments" else channels, frames, height, width),
            channel_dim=0,
        )
        for stored in settings.latents.stored
    )


def _tiled_latent_size(config: Mapping[str, JsonValue], bucket: Bucket, stride: int) -> tuple[int, int]:
    """Height and width of the latents that diffusers' tiled_encode puts together, by its own arithmetic."""
    tile_height, tile_width = int(config.get("sample_height", 480)) // 2, int(config.get("sample_width", 720)) // 2
    if bucket.height <= tile_height and bucket.width <= tile_width:
        return bucket.height // stride, bucket.width // stride

    def tiled(pixels: int, tile: int, overlap: float) -> int:
        latent_tile = int(tile / stride)
        kept = latent_tile - int(latent_tile * overlap)
        starts = range(0, pixels, int(tile * (1 - overlap)))
        return sum(min(kept, min(tile, pixels - start) // stride) for start in starts)

    return tiled(bucket.height, tile_height, 1 / 6), tiled(bucket.width, tile_width, 1 / 5)


def _config_value(config: Mapping[str, JsonValue], field: str) -> int:
    # models that read more than text keep their language model's values one level down
    text_config = config.get("text_config")
    value = config.get(field, text_config.get(field) if isinstance(text_config, Mapping) else None)
    if not isinstance(value, int):
        raise InputError(f"a model's config.json has no {field}: it is not of the kind that this feature needs")
    return value
