"""From the options of the command line, checked, to one call of the work."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mimir_precompute.clip_list import read_clip_list
from mimir_precompute.config import (
    AnswersSettings,
    ComputeDType,
    EncodeSettings,
    LlmSettings,
    ModelSource,
    StoredLatents,
    T5Settings,
    VaeEngine,
    VaeSettings,
)
from mimir_precompute.device import choose_device
from mimir_precompute.messages import describe_plan
from mimir_precompute.pipeline import EncodeJob, EncodeOutcome, encode_cache
from mimir_precompute.plan import PlanReport, PlanRequest, geometry_of, update_plan
from mimir_precompute.presets import PRESETS, Preset, find_preset
from mimir_precompute.termination import leave_on_sigterm
from mimir_shared.errors import CacheError, InputError
from mimir_shared.feature_folder import find_features, select_features
from mimir_shared.features import FEATURES, FeatureName
from mimir_shared.plan_file import Plan, read_plan
from mimir_shared.snapshot import Snapshot, write_snapshot
from mimir_shared.storage import LocalStorage, open_storage


@dataclass(frozen=True, kw_only=True)
class EncodeRequest:
    """The options of `encode`, as typed."""

    clips: str | None
    cache: str
    shards: str
    features: str
    plan: PlanRequest
    limit: int | None
    video_key: str
    caption_key: str
    models: str | None
    vae: str | None
    t5: str | None
    llm: str | None
    dtype: str | None
    stored_latents: str
    vae_tiling: bool
    vae_engine: str
    t5_rows: str
    answer_variants: int
    output_format: str
    device: str
    decode_workers: int
    max_quarantined: float
    on_mismatch: str


def run_plan(
    clips: str,
    cache: str,
    request: PlanRequest,
    video_key: str,
    caption_key: str,
    limit: int | None,
    *,
    dry_run: bool = False,
) -> tuple[Plan | None, PlanReport]:
    """Read the list of clips and bring the plan of a cache up to it."""
    storage = open_storage(cache)
    existing = read_plan(storage) if storage.list("plan") else None
    if existing is None:
        request.geometry()  # wrong options are told before a long list is read
    listed = read_clip_list(clips, video_key=video_key, caption_key=caption_key, limit=limit)
    if not dry_run:
        storage.check_writable()
    return update_plan(storage, existing, listed, request, dry_run=dry_run)


def run_encode(request: EncodeRequest) -> EncodeOutcome:
    """Check every option, plan where clips are given, and encode."""
    from mimir_precompute.model_encoders import ModelEncoders
    from mimir_precompute.progress import Progress
    from mimir_precompute.provenance import RunLog

    features = parse_features(request.features)
    on_mismatch: Literal["error", "new"] = parse_choice("--on-mismatch", request.on_mismatch, ("error", "new"))
    parse_choice("--format", request.output_format, ("webdataset",))
    device = choose_device(request.device)
    storage = open_storage(request.cache)
    progress = Progress()
    plan = _plan_for(request, storage, progress)
    shards = parse_shards(request.shards, plan.num_shards)
    preset = find_preset(plan.settings.preset) if plan.settings.preset else None
    settings = encode_settings(request, preset, features, device)
    storage.check_writable()
    encoders = ModelEncoders(settings, geometry_of(plan.settings))
    encoders.resolve(_with_dependencies(features))
    job = EncodeJob(
        storage=storage,
        plan=plan,
        encoders=encoders,
        shards=shards,
        features=features,
        on_mismatch=on_mismatch,
        max_quarantined=request.max_quarantined,
        decode_workers=request.decode_workers,
    )
    with leave_on_sigterm(storage):
        return encode_cache(job, progress, RunLog(storage, device))


def _plan_for(request: EncodeRequest, storage: LocalStorage, progress: Any) -> Plan:
    if request.clips is None:
        plan = read_plan(storage)
        asked = request.plan
        if asked.preset is not None and asked.preset != plan.settings.preset:
            raise CacheError(f"{storage.root}: planned with --preset {plan.settings.preset}, not {asked.preset}")
        if asked.buckets or asked.fps or asked.shard_size or asked.seed is not None or request.limit:
            raise InputError("--bucket, --fps, --shard-size, --seed and --limit plan anew: give CLIPS with them")
        return plan
    updated, report = run_plan(
        request.clips, request.cache, request.plan, request.video_key, request.caption_key, request.limit
    )
    assert updated is not None, "planning without --dry-run gives a plan"
    progress.say(describe_plan(report))
    return updated


def _with_dependencies(features: Sequence[FeatureName]) -> tuple[FeatureName, ...]:
    return tuple(f for f in FEATURES if f in features or (f == "answers" and "llm" in features))


def parse_features(text: str) -> tuple[FeatureName, ...]:
    """Read "latents,t5"; in the order in which features are made. Raises InputError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in FEATURES]
    if unknown or not names:
        raise InputError(f"--features {text!r}: {(unknown or ['nothing'])[0]!r} is none of {', '.join(FEATURES)}")
    return tuple(feature for feature in FEATURES if feature in names)


