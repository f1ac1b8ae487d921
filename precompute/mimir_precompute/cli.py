"""mimir-precompute: parses the command line and calls one function. Nothing heavy is imported up here."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mimir_shared.command_line import echo, make_app, run_app

if TYPE_CHECKING:
    from mimir_precompute.plan import PlanRequest

app = make_app(
    "Encode text-to-video training data once, into a cache that is resumable, verifiable and portable.\n\n"
    "First steps: `mimir-precompute toy DIR`, then `mimir-precompute encode DIR/clips --cache CACHE "
    "--models DIR/models --preset tiny --shards all`."
)

_WHAT = "What is encoded"
_MODELS = "Models"
_WHERE = "How it is run"

Clips = Annotated[
    str,
    typer.Argument(
        help="A JSONL, CSV or Parquet file; a folder with metadata.jsonl/.csv/.parquet or a .txt beside each video; "
        "WebDataset tars (a file, a folder, or a quoted glob).",
        show_default=False,
    ),
]
Cache = Annotated[str, typer.Option(help="Folder of the cache.", show_default=False)]
CacheArgument = Annotated[str, typer.Argument(metavar="CACHE", help="Folder of the cache.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
PresetOption = Annotated[
    str | None,
    typer.Option("--preset", help="tiny, cogvideox-2b or cogvideox-5b: geometry, models and text lengths.",
                 rich_help_panel=_WHAT, show_default=False),
]  # fmt: skip
BucketOption = Annotated[
    list[str] | None,
    typer.Option("--bucket", help="Frames x height x width, e.g. 49x480x720; repeatable. A clip goes to the largest "
                 "that it fills.", rich_help_panel=_WHAT, show_default=False),
]  # fmt: skip
FpsOption = Annotated[
    float | None,
    typer.Option(help="Frames a second at which clips are sampled, by time stamp.", rich_help_panel=_WHAT,
                 show_default=False),
]  # fmt: skip
ShardSizeOption = Annotated[
    int | None, typer.Option(help="Clips in a shard; default: 256", rich_help_panel=_WHAT, show_default=False)
]
SeedOption = Annotated[
    int | None,
    typer.Option(help="Of the shuffle of clips into shards; default: 0", rich_help_panel=_WHAT, show_default=False),
]
LimitOption = Annotated[
    int | None, typer.Option(help="Take the first so many clips.", rich_help_panel=_WHAT, show_default=False)
]
VideoKeyOption = Annotated[str, typer.Option(help="Column of the video's path.", rich_help_panel=_WHAT)]
CaptionKeyOption = Annotated[str, typer.Option(help="Column of the caption.", rich_help_panel=_WHAT)]
RemovalsOption = Annotated[
    bool, typer.Option("--accept-removals", help="Allow more than half of the planned clips to be gone from the list.",
                       rich_help_panel=_WHAT)
]  # fmt: skip


@app.command()
def toy(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write to.", show_default=False)],
    clips: Annotated[int, typer.Option(help="How many clips.", min=1)] = 24,
    seed: Annotated[int, typer.Option(help="Another seed, other clips.")] = 0,
) -> None:
    """Write synthetic captioned clips and tiny models in the real formats: offline, in seconds."""
    from mimir_precompute.toy.write import write_toy

    write_toy(directory, clips, seed)
    echo(f"{directory}/clips: {clips} clips with captions in metadata.jsonl")
    echo(f"{directory}/models: vae, text_encoder, tokenizer, llm, transformer, scheduler")


@app.command()
def plan(
    clips: Clips,
    cache: Cache,
    preset: PresetOption = None,
    bucket: BucketOption = None,
    fps: FpsOption = None,
    shard_size: ShardSizeOption = None,
    seed: SeedOption = None,
    limit: LimitOption = None,
    video_key: VideoKeyOption = "file_name",
    caption_key: CaptionKeyOption = "text",
    accept_removals: RemovalsOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be planned; write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """List the clips and put them into shards; on a cache with a plan, append what is new, changed or gone."""
    from mimir_precompute.commands import run_plan
    from mimir_precompute.plan import report_json

    request = _plan_request(preset, bucket, fps, shard_size, seed, accept_removals)
    _, report = run_plan(clips, cache, request, video_key, caption_key, limit, dry_run=dry_run)
    if as_json:
        echo(report_json(report))
    else:
        from mimir_precompute.messages import describe_plan

        echo(describe_plan(report, dry_run=dry_run))


@app.command()
def encode(
    cache: Cache,
    clips: Annotated[str | None, typer.Argument(help="As for `plan`; without it the cache's plan is taken as it is.",
                                                show_default=False)] = None,
    shards: Annotated[str, typer.Option(help="all, 0-63, 3,17 or 2::8 (start:stop:step).", rich_help_panel=_WHAT)]
    = "all",
    features: Annotated[str, typer.Option(help="Which of latents, t5, answers, llm.", rich_help_panel=_WHAT)]
    = "latents,t5,answers,llm",
    preset: PresetOption = None,
    bucket: BucketOption = None,
    fps: FpsOption = None,
    shard_size: ShardSizeOption = None,
    seed: SeedOption = None,
    limit: LimitOption = None,
    video_key: VideoKeyOption = "file_name",
    caption_key: CaptionKeyOption = "text",
    accept_removals: RemovalsOption = False,
    models: Annotated[str | None, typer.Option(help="Folder or hub id with vae, text_encoder, tokenizer (and llm).",
                                               rich_help_panel=_MODELS, show_default=False)] = None,
    vae: Annotated[str | None, typer.Option(help="VAE alone: folder, hub id or id@revision.", rich_help_panel=_MODELS,
                                            show_default=False)] = None,
    t5: Annotated[str | None, typer.Option(help="Folder or hub id with text_encoder and tokenizer.",
                                           rich_help_panel=_MODELS, show_default=False)] = None,
    llm: Annotated[str | None, typer.Option(help="The LLM: folder, hub id or id@revision.", rich_help_panel=_MODELS,
                                            show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the preset's.",
                                              rich_help_panel=_MODELS, show_default=False)] = None,
    latents: Annotated[str, typer.Option("--latents", help="What is kept of the posterior: moments, mean, sample.",
                                         rich_help_panel=_MODELS)] = "moments",
    vae_tiling: Annotated[bool, typer.Option("--vae-tiling", help="Encode in tiles: less memory, other bytes.",
                                             rich_help_panel=_MODELS)] = False,
    vae_engine: Annotated[str, typer.Option("--vae-engine", help="fast, or diffusers: the reference, slower.",
                                            rich_help_panel=_MODELS)] = "fast",
    t5_rows: Annotated[str, typer.Option(help="all, or ragged (drops pad rows: lossy).", rich_help_panel=_MODELS)]
    = "all",
    answer_variants: Annotated[int, typer.Option(help="Answers kept a prompt; the first is greedy, the others sampled.",
                                                 rich_help_panel=_MODELS)] = 1,
    output_format: Annotated[str, typer.Option("--format", help="webdataset.", rich_help_panel=_WHERE)] = "webdataset",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_WHERE)] = "auto",
    decode_workers: Annotated[int, typer.Option(help="Threads that decode clips ahead.", min=1, rich_help_panel=_WHERE)]
    = 2,
    max_quarantined: Annotated[float, typer.Option(help="Share of unusable clips above which the exit code is 3.",
                                                   min=0, max=1, rich_help_panel=_WHERE)] = 0.01,
    on_mismatch: Annotated[str, typer.Option(help="error, or new: keep features made otherwise side by side.",
                                             rich_help_panel=_WHERE)] = "error",
) -> None:  # fmt: skip
    """Encode the clips into the cache; run it again and it goes on where it stopped."""
    from mimir_precompute.commands import EncodeRequest, run_encode
    from mimir_precompute.messages import describe_outcome

    request = EncodeRequest(
        clips=clips,
        cache=cache,
        shards=shards,
        features=features,
        plan=_plan_request(preset, bucket, fps, shard_size, seed, accept_removals),
        limit=limit,
        video_key=video_key,
        caption_key=caption_key,
        models=models,
        vae=vae,
        t5=t5,
        llm=llm,
        dtype=dtype,
        stored_latents=latents,
        vae_tiling=vae_tiling,
        vae_engine=vae_engine,
        t5_rows=t5_rows,
        answer_variants=answer_variants,
        output_format=output_format,
        device=device,
        decode_workers=decode_workers,
        max_quarantined=max_quarantined,
        on_mismatch=on_mismatch,
    )
    echo(describe_outcome(cache, run_encode(request)))


@app.command()
def status(cache: CacheArgument, as_json: Json = False) -> None:
    """Say how far a cache is."""
    from mimir_precompute.messages import describe_status
    from mimir_precompute.status import read_status
    from mimir_shared.storage import open_storage

    found = read_status(open_storage(cache))
    echo(json.dumps(found.to_json()) if as_json else describe_status(cache, found))


@app.command()
def verify(cache: CacheArgument, as_json: Json = False) -> None:
    """Read everything again and say what is wrong; exit code 4 if something is."""
    from mimir_precompute.messages import describe_verification
    from mimir_precompute.verify import verify_cache
    from mimir_shared.storage import open_storage

    report = verify_cache(open_storage(cache))
    echo(json.dumps(report.to_json()) if as_json else describe_verification(cache, report))
    if not report.ok:
        raise typer.Exit(4)


@app.command()
def finalize(
    cache: CacheArgument,
    feature: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FINGERPRINT, where the cache has a feature more than once.", show_default=False),
    ] = None,
) -> None:
    """Write the snapshot that training pins; `encode` does it by itself when the last shard is done."""
    from mimir_precompute.commands import run_finalize

    snapshot = run_finalize(cache, feature or [])
    echo(f"snapshot {snapshot.digest[:12]}: {snapshot.clips} clips, features {', '.join(snapshot.features)}")


@app.command()
def inspect(
    cache: CacheArgument,
    key: Annotated[str, typer.Argument(help="Of the clip, as in the plan.", show_default=False)],
    video: Annotated[
        Path | None, typer.Option(help="Decode its latents to this mp4; needs --models or --vae.", show_default=False)
    ] = None,
    models: Annotated[str | None, typer.Option(help="Folder or hub id with the vae.", show_default=False)] = None,
    vae: Annotated[str | None, typer.Option(help="VAE alone: folder or hub id.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Json = False,
) -> None:
    """Print all that is known of one clip; decode its latents back to video."""
    from mimir_precompute.commands import run_inspect
    from mimir_precompute.messages import describe_inspection

    described = run_inspect(cache, key, video, models=models, vae=vae, device=device)
    echo(json.dumps(described) if as_json else describe_inspection(described))
    if video is not None and not as_json:
        echo(f"{video}: the latents, decoded")


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder of a cache.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="Folder of another cache.", show_default=False)],
    feature_a: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FINGERPRINT, where A has a feature more than once.", show_default=False),
    ] = None,
    feature_b: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FINGERPRINT, where B has a feature more than once.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say how two caches differ: what made them, their clips, and how far their features are apart."""
    from mimir_precompute.commands import parse_feature_choices
    from mimir_precompute.diff import compare_caches
    from mimir_precompute.messages import describe_difference
    from mimir_shared.storage import open_storage

    found = compare_caches(
        open_storage(a), open_storage(b), parse_feature_choices(feature_a or []), parse_feature_choices(feature_b or [])
    )
    echo(json.dumps(found.to_json()) if as_json else describe_difference(found))


def _plan_request(
    preset: str | None,
    bucket: list[str] | None,
    fps: float | None,
    shard_size: int | None,
    seed: int | None,
    accept_removals: bool,
) -> "PlanRequest":
    from mimir_precompute.config import Bucket
    from mimir_precompute.plan import PlanRequest
    from mimir_precompute.presets import find_preset

    if preset is not None:
        find_preset(preset)
    return PlanRequest(
        preset=preset,
        buckets=tuple(Bucket.parse(text) for text in bucket or ()),
        fps=fps,
        shard_size=shard_size,
        seed=seed,
        accept_removals=accept_removals,
    )


def main() -> None:
    """Entry point of the program."""
    run_app(app)
