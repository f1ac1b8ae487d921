"""One decoding child, seen from its worker: started, asked, watched, ended.

How an attempt ended is told apart here: by an answer, by the decoder's own death or delay (DecoderFailed, for which
a clip may be to blame), or by what no clip can do (EndedFromOutside, MachineError).
"""

import array
import contextlib
import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mimir_precompute.clips.rejection import RejectionReason
from mimir_precompute.config import DecodeLimits
from mimir_shared.errors import MachineError

CHILD_PROGRAM = ("-m", "mimir_precompute.decoding.child")

_START_TIMEOUT_S = 120
_SILENCE_S = 5
"""Past its deadline, a child that used no CPU for so long is not starved by others: it hangs."""
_STARVED = 20
"""How often the deadline may pass while the child computes, by the clock: on a machine shared by many."""
_MAX_PACKET_BYTES = 2**16
_OWN_SIGNALS = frozenset(
    (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP, signal.SIGSYS)
)
"""What a decoder can bring upon itself. SIGKILL, SIGTERM and the like come from outside: from the kernel where the
host is out of memory, from a scheduler, from a person."""
# credentials of the worker are none of its business
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")


class DecoderFailed(Exception):
    """The child died, was too slow or ran out of memory while it had this one clip."""

    def __init__(self, reason: RejectionReason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: RejectionReason = reason
        self.detail = detail


class EndedFromOutside(Exception):
    """The child was killed, by neither the clip nor us."""


class DecodeChild:
    """One child process. Not for several threads at once."""

    def __init__(self, program: Sequence[str], limits: DecodeLimits) -> None:
        """Start it; the calling thread must outlive it, for the kernel ends the child with that thread."""
        self._limits = limits
        self.num_asked = 0
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._errors = os.memfd_create("errors")
        arguments = [str(os.getpid()), str(int(limits.memory_gb * 1e9))]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", *program, *arguments],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=self._errors,
                    env=_environment(),
                    # out of reach of Ctrl-C and of signals to the worker's group: it ends when the worker does
                    start_new_session=True,
                )
        except BaseException:
            self._control.close()
            os.close(self._errors)
            raise

    def wait_until_ready(self) -> None:
        """Raises: MachineError where it does not come up, for which no clip can be to blame."""
        self._control.settimeout(_START_TIMEOUT_S)
        with contextlib.suppress(OSError):
            if json.loads(self._control.recv(_MAX_PACKET_BYTES) or b"{}") == {"outcome": "ready"}:
                self._control.settimeout(None)
                return
        self._process.kill()
        code = self._process.wait()
        said = os.pread(self._errors, 2**16, 0).decode(errors="replace").strip().splitlines()
        raise MachineError(
            f"a process for decoding could not be started ({said[-1] if said else f'it ended with {code}'}); no clip "
            "is to blame: mend the installation or the limits of the machine and run the same command again"
        )

    def ask(self, request: dict[str, Any], descriptors: Sequence[int]) -> bytes:
        """Send one request and wait for its answer, which is not to be trusted.

        Raises: DecoderFailed, EndedFromOutside, TimeoutError where the disk keeps it from going on.
        """
        self.num_asked += 1
        packet = json.dumps({**request, "cpu_s": self._limits.timeout_s}).encode()
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        try:
            self._control.sendmsg([packet], [rights])
        except (BrokenPipeError, ConnectionError):
            raise self._explain_death() from None
        self._wait_for_answer()
        try:
            answer = self._control.recv(_MAX_PACKET_BYTES)
        except ConnectionError:
            answer = b""
        if not answer:
            raise self._explain_death()
        return answer

    def kill(self) -> None:
        """Kill it, with what it may have started. May be called while another thread asks, which then hears of it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()

    def end(self) -> None:
        """Kill it and forget it."""
        self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck at a dead disk: it dies when that lets go of it
            self._process.wait(timeout=10)
        self._control.close()
        os.close(self._errors)

    def _wait_for_answer(self) -> None:
        """Return when there is an answer or the child is dead; it gets its timeout, and longer only if starved."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        started = time.monotonic()
        if poll.poll(self._limits.timeout_s * 1000):
            return
        used_ticks = None
        silence_s = min(_SILENCE_S, self._limits.timeout_s)
        while time.monotonic() - started < _STARVED * self._limits.timeout_s:
            state, ticks = _read_state(self._process.pid)
            if ticks == used_ticks:
                if state == "D":
                    raise TimeoutError(errno.ETIMEDOUT, "the disk or mount does not answer")
                raise EndedFromOutside if state in "tT" else _too_slow()
            used_ticks = ticks
            if poll.poll(silence_s * 1000):
                return
        raise _too_slow()

    def _explain_death(self) -> Exception:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return DecoderFailed("crashed_decoder", "the decoder broke off its connection")
        if code >= 0:
            return DecoderFailed("crashed_decoder", "the decoder ended the process")
        if -code == signal.SIGXCPU:
            return _too_slow()
        if -code in _OWN_SIGNALS:
            return DecoderFailed("crashed_decoder", f"the decoder died of {signal.Signals(-code).name}")
        return EndedFromOutside()


def _read_state(pid: int) -> tuple[str, int]:
    """Of /proc: R runs, S sleeps, D waits for a disk, T is stopped; and clock ticks of CPU time so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[11]) + int(fields[12])


def _too_slow() -> DecoderFailed:
    return DecoderFailed("timeout", "decoding did not end in time; --decode-timeout-s allows more")


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    # one thread, for many clips are decoded at once
    return {**kept, "PYTHONPATH": module_path(), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def module_path() -> str:
    """PYTHONPATH of a child that is to have the modules of this process, wherever those are from."""
    return os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry)
