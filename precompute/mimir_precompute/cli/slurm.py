"""`slurm-script` on the command line. Nothing heavy up here."""

from typing import Annotated

import typer
from typer.core import TyperGroup

from mimir_precompute.presets import find_preset
from mimir_shared.command_line import echo
from mimir_shared.errors import InputError


def add_commands(app: typer.Typer) -> None:
    """Register the command."""
    app.command("slurm-script")(slurm_script)


def slurm_script(
    context: typer.Context,
    command: Annotated[
        list[str],
        typer.Argument(help="The options of `encode`, behind --.", metavar="-- ENCODE-OPTIONS", show_default=False),
    ],
    tasks: Annotated[int, typer.Option(help="Tasks of the array.", min=1)] = 8,
    at_once: Annotated[
        int | None, typer.Option(help="So many of them at a time; default: all.", min=1, show_default=False)
    ] = None,
    gpus: Annotated[int, typer.Option(help="GPUs of a task; 0 for none. With more than 1, give encode --workers auto.",
                                      min=0)] = 1,
    cpus: Annotated[int, typer.Option(help="Cores of a task.", min=1)] = 8,
    memory: Annotated[str, typer.Option("--mem", help="Memory of a task.")] = "64G",
    time: Annotated[str, typer.Option(help="Time limit; a task that reaches it is queued again.")] = "24:00:00",
    name: Annotated[str, typer.Option(help="Of the job, and of its logs.")] = "mimir-encode",
    logs: Annotated[str, typer.Option(help="Folder of the logs.")] = "logs",
    setup: Annotated[
        list[str] | None,
        typer.Option(help="A line of shell to come first: 'source .venv/bin/activate'; repeatable.",
                     show_default=False),
    ] = None,
    prefix: Annotated[
        str, typer.Option(help="What starts the command: 'apptainer exec --nv mimir.sif'.", show_default=False)
    ] = "",
    sbatch: Annotated[
        list[str] | None,
        typer.Option(help="Another option of sbatch: --sbatch=--partition=gpu; repeatable.", show_default=False),
    ] = None,
) -> None:  # fmt: skip
    """Print an sbatch file: an array whose tasks share the shards, and are queued again when pre-empted.

    mimir-precompute slurm-script --tasks 64 -- --cache CACHE --preset cogvideox-5b > encode.sbatch
    """
    from mimir_precompute.team.slurm_script import SlurmRequest
    from mimir_precompute.team.slurm_script import slurm_script as make_script

    request = SlurmRequest(
        tasks=tasks,
        at_once=at_once,
        gpus=gpus,
        cpus=cpus,
        memory=memory,
        time=time,
        name=name,
        log_folder=logs,
        extra=tuple(sbatch or ()),
        setup=tuple(setup or ()),
        prefix=prefix,
    )
    echo(make_script(request, _encode_arguments(context, command)).rstrip("\n"))


def _encode_arguments(context: typer.Context, words: list[str]) -> list[str]:
    """The options of `encode` among some words, parsed as that command would. Raises InputError."""
    arguments = words[1:] if words[:1] == ["mimir-precompute"] else words
    arguments = arguments[1:] if arguments[:1] == ["encode"] else arguments
    program = context.find_root().command
    assert isinstance(program, TyperGroup), f"the program has commands, {program}"
    parsed = program.commands["encode"].make_context("encode", list(arguments), parent=context.find_root())
    clips, cache, preset = (parsed.params[name] for name in ("clips", "cache", "preset"))
    if preset is not None:
        find_preset(preset)
    if clips is not None:
        raise InputError(
            f"slurm-script: {clips} would be listed by each task again; plan once before, "
            f"`mimir-precompute plan {clips} --cache {cache} …`, and give encode no clips"
        )
    return arguments
