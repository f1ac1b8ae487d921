"""Which process is this, and does that one still live? Told across restarts and containers."""

import os
import uuid
from functools import cache
from pathlib import Path
from typing import Literal

Life = Literal["dead", "living", "unknown"]


@cache
def process_domain() -> str:
    """Name the set of processes in which a pid means something: one boot of one pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return f"unknown{uuid.uuid4().hex[:12]}"
    return f"{boot[:8]}{namespace}"


def life_of(domain: str, pid: int) -> Life:
    """Whether that process runs; "unknown" where it cannot be told from here."""
    if domain != process_domain():
        return "unknown"
    try:
        os.kill(pid, 0)
        # a killed process whose parent has not yet asked for its end
        ended = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except (ProcessLookupError, FileNotFoundError):
        return "dead"
    except OSError:
        return "living"
    return "dead" if ended else "living"


def owner_stem() -> str:
    """How the names of this process's temporary files begin; a "-" and what tells them apart follow."""
    return f"{process_domain()}-{os.getpid()}"


def owner_life(name: str) -> Life:
    """What is known of the process that a temporary file is named for."""
    parts = name.split("-")
    return life_of(parts[0], int(parts[1])) if len(parts) == 3 and parts[1].isdecimal() else "unknown"
