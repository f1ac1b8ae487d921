"""From the options of the command line, checked, to one call of the work."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mimir_precompute.cli.messages import describe_plan
from mimir_precompute.clips.clip_list import read_clip_list
from mimir_precompute.config import DecodeLimits, ModelOptions, TeamOptions
from mimir_precompute.device import choose_device
from mimir_precompute.model_files import refuse_missing_folder
from mimir_precompute.model_options import encode_settings, model_source
from mimir_precompute.open_encoders import open_encoders, with_dependencies
from mimir_precompute.option_values import (
    parse_choice,
    parse_feature_choices,
    parse_features,
    parse_shards,
    read_numbers,
)
from mimir_precompute.pipeline import EncodeOutcome, encode_cache
from mimir_precompute.planning.plan import PlanReport, PlanRequest, update_plan
from mimir_precompute.presets import find_preset
from mimir_precompute.quarantine import refuse_large_share, unusable_clips
from mimir_precompute.termination import working_on
from mimir_shared.errors import CacheError, InputError
from mimir_shared.feature_folder import select_features
from mimir_shared.features import FeatureName
from mimir_shared.manifest import CacheFormat
from mimir_shared.plan_file import Plan, read_plan
from mimir_shared.snapshot import Snapshot, incomplete_shards, write_snapshot
from mimir_shared.storage.open import open_storage
from mimir_shared.storage.protocol import Storage

if TYPE_CHECKING:
    from mimir_precompute.team.slurm import SlurmTask
    from mimir_precompute.team.worker_task import WorkerTask


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
    models: ModelOptions
    output_format: str | None
    decode_workers: int | None
    """Of all workers on this machine; None: two for each, as far as there are cores."""
    decode_limits: DecodeLimits
    max_quarantined: float
    accept_quarantine: bool
    on_mismatch: str
    team: TeamOptions = field(default_factory=TeamOptions)


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
    with ExitStack() as stack:
        if not dry_run:
            stack.callback(storage.tidy)
            storage.check_writable()
        return update_plan(storage, existing, listed, request, dry_run=dry_run)


def run_encode(request: EncodeRequest) -> EncodeOutcome:
    """Check every option, plan where clips are given, and encode."""
    from mimir_precompute.decoding.sandbox import DecodeSandbox
    from mimir_precompute.provenance import RunLog
    from mimir_precompute.team.crowd import WATCH_AT_MOST, encode_in_crowd, pause_before_start
    from mimir_precompute.team.encode_team import choose_team, encode_together
    from mimir_precompute.team.slurm import device_of_task, slurm_task
    from mimir_precompute.team.worker_task import make_job
    from mimir_precompute.workers.progress import Progress

    features = parse_features(request.features)
    slurm = slurm_task(request.shards, only_own_shards=request.team.only_own_shards)
    if slurm is not None:
        device_text = device_of_task(slurm, request.models.device, request.team)
        request = replace(request, shards="all", models=replace(request.models, device=device_text))
        pause_before_start(slurm.count)
    team = choose_team(request.team, request.models, features, request.decode_workers)
    device = team.devices[0]
    make_task = _task_maker(request, features, slurm, decode_workers=team.decoders[0])
    storage = open_storage(request.cache)
    progress = Progress(watch=slurm is None or slurm.count <= WATCH_AT_MOST)
    _check_before_planning(request, storage, features, device)
    plan = _plan_for(request, storage, progress)
    task = make_task(plan.num_shards)
    with working_on(storage):
        storage.check_writable()
        encoders = open_encoders(plan, request.models, features, device=device)
        with closing(DecodeSandbox(request.decode_limits)) as decoder:
            job = make_job(task, storage, plan, encoders, decoder)
            if not team.is_one:
                return encode_together(job, task, team)
            encode = encode_cache if task.crowd == 1 else encode_in_crowd
            return encode(job, progress, RunLog(storage, device))


def _task_maker(
    request: EncodeRequest, features: tuple[FeatureName, ...], slurm: "SlurmTask | None", *, decode_workers: int
) -> "Callable[[int], WorkerTask]":
    """Check what is left to check of a request; the rest of its task follows from the number of shards."""
    from mimir_precompute.team.worker_task import WorkerTask

    on_mismatch: Literal["error", "new"] = parse_choice("--on-mismatch", request.on_mismatch, ("error", "new"))
    data_format: CacheFormat | None = None
    if request.output_format is not None:
        data_format = parse_choice("--format", request.output_format, get_args(CacheFormat))

    def make_task(num_shards: int) -> WorkerTask:
        own_shards = () if slurm is None else slurm.own_shards(num_shards)
        return WorkerTask(
            cache=request.cache,
            models=request.models,
            features=features,
            shards=own_shards if request.team.only_own_shards else parse_shards(request.shards, num_shards),
            begin_with=frozenset(own_shards),
            crowd=1 if slurm is None else slurm.count,
            data_format=data_format,
            on_mismatch=on_mismatch,
            decode_workers=decode_workers,
            decode_limits=request.decode_limits,
            max_quarantined=request.max_quarantined,
            accept_quarantine=request.accept_quarantine,
        )

    return make_task


def _check_before_planning(
    request: EncodeRequest, storage: Storage, features: Sequence[FeatureName], device: str
) -> None:
    """Raise InputError for options that cannot be right, while nothing is listed or written yet."""
    read_numbers("--shards ", request.shards)
    planned = read_plan(storage).settings.preset if storage.list("plan") else request.plan.preset
    if request.clips is None or (planned is None and not request.plan.buckets):
        return  # there is no plan, or nothing to plan by: told by whoever reads or makes it
    settings = encode_settings(request.models, find_preset(planned) if planned else None, features, device)
    wanted = with_dependencies(features)
    sources = {
        "latents": (settings.latents.source,),
        "t5": (settings.t5.text_encoder, settings.t5.tokenizer),
        "answers": (settings.answers.source,),
        "llm": (settings.llm.source,),
    }
    for source in (source for feature in wanted for source in sources[feature]):
        refuse_missing_folder(source)


def _plan_for(request: EncodeRequest, storage: Storage, progress: Any) -> Plan:
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


def run_finalize(cache: str, wanted: Sequence[str], max_quarantined: float) -> Snapshot:
    """Write a snapshot of the complete cache.

    Raises: InputError where it is not complete, TooManyQuarantinedError where it lacks too large a share of the clips.
    """
    storage = open_storage(cache)
    plan = read_plan(storage)
    choices = parse_feature_choices(wanted)
    with ExitStack() as stack:
        stack.callback(storage.tidy)
        storage.check_writable()
        folders, shards = select_features(storage, choices), range(plan.num_shards)
        if not incomplete_shards(plan, folders.values()):
            unusable = unusable_clips(plan, folders.values())
            refuse_large_share(storage.root, plan, shards, unusable, max_quarantined)
        return write_snapshot(storage, plan, folders)


def run_inspect(
    cache: str,
    key: str,
    video: Path | None,
    *,
    models: str | None,
    vae: str | None,
    device: str,
    wanted: Sequence[str] = (),
) -> dict[str, Any]:
    """Describe one clip; decode its latents to `video` if that is given.

    Args:
        wanted: "NAME=FINGERPRINT" each; that of `latents` is decoded.
    """
    from mimir_precompute.inspection.clip_facts import describe_clip
    from mimir_precompute.inspection.find_clip import find_clip, find_sample, posterior_mean, write_video

    choices = parse_feature_choices(wanted)
    storage = open_storage(cache)
    described = describe_clip(storage, key)
    if video is not None:
        from mimir_precompute.inspection.latent_decoder import load_decoder

        plan = read_plan(storage)
        preset = find_preset(plan.settings.preset) if plan.settings.preset else None
        folder, record, sample = find_sample(storage, find_clip(plan, key), "latents", choices.get("latents", ""))
        _, tensors = folder.read_sample(record, sample)
        source = model_source(ModelOptions(models=models, vae=vae), preset, "vae", True)
        decoder = load_decoder(source, folder.read_spec().identity, choose_device(device))
        write_video(video, decoder.decode_latents(posterior_mean(tensors)), plan.settings.fps)
    return described