def parse_choice(option: str, value: str, choices: Sequence[str]) -> Any:
    """Return a value that is one of `choices`. Raises InputError that lists them."""
    if value not in choices:
        raise InputError(f"{option} {value!r}: expected one of {', '.join(choices)}")
    return value


def parse_shards(text: str, num_shards: int) -> tuple[int, ...]:
    """Read "all", "0-63", "3,17", "2::8" (start:stop:step) or such joined by commas.

    Raises: InputError for what is none of these, and for shards that the plan does not have.
    """
    if text == "all":
        return tuple(range(num_shards))
    chosen: set[int] = set()
    for part in text.split(","):
        numbers: Sequence[int]
        try:
            if ":" in part:
                pieces = [int(piece) if piece else None for piece in part.split(":")]
                if len(pieces) > 3 or any(piece is not None and piece < 0 for piece in pieces):
                    raise ValueError(part)
                numbers = range(num_shards)[slice(*pieces)]
                if pieces[0] is not None and pieces[0] >= num_shards:
                    numbers = [pieces[0]]
            elif "-" in part:
                first, last = (int(piece) for piece in part.split("-"))
                numbers = range(first, last + 1)
                if not numbers:
                    raise ValueError(part)
            else:
                numbers = [int(part)]
        except ValueError as fault:
            raise InputError(
                f"--shards {text!r}: {part!r} is not understood; expected all, 0-63, 3,17 or 2::8 (start:stop:step)"
            ) from fault
        for outside in (n for n in (min(numbers), max(numbers)) if not 0 <= n < num_shards):
            raise InputError(f"--shards {text!r}: no shard {outside}; the plan has shards 0 to {num_shards - 1}")
        chosen.update(numbers)
    return tuple(sorted(chosen))


def encode_settings(
    request: EncodeRequest, preset: Preset | None, features: Sequence[FeatureName], device: str
) -> EncodeSettings:
    """Every encoder's settings: what was typed, else what the preset has. Raises InputError for what is missing."""
    dtype: ComputeDType = (
        parse_choice("--dtype", request.dtype, get_args(ComputeDType))
        if request.dtype is not None
        else (preset.dtype if preset else "bfloat16")
    )
    stored: tuple[StoredLatents, ...] = tuple(
        parse_choice("--latents", name, get_args(StoredLatents)) for name in request.stored_latents.split(",")
    )
    parse_choice("--t5-rows", request.t5_rows, ("all", "ragged"))
    sizes = preset or PRESETS["cogvideox-5b"]
    vae = model_source(request, preset, "vae", "latents" in features)
    llm = model_source(request, preset, "llm", "llm" in features or "answers" in features)
    return EncodeSettings(
        latents=VaeSettings(
            source=vae,
            dtype=dtype,
            stored=tuple(dict.fromkeys(stored)),
            tiling=request.vae_tiling,
            engine=parse_choice("--vae-engine", request.vae_engine, get_args(VaeEngine)),
        ),
        t5=T5Settings(
            text_encoder=model_source(request, preset, "text_encoder", "t5" in features),
            tokenizer=model_source(request, preset, "tokenizer", "t5" in features),
            dtype=dtype,
            max_length=sizes.t5_max_length,
            rows="ragged" if request.t5_rows == "ragged" else "all",
        ),
        answers=AnswersSettings(
            source=llm,
            dtype=dtype,
            max_caption_tokens=sizes.max_caption_tokens,
            max_answer_tokens=sizes.max_answer_tokens,
            max_instruction_tokens=sizes.max_instruction_tokens,
            variants=request.answer_variants,
        ),
        llm=LlmSettings(source=llm, dtype=dtype, max_caption_tokens=sizes.max_caption_tokens),
        device=device,
    )


