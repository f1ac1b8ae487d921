"""Commands of mimir-precompute that look at a cache or finish it: what is typed, checked and handed on.

Nothing heavy is imported up here.
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from mimir_precompute.cli.options import CacheArgument, Json, MaxQuarantinedOption
from mimir_shared.command_line import echo


def add_commands(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (status, quarantine, stats, finalize, gc, report, inspect, diff, convert):
        app.command()(command)


def status(
    cache: CacheArgument,
    as_json: Json = False,
    watch: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Say it again so often, until Ctrl-C.", min=0.1, show_default=False),
    ] = None,
) -> None:
    """Say how far a cache is, who works on it, how fast, and how long still.

    What is done is read from the commit records; the pace is what the workers of every machine write in logs/workers.
    One that was not heard of for a minute is marked STALE.
    """
    from mimir_precompute.cli.messages import describe_status
    from mimir_precompute.inspection.status import read_status
    from mimir_shared.storage.open import open_storage

    with contextlib.suppress(KeyboardInterrupt):
        while True:
            found = read_status(open_storage(cache))
            echo(json.dumps(found.to_json()) if as_json else describe_status(cache, found))
            if watch is None:
                return
            sys.stdout.flush()
            time.sleep(watch)


def quarantine(
    cache: CacheArgument,
    out: Annotated[
        Path | None, typer.Option(help="Write the ledger to this file, as one Parquet table.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the clips that could not be used: where they failed, why, and how often they were tried."""
    from dataclasses import asdict

    from mimir_precompute.cli.messages import describe_ledger
    from mimir_precompute.quarantine import ledger_parquet, read_ledger
    from mimir_shared.storage.folder import machine_faults
    from mimir_shared.storage.open import open_storage

    lines = read_ledger(open_storage(cache))
    if out is not None:
        with machine_faults(f"{out}: writing"):
            out.write_bytes(ledger_parquet(lines))
    echo(json.dumps([asdict(line) for line in lines]) if as_json else describe_ledger(cache, lines, out))


def stats(cache: CacheArgument, as_json: Json = False) -> None:
    """Show mean, spread, least and largest value of every channel, and name shards that are unlike the others."""
    from mimir_precompute.cli.messages import describe_statistics
    from mimir_precompute.inspection.stats import read_statistics
    from mimir_shared.plan_file import read_plan
    from mimir_shared.storage.open import open_storage

    storage = open_storage(cache)
    read_plan(storage)  # a folder without a plan is no cache: of it nothing could be said, which reads like all is well
    found = read_statistics(storage)
    echo(json.dumps(found.to_json()) if as_json else describe_statistics(cache, found))


def finalize(
    cache: CacheArgument,
    feature: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FINGERPRINT, where the cache has a feature more than once.", show_default=False),
    ] = None,
    max_quarantined: MaxQuarantinedOption = 0.01,
) -> None:
    """Write the snapshot that training pins; `encode` does it by itself when the last shard is done."""
    from mimir_precompute.cli.commands import run_finalize
    from mimir_precompute.cli.messages import describe_snapshot

    echo(describe_snapshot(run_finalize(cache, feature or [], max_quarantined)))


def report(
    cache: CacheArgument,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; default: CACHE-report.html in the current folder.", show_default=False),
    ] = None,
    gallery: Annotated[int, typer.Option(help="How many clips to show, spread over the shards.", min=0)] = 12,
    models: Annotated[
        str | None, typer.Option(help="Folder or hub id with the vae, to decode the gallery.", show_default=False)
    ] = None,
    vae: Annotated[str | None, typer.Option(help="VAE alone: folder or hub id.", show_default=False)] = None,
    feature: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FINGERPRINT, where the cache has a feature more than once; else the one with most "
                     "shards.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:  # fmt: skip
    """Write one HTML page about a cache: progress, sizes, quarantine, lengths, values, and a gallery of clips.

    It stands alone: pictures are inside, nothing is loaded from elsewhere. Without --models or --vae the gallery shows
    latents in false colours. The page has captions and frames in it: share it as you would share the clips.
    """
    from mimir_precompute.report.command import run_report

    path, nbytes = run_report(
        cache, out=out, gallery=gallery, wanted=feature or [], models=models, vae=vae, device=device
    )
    echo(f"{path}: {nbytes / 1e6:.1f} MB, and nothing beside it is needed")


