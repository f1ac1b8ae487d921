"""SIGTERM and SIGINT end a program within seconds, whatever it is doing, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mimir_shared.process_identity import life_of, process_domain

_PROGRAM = """
import ctypes, subprocess, sys, threading
from pathlib import Path
from mimir_precompute.workers.lease import Leases
from mimir_precompute.termination import when_stopped, working_on
from mimir_shared.layout import lease_name
from mimir_shared.storage.folder import LocalStorage

storage = LocalStorage(Path(sys.argv[1]))
with working_on(storage):
    child = subprocess.Popen(["sleep", "600"])
    with when_stopped(child.kill), Leases(storage.lease_store()) as leases, storage.temporary() as temporary:
        leases.take(lease_name("t5", "0123456789ab", 7))
        temporary.file.write(b"half of a shard")
        def keep_making_temporaries():
            while True:
                with storage.temporary():
                    pass
        if "busy" in sys.argv:
            threading.Thread(target=keep_making_temporaries, daemon=True).start()
        print(child.pid, flush=True)
        # a long call into a library, which no signal ends: no handler of Python's runs before it does
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("busy", ["", "busy"])
@pytest.mark.parametrize(
    ("sent", "code"),
    [((signal.SIGTERM,), 143), ((signal.SIGTERM, signal.SIGTERM), 143), ((signal.SIGINT,), 130)],
    ids=["SIGTERM", "SIGTERM twice", "SIGINT"],
)
def test_a_signal_in_a_long_call_ends_the_program_its_children_leases_and_temporaries(
    tmp_path: Path, sent: tuple[signal.Signals, ...], code: int, busy: str
) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(tmp_path), busy], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    child = int(program.stdout.readline())
    assert len(list((tmp_path / "leases").rglob("000007"))) == 1
    asked = time.monotonic()
    for number in sent:
        program.send_signal(number)
    _, err = program.communicate(timeout=60)
    assert time.monotonic() - asked < 5
    assert program.returncode == code, err
    assert f"stopped by {sent[0].name}; what was committed stays" in err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "tmp").exists()
    assert _is_dead_soon(child)


def _is_dead_soon(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if life_of(process_domain(), pid) == "dead":
            return True
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return False
