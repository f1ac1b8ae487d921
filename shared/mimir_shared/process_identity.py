"""Which process is this, and does that one still live? Told across restarts and containers."""

import os
import uuid
from functools import cache
from pathlib import Path


@cache
def process_domain() -> str:
    """Name the set of processes in which a pid means something: one boot of one pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return f"unknown{uuid.uuid4().hex[:12]}"
    return f"{boot[:8]}{namespace}"


def is_dead(domain: str, pid: int) -> bool:
    """Whether that process certainly does not run any more; False where it cannot be told from here."""
    if domain != process_domain():
        return False
    try:
        os.kill(pid, 0)
        # a killed process whose parent has not yet asked for its end
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except (ProcessLookupError, FileNotFoundError):
        return True
    except OSError:
        return False
