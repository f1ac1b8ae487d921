"""What encoding a list of clips will cost before it costs anything: bytes, operations and hours on a named GPU.

Sizes follow from the geometry and the models' configs. Lengths of texts are not known before a tokenizer has read
them, so every caption and answer counts as long as it may be: what rests on that is marked `at_most`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from mimir_precompute.config import Bucket, EncodeSettings, Geometry, ModelOptions, VllmSettings
from mimir_precompute.encoders.prompts import INSTRUCTION_SEPARATOR
from mimir_precompute.identity import tensor_specs
from mimir_precompute.model_options import encode_settings
from mimir_precompute.planning.model_sizes import sized_model
from mimir_precompute.planning.text_roofline import LlmSize, T5Size
from mimir_precompute.planning.vae_roofline import layer_costs
from mimir_precompute.presets import Preset
from mimir_shared.features import FEATURES, NUMPY_DTYPES, FeatureName
from mimir_shared.gpus import Gpu
from mimir_shared.transformer_flops import TransformerSizes, training_flops

TEMPLATE_TOKENS: Final = 8
"""Of a chat template around the user's turn; Phi-3.5 writes 7."""
_CHARACTERS_A_TOKEN: Final = 4
"""Of English text, about: for the instructions, which are few and short."""
_BYTES_BESIDE_TENSORS: Final = 2500
"""Of a clip in a tar: two headers of 512 bytes, padding to blocks of 512, key, caption and tensor names."""
_JSON_BYTES_A_TOKEN: Final = 12
"""Of an answer: its text, and the number of each token on a line of its own."""


@dataclass(frozen=True, kw_only=True)
class FeatureEstimate:
    """One feature, for one clip and for all."""

    feature: FeatureName
    model: str
    bytes_per_clip: int
    bytes: int
    flops_per_clip: int
    gpu_hours: float
    at_most: bool
    """Whether bytes and operations depend on the lengths of texts, which count as long as they may be."""


@dataclass(frozen=True, kw_only=True)
class TrainingEstimate:
    """Training on the same clips, a forward and a backward pass of the transformer for each."""

    model: str
    flops_per_clip: int
    gpu_hours_per_epoch: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """`plan --json`, under "estimate"."""

    clips: int
    """All of the list, whatever is encoded already."""
    new_clips: int
    """Of these, clips that the plan does not have yet, or that changed."""
    bucket: str
    """The largest: every clip counts as one of it."""
    gpu: str
    peak_tflops: float
    """10^12 operations a second in dense bfloat16, by the data sheet."""
    utilisation: float
    """Share of the data sheet's operations and bytes a second that is reached."""
    features: tuple[FeatureEstimate, ...]
    bytes: int
    gpu_hours: float
    new_gpu_hours: float
    saved_gpu_hours_per_epoch: float
    """What training without a cache would pay for the encoders again, every epoch."""
    training: TrainingEstimate


@dataclass(frozen=True, kw_only=True)
class _Cost:
    """Of one feature of one clip."""

    flops: int
    stored_bytes: int
    traffic_bytes: int = 0
    """Memory that is moved while no batch hides it: writing answers token by token."""
    at_most: bool = False


@dataclass(frozen=True, kw_only=True)
class EstimateRequest:
    """What an estimate is made for."""

    geometry: Geometry
    preset: Preset | None
    options: ModelOptions
    gpu: Gpu
    utilisation: float


def estimate_encoding(request: EstimateRequest, *, clips: int, new_clips: int) -> Estimate:
    """Raises UnknownSizeError where a model's size is not known here."""
    settings = encode_settings(request.options, request.preset, (), "cpu")
    bucket = max(request.geometry.buckets, key=lambda b: b.frames * b.height * b.width)
    models = {
        "latents": sized_model(request.options, request.preset, "vae"),
        "t5": sized_model(request.options, request.preset, "text_encoder"),
        "llm": sized_model(request.options, request.preset, "llm"),
    }
    models["answers"] = models["llm"]
    features = []
    for feature in FEATURES:
        cost = _clip_cost(feature, models[feature].config, settings, bucket)
        features.append(
            FeatureEstimate(
                feature=feature,
                model=models[feature].name,
                bytes_per_clip=cost.stored_bytes,
                bytes=cost.stored_bytes * clips,
                flops_per_clip=cost.flops,
                gpu_hours=clips * _seconds(cost, request) / 3600,
                at_most=cost.at_most,
            )
        )
    hours = sum(feature.gpu_hours for feature in features)
    return Estimate(
        clips=clips,
        new_clips=new_clips,
        bucket=str(bucket),
        gpu=request.gpu.name,
        peak_tflops=request.gpu.peak_tflops,
        utilisation=request.utilisation,
        features=tuple(features),
        bytes=sum(feature.bytes for feature in features),
        gpu_hours=hours,
        new_gpu_hours=hours * new_clips / clips if clips else 0.0,
        saved_gpu_hours_per_epoch=hours,
        training=_estimate_training(request, models["latents"].config, settings, bucket, clips),
    )


