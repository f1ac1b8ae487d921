"""mimir-precompute: parses the command line and calls one function. Nothing heavy is imported up here."""

from pathlib import Path
from typing import Annotated

import typer

from mimir_precompute.cli import cache as cli_cache
from mimir_precompute.cli import remake as cli_remake
from mimir_precompute.cli import slurm as cli_slurm
from mimir_precompute.cli import volatility as cli_volatility
from mimir_precompute.cli.models import with_model_options
from mimir_precompute.cli.options import (
    WHAT,
    WHERE,
    AcceptQuarantineOption,
    AnswerVariantsOption,
    BucketOption,
    Cache,
    CaptionKeyOption,
    Clips,
    DecodeMemoryOption,
    DecodeTimeoutOption,
    ExecutorOption,
    FpsOption,
    GpuOption,
    InstructionsOption,
    Json,
    LatentsOption,
    LimitOption,
    LlmOption,
    MaxQuarantinedOption,
    ModelsOption,
    OnlyOwnShardsOption,
    PlaceOption,
    PresetOption,
    RayAddressOption,
    RemovalsOption,
    SeedOption,
    ShardSizeOption,
    ShardsOption,
    SharedDecodeWorkersOption,
    T5Option,
    UtilisationOption,
    VaeOption,
    VideoKeyOption,
    WorkersOption,
    plan_request,
)
from mimir_precompute.config import ModelOptions
from mimir_shared.command_line import echo, make_app, run_app

app = make_app(
    "Encode text-to-video training data once, into a cache that is resumable, verifiable and portable.\n\n"
    "First steps: `mimir-precompute toy DIR`, then `mimir-precompute encode DIR/clips --cache CACHE "
    "--models DIR/models --preset tiny --shards all`."
)


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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be planned and what encoding it will "
                                          "cost; write nothing.")] = False,
    gpu: GpuOption = "h100",
    utilisation: UtilisationOption = 0.4,
    models: ModelsOption = None,
    vae: VaeOption = None,
    t5: T5Option = None,
    llm: LlmOption = None,
    latents: LatentsOption = "moments",
    answer_variants: AnswerVariantsOption = 1,
    instructions: InstructionsOption = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """List the clips and put them into shards; on a cache with a plan, append what is new, changed or gone.

    The options about models are read for the estimate alone, as `encode` would take them; nothing is downloaded.
    """
    from mimir_precompute.cli.plan_command import PlanCommand, run_plan_command

    options = ModelOptions(models=models, vae=vae, t5=t5, llm=llm, stored_latents=latents,
                           answer_variants=answer_variants, instructions=instructions)  # fmt: skip
    command = PlanCommand(
        clips=clips,
        cache=cache,
        request=plan_request(preset, bucket, fps, shard_size, seed, accept_removals),
        limit=limit,
        video_key=video_key,
        caption_key=caption_key,
        dry_run=dry_run,
        models=options,
        gpu=gpu,
        utilisation=utilisation,
    )
    echo(run_plan_command(command, as_json=as_json))


@app.command()
@with_model_options
def encode(
    cache: Cache,
    clips: Annotated[str | None, typer.Argument(help="As for `plan`; without it the cache's plan is taken as it is.",
                                                show_default=False)] = None,
    shards: ShardsOption = "all",
    features: Annotated[str, typer.Option(help="Which of latents, t5, answers, llm.", rich_help_panel=WHAT)]
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
    models: ModelOptions = ...,  # type: ignore[assignment]  # every option of models.py
    output_format: Annotated[str | None, typer.Option("--format", help="webdataset or zarr; default: what the cache "
                                                      "has, webdataset for a new one.", rich_help_panel=WHERE,
                                                      show_default=False)] = None,
    decode_workers: SharedDecodeWorkersOption = None,
    decode_timeout_s: DecodeTimeoutOption = 60,
    decode_memory_gb: DecodeMemoryOption = 4,
    max_quarantined: MaxQuarantinedOption = 0.01,
    accept_quarantine: AcceptQuarantineOption = False,
    on_mismatch: Annotated[str, typer.Option(help="error, or new: keep features made otherwise side by side.",
                                             rich_help_panel=WHERE)] = "error",
    workers: WorkersOption = None,
    place: PlaceOption = None,
    only_own_shards: OnlyOwnShardsOption = False,
    executor: ExecutorOption = "local",
    ray_address: RayAddressOption = "auto",
) -> None:  # fmt: skip
    """Encode the clips into the cache; run it again and it goes on where it stopped."""
    from mimir_precompute.cli.commands import EncodeRequest, run_encode
    from mimir_precompute.cli.messages import describe_outcome
    from mimir_precompute.config import DecodeLimits, TeamOptions

    request = EncodeRequest(
        clips=clips,
        cache=cache,
        shards=shards,
        features=features,
        plan=plan_request(preset, bucket, fps, shard_size, seed, accept_removals),
        limit=limit,
        video_key=video_key,
        caption_key=caption_key,
        models=models,
        output_format=output_format,
        decode_workers=decode_workers,
        decode_limits=DecodeLimits(timeout_s=decode_timeout_s, memory_gb=decode_memory_gb),
        max_quarantined=max_quarantined,
        accept_quarantine=accept_quarantine,
        on_mismatch=on_mismatch,
        team=TeamOptions(
            workers=workers,
            place=tuple(place or ()),
            only_own_shards=only_own_shards,
            executor=executor,
            ray_address=ray_address,
        ),
    )
    echo(describe_outcome(cache, run_encode(request)))


cli_cache.add_commands(app)  # those that look at a cache or finish it
cli_volatility.add_commands(app)
cli_slurm.add_commands(app)
cli_remake.add_commands(app)  # those that make parts of it again


def main() -> None:
    """Entry point of the program."""
    run_app(app)