def model_source(
    request: EncodeRequest,
    preset: Preset | None,
    part: Literal["vae", "text_encoder", "tokenizer", "llm"],
    needed: bool,
) -> ModelSource:
    """Where one model lies: its own option, else --models, else the preset's hub id."""
    own = {"vae": request.vae, "text_encoder": request.t5, "tokenizer": request.t5, "llm": request.llm}[part]
    option = {"vae": "--vae", "text_encoder": "--t5", "tokenizer": "--t5", "llm": "--llm"}[part]
    default = (preset.llm if part == "llm" else preset.models) if preset else None
    together = request.models if part != "llm" or _has_folder(request.models, "llm") else None
    name = own or together or default
    if name is None:
        if not needed:
            return ModelSource(name="")
        raise InputError(
            f"no {part.replace('_', ' ')}: give {option} (a folder or hub id) or --models (a folder with vae, "
            f"text_encoder, tokenizer and llm)"
        )
    # The folder or repository of one model alone is taken as it is, a pipeline's by its part.
    alone = part == "llm" and (own is not None or together is None)
    alone = alone or (own is not None and Path(own).is_dir() and not (Path(own) / part).is_dir())
    return ModelSource(name=name, subfolder="" if alone else part)


def _has_folder(models: str | None, part: str) -> bool:
    return models is not None and (Path(models) / part).is_dir()


def parse_feature_choices(wanted: Sequence[str]) -> dict[str, str]:
    """Read "llm=1a2b3c…" options. Raises InputError."""
    choices: dict[str, str] = {}
    for text in wanted:
        name, _, fingerprint = text.partition("=")
        if name not in FEATURES or not fingerprint:
            raise InputError(f"--feature {text!r}: expected NAME=FINGERPRINT, for instance llm=1a2b3c4d5e6f")
        choices[name] = fingerprint
    return choices


def run_finalize(cache: str, wanted: Sequence[str]) -> Snapshot:
    """Write a snapshot of the complete cache. Raises InputError where it is not complete."""
    storage = open_storage(cache)
    plan = read_plan(storage)
    choices = parse_feature_choices(wanted)
    storage.check_writable()
    return write_snapshot(storage, plan, select_features(storage, choices))


def run_inspect(
    cache: str, key: str, video: Path | None, *, models: str | None, vae: str | None, device: str
) -> dict[str, Any]:
    """Describe one clip; decode its latents to `video` if that is given."""
    from mimir_precompute.inspect_clip import describe_clip, posterior_mean, read_clip_tensors, write_video

    storage = open_storage(cache)
    described = describe_clip(storage, key)
    if video is not None:
        from mimir_precompute.decode_latents import load_decoder

        plan = read_plan(storage)
        preset = find_preset(plan.settings.preset) if plan.settings.preset else None
        tensors = read_clip_tensors(storage, key, "latents")
        (spec, *_) = [folder.read_spec() for folder in find_features(storage) if folder.feature == "latents"]
        name = vae or models or (preset.models if preset else None)
        if name is None:
            raise InputError("--video decodes with the VAE that encoded: give --models or --vae")
        alone = vae is not None and Path(vae).is_dir() and not (Path(vae) / "vae").is_dir()
        source = ModelSource(name=name, subfolder="" if alone else "vae")
        decoder = load_decoder(source, spec.identity, choose_device(device))
        write_video(video, decoder.decode_latents(posterior_mean(tensors)), plan.settings.fps)
    return described