def _estimate_training(
    request: EstimateRequest, vae: Mapping[str, Any], settings: EncodeSettings, bucket: Bucket, clips: int
) -> TrainingEstimate:
    model = sized_model(request.options, request.preset, "transformer")
    latents = tensor_specs("latents", settings, vae, bucket)[0]
    _, frames, height, width = (int(size or 0) for size in latents.sizes)
    text_tokens = settings.t5.max_length + len(settings.answers.instructions)
    flops = training_flops(transformer_sizes(model.config), (frames, height, width), text_tokens)
    hours = clips * _seconds(_Cost(flops=flops, stored_bytes=0), request) / 3600
    return TrainingEstimate(model=model.name, flops_per_clip=flops, gpu_hours_per_epoch=hours)


def transformer_sizes(config: Mapping[str, Any]) -> TransformerSizes:
    """From a CogVideoX transformer's config.json, which may leave out what is 2B's."""
    names = {"num_layers": 30, "time_embed_dim": 512, "in_channels": 16, "out_channels": 16, "patch_size": 2}
    return TransformerSizes(
        width=int(config.get("num_attention_heads", 30)) * int(config.get("attention_head_dim", 64)),
        text_width=int(config.get("text_embed_dim", 4096)),
        **{name: int(config.get(name) or default) for name, default in names.items()},
    )


def _seconds(cost: _Cost, request: EstimateRequest) -> float:
    """Of one GPU for one clip: the longer of arithmetic and what memory must move."""
    gpu, share = request.gpu, request.utilisation
    return max(cost.flops / (gpu.peak_tflops * 1e12), cost.traffic_bytes / gpu.peak_bytes_per_s) / share


def _clip_cost(feature: FeatureName, config: Mapping[str, Any], settings: EncodeSettings, bucket: Bucket) -> _Cost:
    longest = {"L": settings.t5.max_length, "M": settings.answers.max_caption_tokens,
               "A": settings.answers.max_answer_tokens}  # fmt: skip
    specs = tensor_specs(feature, settings, config, bucket)
    tensors = sum(
        prod(longest[dim] if size is None else size for dim, size in zip(spec.dims, spec.sizes, strict=True))
        * NUMPY_DTYPES[spec.dtype].itemsize
        for spec in specs
    )
    stored = tensors + _BYTES_BESIDE_TENSORS
    ragged = any(size is None for spec in specs for size in spec.sizes)
    if feature == "latents":
        return _Cost(flops=sum(layer.flops for layer in layer_costs(config, bucket, 2)), stored_bytes=stored)
    if feature == "t5":
        flops = T5Size.of(config).encode_flops(settings.t5.max_length)
        return _Cost(flops=flops, stored_bytes=stored, at_most=ragged)
    llm, asked = LlmSize.of(config), _prompts(settings)
    variants = settings.answers.variants
    if feature == "answers":
        batch = VllmSettings().max_num_seqs
        return _Cost(
            flops=variants * sum(llm.answer_flops(prompt, new) for prompt, new in asked),
            traffic_bytes=variants
            * sum(llm.answer_traffic_bytes(prompt, new, sequences=batch) for prompt, new in asked),
            stored_bytes=stored + variants * sum(new for _, new in asked) * _JSON_BYTES_A_TOKEN,
            at_most=True,
        )
    flops = variants * sum(llm.prefill_flops(prompt + new) for prompt, new in asked)
    return _Cost(flops=flops, stored_bytes=stored, at_most=True)


def _prompts(settings: EncodeSettings) -> Sequence[tuple[int, int]]:
    """(tokens of the prompt, tokens of the answer) of the caption alone and of each instruction, at their longest."""
    answers = settings.answers
    caption = TEMPLATE_TOKENS + answers.max_caption_tokens
    lengths = [len(INSTRUCTION_SEPARATOR + i.text) for i in answers.instructions]
    asked = [(caption + -(-length // _CHARACTERS_A_TOKEN), answers.max_instruction_tokens) for length in lengths]
    return [(caption, answers.max_answer_tokens), *asked]
