"""Commands of mimir-precompute that make parts of a cache again: what is typed, checked and handed on.

Nothing heavy is imported up here.
"""

import json
from typing import Annotated

import typer

from mimir_precompute.cli.models import with_model_options
from mimir_precompute.cli.options import (
    WHAT,
    AcceptQuarantineOption,
    CacheArgument,
    DecodeMemoryOption,
    DecodeTimeoutOption,
    DecodeWorkersOption,
    Json,
    MaxQuarantinedOption,
)
from mimir_precompute.config import ModelOptions
from mimir_shared.command_line import echo


def add_commands(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (verify, retry):
        app.command()(command)


@with_model_options
def verify(
    cache: CacheArgument,
    repair: Annotated[bool, typer.Option("--repair", help="Encode what is damaged again, as the next generation of its "
                                         "shards, with the models and settings that made the cache; copy the rest.")]
    = False,
    models: ModelOptions = ...,  # type: ignore[assignment]  # every option of models.py
    decode_workers: DecodeWorkersOption = 2,
    decode_timeout_s: DecodeTimeoutOption = 60,
    decode_memory_gb: DecodeMemoryOption = 4,
    max_quarantined: MaxQuarantinedOption = 0.01,
    accept_quarantine: AcceptQuarantineOption = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Read everything again and say what is wrong; exit code 4 if something is."""
    from mimir_precompute.cli.commands_remake import RemakeRequest, run_verify
    from mimir_precompute.cli.messages import describe_repair, describe_verification
    from mimir_precompute.config import DecodeLimits

    request = RemakeRequest(
        cache=cache,
        models=models,
        decode_workers=decode_workers,
        decode_limits=DecodeLimits(timeout_s=decode_timeout_s, memory_gb=decode_memory_gb),
        max_quarantined=max_quarantined,
        accept_quarantine=accept_quarantine,
    )
    report, repaired = run_verify(request, repair=repair)
    if as_json:
        echo(json.dumps(report.to_json() if repaired is None else repaired.to_json()))
    else:
        echo(describe_verification(cache, report) if repaired is None else describe_repair(cache, repaired))
    if not (report.ok if repaired is None else repaired.ok):
        raise typer.Exit(4)


@with_model_options
def retry(
    cache: CacheArgument,
    reason: Annotated[str | None, typer.Option(help="Of these reasons alone, e.g. timeout,missing; default: all.",
                                               rich_help_panel=WHAT, show_default=False)] = None,
    stage: Annotated[str | None, typer.Option(help="Of these stages alone: fetch, decode, geometry, encode.",
                                              rich_help_panel=WHAT, show_default=False)] = None,
    key: Annotated[list[str] | None, typer.Option(help="This clip; repeatable.", rich_help_panel=WHAT,
                                                  show_default=False)] = None,
    features: Annotated[str, typer.Option(help="Of these features.", rich_help_panel=WHAT)]
    = "latents,t5,answers,llm",
    models: ModelOptions = ...,  # type: ignore[assignment]  # every option of models.py
    decode_workers: DecodeWorkersOption = 2,
    decode_timeout_s: DecodeTimeoutOption = 60,
    decode_memory_gb: DecodeMemoryOption = 4,
    max_quarantined: MaxQuarantinedOption = 0.01,
    accept_quarantine: AcceptQuarantineOption = False,
) -> None:  # fmt: skip
    """Try quarantined clips again, with the models that made the cache; good samples keep their bytes."""
    from mimir_precompute.cli.commands_remake import RemakeRequest, run_retry
    from mimir_precompute.cli.messages import describe_retry
    from mimir_precompute.config import DecodeLimits
    from mimir_precompute.retry import parse_choice

    choice = parse_choice(reason, stage, key or [], features)
    request = RemakeRequest(
        cache=cache,
        models=models,
        decode_workers=decode_workers,
        decode_limits=DecodeLimits(timeout_s=decode_timeout_s, memory_gb=decode_memory_gb),
        max_quarantined=max_quarantined,
        accept_quarantine=accept_quarantine,
    )
    echo(describe_retry(cache, run_retry(request, choice)))
