"""Workers as processes beside this one, one a GPU: `encode --workers`."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from mimir_precompute.decoding.process import module_path
from mimir_precompute.team.team import Ending
from mimir_precompute.team.worker_process import ENDINGS, TASKS
from mimir_precompute.team.worker_task import WorkerTask
from mimir_shared.errors import MachineError

WORKER_PROGRAM: Final = ("-m", "mimir_precompute.team.worker_process")
_QUIET: Final = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
"""One view shows all workers; the bars of libraries in each would tear it."""


class LocalWorker:
    """One worker process.

    Args:
        name: for a person.
        environment: what its environment has besides that of this process.
        say: told every line that it prints.
    Raises: MachineError where no process can be started.
    """

    def __init__(
        self,
        task: WorkerTask,
        *,
        name: str,
        environment: Mapping[str, str],
        say: Callable[[str], None],
        program: Sequence[str] = WORKER_PROGRAM,
    ) -> None:
        self._say = say
        self._number = task.number
        self._lock = threading.Lock()
        self._ending: Ending | None = None
        self._stopped = threading.Event()
        self._connection, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", *program],
                    stdin=theirs.fileno(),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **_QUIET, "PYTHONPATH": module_path(), **environment},
                    # Ctrl-C is for the parent, which asks every worker to end
                    start_new_session=True,
                )
        except OSError as fault:
            self._connection.close()
            raise MachineError(f"{name} could not be started: {fault.strerror}; run the same command again") from fault
        self.pid = self._process.pid
        self.name = f"{name}, pid {self.pid},"
        self._reader = threading.Thread(target=self._read_lines, name=f"worker-{task.number}", daemon=True)
        self._reader.start()
        with contextlib.suppress(OSError):  # it has died already, which `ending` finds
            self._connection.sendall(TASKS.dump_json(task) + b"\n")

    def ending(self) -> Ending | None:
        with self._lock:
            if self._ending is None and (code := self._process.poll()) is not None:
                self._ending = self._read_ending(code)
            return self._ending

    def stop(self) -> None:
        self._stopped.set()
        self._process.terminate()

    def kill(self) -> None:
        self._stopped.set()
        self._process.kill()

    def _read_ending(self, code: int) -> Ending:
        self._reader.join(timeout=1)  # its last words come before what is said of its end
        received = b""
        with contextlib.suppress(OSError):
            while part := self._connection.recv(2**16):
                received += part
        self._connection.close()
        if received:
            with contextlib.suppress(ValueError):  # cut short: it was killed while it spoke
                return ENDINGS.validate_json(received)
        if code >= 0:
            return Ending(message=f"ended with exit code {code}")
        why = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
        return Ending(message=f"was killed by {signal.Signals(-code).name}{why}")

    def _read_lines(self) -> None:
        assert self._process.stdout is not None, "its output is a pipe"
        with self._process.stdout as lines:
            for line in lines:
                text = line.decode(errors="replace").rstrip().rpartition("\r")[2]
                if text and not self._stopped.is_set():
                    self._say(f"[worker {self._number}] {text}")
