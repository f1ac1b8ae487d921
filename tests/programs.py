"""Running the two programs as a user does."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run(program: str, *arguments: object, timeout_s: float = 600) -> Finished:
    """Run `mimir-precompute` or `mimir-train` in a process of its own."""
    command = [str(BIN / program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=timeout_s, check=False)
    return Finished(done.returncode, done.stdout, done.stderr)


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a program without waiting for it."""
    command = [str(BIN / program), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