def gc(
    cache: CacheArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed; remove nothing.")] = False,
    grace_s: Annotated[
        float, typer.Option(help="Seconds for which a file must not have been touched to be removed.", min=0)
    ] = 3600.0,
    as_json: Json = False,
) -> None:
    """Remove what no commit record and no snapshot names: data of killed workers, superseded generations, stale leases.

    Workers may go on meanwhile: what a living one may be about to name is young, leased or linked twice, and stays.
    """
    from mimir_precompute.cli.messages import describe_garbage
    from mimir_precompute.gc import collect_garbage
    from mimir_precompute.termination import working_on
    from mimir_shared.plan_file import read_plan
    from mimir_shared.storage.open import open_storage

    storage = open_storage(cache)
    read_plan(storage)  # a folder without a plan is no cache: nothing of it may be removed
    storage.check_writable()
    with working_on(storage):
        report = collect_garbage(storage, grace_s=grace_s, dry_run=dry_run)
    echo(json.dumps(report.to_json()) if as_json else describe_garbage(cache, report))


def inspect(
    cache: CacheArgument,
    key: Annotated[str, typer.Argument(help="Of the clip, as in the plan.", show_default=False)],
    video: Annotated[
        Path | None, typer.Option(help="Decode its latents to this mp4; needs --models or --vae.", show_default=False)
    ] = None,
    models: Annotated[str | None, typer.Option(help="Folder or hub id with the vae.", show_default=False)] = None,
    vae: Annotated[str | None, typer.Option(help="VAE alone: folder or hub id.", show_default=False)] = None,
    feature: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FINGERPRINT: which latents to decode, where the cache has them more than once.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Json = False,
) -> None:
    """Print all that is known of one clip; decode its latents back to video. Exit code 4 if its bytes are damaged."""
    from mimir_precompute.cli.commands import run_inspect
    from mimir_precompute.cli.messages import describe_inspection

    described = run_inspect(cache, key, video, models=models, vae=vae, device=device, wanted=feature or [])
    # a user's own columns may hold dates and the like
    echo(json.dumps(described, default=str) if as_json else describe_inspection(described))
    if video is not None and not as_json:
        echo(f"{video}: the latents, decoded")
    if not all(facts.get("matches", True) for facts in described["features"].values()):
        raise typer.Exit(4)


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder or URL of a cache.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="Folder or URL of another.", show_default=False)],
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
    from mimir_precompute.cli.messages import describe_difference
    from mimir_precompute.inspection.diff import compare_caches
    from mimir_precompute.option_values import parse_feature_choices
    from mimir_shared.storage.open import open_storage

    found = compare_caches(
        open_storage(a), open_storage(b), parse_feature_choices(feature_a or []), parse_feature_choices(feature_b or [])
    )
    echo(json.dumps(found.to_json()) if as_json else describe_difference(found))


def convert(
    cache: CacheArgument,
    out: Annotated[
        str,
        typer.Option(help="Folder or URL to write to; the same command goes on in it.", show_default=False),
    ],
    output_format: Annotated[
        str | None, typer.Option("--format", help="webdataset or zarr: of every shard.", show_default=False)
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Tars with all features of a clip in one sample: an export, no cache.")
    ] = False,
    feature: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FINGERPRINT for --merge, where the cache has a feature more than once.", show_default=False
        ),
    ] = None,
) -> None:
    """Write a cache once more: in another format (a whole cache, equal tensors), or merged for other trainers."""
    from mimir_precompute.cli.convert_command import run_convert, run_merge
    from mimir_precompute.cli.messages import describe_conversion, describe_merge
    from mimir_precompute.workers.progress import Progress
    from mimir_shared.errors import InputError

    if merge == (output_format is not None):
        raise InputError("convert: give --format webdataset or --format zarr for a cache, or --merge for an export")
    if output_format is not None:
        if feature:
            raise InputError("convert --feature: goes with --merge; a cache is converted with all that it has")
        echo(describe_conversion(out, output_format, run_convert(cache, out, output_format, Progress())))
    else:
        echo(describe_merge(out, run_merge(cache, out, feature or [], Progress())))
