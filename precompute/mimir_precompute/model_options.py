"""Which models a command loads and what they are to do: from the options, as typed, to every encoder's settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from mimir_precompute.config import (
    DEFAULT_INSTRUCTIONS,
    AnswersSettings,
    ComputeDType,
    EncodeSettings,
    InstructionPooling,
    LlmEngineName,
    LlmLayer,
    LlmSettings,
    ModelOptions,
    ModelSource,
    StoredLatents,
    T5Settings,
    VaeEngine,
    VaeSettings,
    VllmSettings,
)
from mimir_precompute.encoders.vllm_process import require_vllm, vllm_version
from mimir_precompute.instruction_file import read_instructions
from mimir_precompute.model_files import is_hub_id
from mimir_precompute.option_values import parse_choice
from mimir_precompute.presets import PRESETS, Preset
from mimir_shared.errors import InputError
from mimir_shared.features import FeatureName


def encode_settings(
    options: ModelOptions, preset: Preset | None, features: Sequence[FeatureName], device: str
) -> EncodeSettings:
    """Every encoder's settings: what was typed, else what the preset has. Raises InputError for what is missing."""
    dtype: ComputeDType = (
        parse_choice("--dtype", options.dtype, get_args(ComputeDType))
        if options.dtype is not None
        else (preset.dtype if preset else "bfloat16")
    )
    stored: tuple[StoredLatents, ...] = tuple(
        parse_choice("--latents", name, get_args(StoredLatents)) for name in options.stored_latents.split(",")
    )
    parse_choice("--t5-rows", options.t5_rows, ("all", "ragged"))
    sizes = preset or PRESETS["cogvideox-5b"]
    vllm = VllmSettings(
        tensor_parallel_size=options.llm_tensor_parallel, gpu_memory_utilization=options.llm_memory_share
    )
    vae = model_source(options, preset, "vae", "latents" in features)
    llm = model_source(options, preset, "llm", "llm" in features or "answers" in features)
    return EncodeSettings(
        latents=VaeSettings(
            source=vae,
            dtype=dtype,
            stored=tuple(dict.fromkeys(stored)),
            tiling=options.vae_tiling,
            engine=parse_choice("--vae-engine", options.vae_engine, get_args(VaeEngine)),
        ),
        t5=T5Settings(
            text_encoder=model_source(options, preset, "text_encoder", "t5" in features),
            tokenizer=model_source(options, preset, "tokenizer", "t5" in features),
            dtype=dtype,
            max_length=sizes.t5_max_length,
            rows="ragged" if options.t5_rows == "ragged" else "all",
        ),
        answers=AnswersSettings(
            source=llm,
            dtype=dtype,
            max_caption_tokens=sizes.max_caption_tokens,
            max_answer_tokens=sizes.max_answer_tokens,
            max_instruction_tokens=sizes.max_instruction_tokens,
            engine=choose_engine(options.llm_engine, device),
            vllm=vllm,
            variants=options.answer_variants,
            instructions=read_instructions(options.instructions) if options.instructions else DEFAULT_INSTRUCTIONS,
        ),
        llm=LlmSettings(
            source=llm,
            dtype=dtype,
            max_caption_tokens=sizes.max_caption_tokens,
            layer=parse_layer(options.llm_layer),
            instruction_pooling=parse_choice(
                "--instruction-pooling", options.instruction_pooling, get_args(InstructionPooling)
            ),
            engine=_hidden_engine(options.llm_hidden_engine),
            vllm=vllm,
        ),
        device=device,
    )


def choose_engine(text: str, device: str) -> LlmEngineName:
    """Read "auto", "vllm" or "transformers"; auto: vLLM on a GPU where it is installed. Raises InputError."""
    parse_choice("--llm-engine", text, ("auto", *get_args(LlmEngineName)))
    if text == "vllm":
        require_vllm("--llm-engine")
    if text == "vllm" or (text == "auto" and device.startswith("cuda") and vllm_version() is not None):
        return "vllm"
    return "transformers"


def _hidden_engine(text: str) -> LlmEngineName:
    engine: LlmEngineName = parse_choice("--llm-hidden-engine", text, get_args(LlmEngineName))
    if engine == "vllm":
        require_vllm("--llm-hidden-engine")
    return engine


def parse_layer(text: str) -> LlmLayer:
    """Read "last", "mean" or a number. Raises InputError."""
    layers: dict[str, LlmLayer] = {"last": "last", "mean": "mean"}
    try:
        return layers[text] if text in layers else int(text)
    except ValueError as fault:
        raise InputError(f"--llm-layer {text!r}: expected last, mean or the number of a layer") from fault


def model_source(
    options: ModelOptions,
    preset: Preset | None,
    part: Literal["vae", "text_encoder", "tokenizer", "llm"],
    needed: bool,
) -> ModelSource:
    """Where one model lies: its own option, else --models, else the preset's hub id."""
    refuse_missing_models(options.models)
    own = {"vae": options.vae, "text_encoder": options.t5, "tokenizer": options.t5, "llm": options.llm}[part]
    option = {"vae": "--vae", "text_encoder": "--t5", "tokenizer": "--t5", "llm": "--llm"}[part]
    default = (preset.llm if part == "llm" else preset.models) if preset else None
    together = options.models if part != "llm" or _has_folder(options.models, "llm") else None
    name = own or together or default
    if name is None:
        if not needed:
            return ModelSource(name="")
        if options.models is not None:
            raise InputError(
                f"no {part}: --models {options.models} is {_kind(options.models)}; "
                f"give {option} (a folder or hub id), or --models with a folder that has one"
            )
        raise InputError(
            f"no {part.replace('_', ' ')}: give {option} (a folder or hub id) or --models (a folder with vae, "
            f"text_encoder, tokenizer and llm)"
        )
    # The folder or repository of one model alone is taken as it is, a pipeline's by its part.
    alone = part == "llm" and (own is not None or together is None)
    alone = alone or (own is not None and Path(own).is_dir() and not (Path(own) / part).is_dir())
    return ModelSource(name=name, subfolder="" if alone else part)


def _has_folder(models: str | None, part: str) -> bool:
    return models is not None and (Path(models).expanduser() / part).is_dir()


def _kind(models: str) -> str:
    return (
        "a folder without llm in it"
        if Path(models).expanduser().is_dir()
        else "no folder here, and a hub id stands for no llm"
    )


def refuse_missing_models(models: str | None) -> None:
    """Raise InputError where --models is neither a folder nor a hub id."""
    if models is not None and not Path(models).expanduser().is_dir() and not is_hub_id(models):
        raise InputError(
            f"--models {models}: no such folder; expected a folder with vae, text_encoder, tokenizer and llm, or a "
            f"hub id (owner/name)"
        )
