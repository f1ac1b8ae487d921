"""A worker in a process of its own: `python -m mimir_precompute.team.worker_process`, its standard input a socket.

It is told its task on the socket and tells there how it ended. When the other end goes, whoever started it is dead,
and it ends too. What it prints is read by its parent.
"""

import os
import signal
import socket
import sys
import threading
import time

from pydantic import TypeAdapter
from rich.console import Console

from mimir_precompute.device import choose_device
from mimir_precompute.open_encoders import open_encoders
from mimir_precompute.pipeline import FeatureOutcome
from mimir_precompute.team.team import Ending, ending_of
from mimir_precompute.team.worker_task import EncodersOf, WorkerTask, run_worker
from mimir_precompute.termination import working_on
from mimir_precompute.workers.progress import Progress
from mimir_shared.storage.open import open_storage

TASKS = TypeAdapter(WorkerTask)
ENDINGS = TypeAdapter(Ending)
_GRACE_S = 10.0


def main(encoders_of: EncodersOf = open_encoders) -> None:
    """Do one task and exit with the code of its error, if any."""
    connection = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    received = b""
    while not received.endswith(b"\n"):
        part = connection.recv(2**16)
        if not part:
            sys.exit(0)  # the parent has gone before it said anything
        received += part
    threading.Thread(target=_end_with_parent, args=(connection,), name="parent", daemon=True).start()
    ending = _run(TASKS.validate_json(received), encoders_of)
    connection.sendall(ENDINGS.dump_json(ending))
    sys.exit(ending.exit_code)


def _run(task: WorkerTask, encoders_of: EncodersOf) -> Ending:
    warnings = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    progress = Progress(quiet=True, watch=False, warnings=warnings)

    def work() -> list[FeatureOutcome]:
        storage = open_storage(task.cache)
        with working_on(storage):
            return run_worker(task, storage, progress, choose_device(task.models.device), encoders_of)

    return ending_of(work)


def _end_with_parent(connection: socket.socket) -> None:
    while connection.recv(1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
