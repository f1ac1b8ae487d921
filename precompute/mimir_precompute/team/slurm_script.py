"""A ready sbatch file: one array task for each GPU, started again when it is pre-empted or runs out of time."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mimir_shared.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SlurmRequest:
    """What is asked of Slurm."""

    tasks: int = 8
    at_once: int | None = None
    """Tasks that may run at the same time; None: all."""
    gpus: int = 1
    """Of each task; 0: none."""
    cpus: int = 8
    memory: str = "64G"
    time: str = "24:00:00"
    name: str = "mimir-encode"
    log_folder: str = "logs"
    extra: tuple[str, ...] = ()
    """More options of sbatch, as they stand: "--partition=gpu"."""
    setup: tuple[str, ...] = ()
    """Lines of shell that come first: "source .venv/bin/activate"."""
    prefix: str = ""
    """What the command is started by: "apptainer exec --nv mimir.sif"."""

    def __post_init__(self) -> None:
        if self.tasks < 1 or (self.at_once is not None and self.at_once < 1):
            raise InputError(f"--tasks {self.tasks}, --at-once {self.at_once}: expected at least 1")
        if self.gpus < 0 or self.cpus < 1:
            raise InputError(f"--gpus {self.gpus}, --cpus {self.cpus}: expected at least 0 and at least 1")
        for option, value in (("--mem", self.memory), ("--time", self.time), ("--name", self.name)):
            if not re.fullmatch(r"[\w.:-]+", value):
                raise InputError(f"{option} {value!r}: expected letters, digits, colons, dots and dashes alone")
        # a line break would begin a line of shell
        for text in (self.log_folder, *self.extra):
            if re.search(r"[\s\0]", text):
                raise InputError(f"{text!r}: expected no spaces or line breaks, for it becomes a line of #SBATCH")
        for option in self.extra:
            if not option.startswith("-"):
                raise InputError(f"--sbatch {option!r}: expected an option of sbatch, for instance --partition=gpu")


_RESTARTS: Final = 20
"""So often a task is queued again by the script itself."""

_BODY: Final = """\
{setup}set -u

# Decoders have processes of their own, and each of them one thread.
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{cpus}}}"

# Slurm sends SIGTERM to this shell a minute before the time is over, and when the task is pre-empted. The command ends
# within seconds; what it has committed stays, and whoever comes next goes on from there.
stopped=0
worker=
stop() {{
    stopped=1
    if [ -n "$worker" ]; then kill -TERM "$worker" 2>/dev/null; fi
}}
trap stop TERM INT

echo "task ${{SLURM_ARRAY_TASK_ID:-none}} of job ${{SLURM_ARRAY_JOB_ID:-none}} on $(hostname), \
started ${{SLURM_RESTART_COUNT:-0}} times before"
{command} &
worker=$!
if [ "$stopped" = 1 ]; then stop; fi
code=0
wait "$worker" || code=$?
while kill -0 "$worker" 2>/dev/null; do # the wait was interrupted by the signal
    code=0
    wait "$worker" || code=$?
done

# 5: the machine failed, and another may not; stopped: time was over, or somebody else had to run.
if {{ [ "$stopped" = 1 ] && [ "$code" != 0 ]; }} || [ "$code" = 5 ]; then
    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
        echo "exit code $code: queued again"
        scontrol requeue "${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
    fi
fi
exit "$code"
"""


def slurm_script(request: SlurmRequest, arguments: Sequence[str]) -> str:
    """The text of an sbatch file.

    Args:
        arguments: of `mimir-precompute encode`, checked before.
    """
    most = "" if request.at_once is None else f"%{request.at_once}"
    options = [
        f"--job-name={request.name}",
        f"--array=0-{request.tasks - 1}{most}",
        "--nodes=1",
        "--ntasks=1",
        *([f"--gres=gpu:{request.gpus}"] if request.gpus else []),
        f"--cpus-per-task={request.cpus}",
        f"--mem={request.memory}",
        f"--time={request.time}",
        "--requeue",
        "--open-mode=append",
        "--signal=B:TERM@60",
        f"--output={request.log_folder}/%x-%A_%a.log",
        *request.extra,
    ]
    words = [*shlex.split(request.prefix), "mimir-precompute", "encode", *arguments]
    if not any(word == "--shards" or word.startswith("--shards=") for word in arguments):
        words += ["--shards", "auto"]
    body = _BODY.format(
        setup="".join(f"{line}\n" for line in request.setup),
        cpus=request.cpus,
        command=shlex.join(words),
        restarts=_RESTARTS,
    )
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options)]
    lines += [f"# the folder of --output must be there before: mkdir -p {shlex.quote(request.log_folder)}", ""]
    return "\n".join(lines) + "\n" + body
