"""Nobody waits for ever: a thread of each rank ends its process when another rank is gone, or when all hang.

Every rank keeps a connection to rank 0 that nothing else uses. When a process dies, its kernel closes the connection,
whatever the process was at, and rank 0 tells all others: that needs no time limit, and no backend that notices. Where a
whole machine falls silent, keep-alive probes of the connection find out within 20 s. A process that still stands but
does nothing (stopped, or stuck on a device) closes nothing: there, `mimir_train.parallel.hang` judges by time.

Both end the process from outside of its main thread, which may be deep in an exchange that never returns: with exit
code 5, and for a hang with the stacks of all threads.
"""

import faulthandler
import os
import re
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from mimir_shared.errors import MachineError
from mimir_train.parallel.hang import SILENCE_S, Standing, find_hang
from mimir_train.parallel.launch import Place

_TICK_S: Final = 0.5
_GRACE_S: Final = 10.0
"""A rank whose peer is gone mostly learns it by itself, and says it better: so long it may."""
_CONNECT_TIMEOUT_S: Final = 60.0
_MAX_LINE_BYTES: Final = 4096

_AT: Final = re.compile(r"at (?P<number>\d+) (?P<is_watched>[01]) (?P<name>.*)")

Gather = Callable[[Sequence[float]], list[list[float]]]


@dataclass(frozen=True)
class Phase:
    """What the main thread is at."""

    number: int
    name: str
    is_watched: bool


_START: Final = Phase(0, "its start", is_watched=False)


@dataclass
class _Known:
    """What a rank last said, and when, by the clock of the one that heard it."""

    phase: Phase
    since_s: float
    heard_s: float


class Watchdog:
    """Watches this rank, and through rank 0 the others."""

    def __init__(self, place: Place, timeout_s: float | None, gather: Gather) -> None:
        """
        Args:
            timeout_s: how long a step may take; None: hangs are not judged, lost ranks still are.
            gather: of `Parallel`: by it rank 0 tells where it listens.
        Raises: MachineError where rank 0 cannot be reached.
        """
        self._place, self._timeout_s = place, timeout_s
        self._phase = _START
        self._is_first_step = True
        self._clock_s = 0.0  # stands still while this process does: one that was suspended has not been slow
        self._known: dict[int, _Known] = {}
        self._links: dict[int, _Link] = {}
        self._stopping = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._server: socket.socket | None = None
        self._token = ""
        if place.world_size > 1:
            self._meet(gather)
        self._thread = threading.Thread(target=self._run, name="mimir-watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def watch(self, name: str) -> Iterator[None]:
        """Inside, the main thread takes its usual time, or hangs. The first time it may compile and warm up."""
        self._enter(name, is_watched=not self._is_first_step)
        try:
            yield
        finally:
            self._is_first_step = False
            self._enter(f"what follows {name}", is_watched=False)

    def stop(self, *, in_peace: bool) -> None:
        """Watch no longer.

        Args:
            in_peace: the others need not be ended by it.
        """
        self._stopping.set()
        self._thread.join()
        for link in self._links.values():
            if in_peace:
                link.send("bye")
            link.close()
        if self._server is not None:
            self._server.close()
        self._selector.close()

    def _enter(self, name: str, *, is_watched: bool) -> None:
        self._phase = Phase(self._phase.number + 1, name, is_watched)

    def _meet(self, gather: Gather) -> None:
        place = self._place
        port = token = 0
        if place.rank == 0:
            alone = place.local_world_size == place.world_size
            self._server = socket.create_server(("127.0.0.1" if alone else "", 0), backlog=place.world_size)
            self._selector.register(self._server, selectors.EVENT_READ)
            port, token = self._server.getsockname()[1], secrets.randbits(48)
        (port_told, token_told), *_ = gather([float(port), float(token)])
        self._token = f"{int(token_told):012x}"
        if place.rank > 0:
            alone = place.local_world_size == place.world_size
            address = ("127.0.0.1" if alone else place.master_address, int(port_told))
            try:
                connection = socket.create_connection(address, timeout=_CONNECT_TIMEOUT_S)
            except OSError as fault:
                raise MachineError(
                    f"rank {place.rank}: cannot reach rank 0 at {address[0]}:{address[1]} ({fault}); ranks must be "
                    f"able to connect to any port of each other"
                ) from fault
            self._add_link(0, connection)
            self._links[0].send(f"hello {self._token} {place.rank}")

    def _add_link(self, rank: int, connection: socket.socket) -> None:
        self._links[rank] = _Link(connection)
        self._known[rank] = _Known(_START, self._clock_s, self._clock_s)
        self._selector.register(connection, selectors.EVENT_READ, rank)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        before_s, spoken_s = time.monotonic(), -1.0
        own = _Known(self._phase, 0.0, 0.0)
        while not self._stopping.is_set():
            for key, _ in self._selector.select(_TICK_S) if self._selector.get_map() else ():
                self._hear(key.data)
            if not self._links and self._server is None:
                self._stopping.wait(_TICK_S)
            now_s = time.monotonic()
            self._clock_s += min(now_s - before_s, 2 * _TICK_S)
            before_s = now_s
            self._note(own, self._phase)
            if self._clock_s - spoken_s >= 1.0:
                spoken_s = self._clock_s
                self._speak()
            self._judge(own)

    def _note(self, known: _Known, phase: Phase) -> None:
        known.heard_s = self._clock_s
        if phase.number != known.phase.number:
            known.since_s = self._clock_s
        known.phase = phase

    def _speak(self) -> None:
        phase = self._phase
        for link in list(self._links.values()):
            link.send(f"at {phase.number} {int(phase.is_watched)} {phase.name}")

    def _hear(self, rank: int | None) -> None:
        if rank is None:
            self._accept()
            return
        for line in self._links[rank].receive():
            word, _, rest = line.partition(" ")
            at = _AT.fullmatch(line)  # a line may be cut, where one that was stopped goes on
            if at is not None:
                self._note(self._known[rank], Phase(int(at["number"]), at["name"], at["is_watched"] == "1"))
            elif word == "bye":
                self._forget(rank)
                return
            elif word == "lost":
                self._end_for_loss(rest)
            elif word == "hung":
                self._end_for_hang(rest)
        if self._links[rank].is_closed:
            self._forget(rank)
            self._end_for_loss(f"rank {rank}")

    def _accept(self) -> None:
        assert self._server is not None
        connection, _ = self._server.accept()
        connection.settimeout(5.0)
        try:
            # unbuffered: not a byte of what follows the first line may be taken
            word, token, rank = connection.makefile("rb", buffering=0).readline(64).decode().split()
        except (OSError, ValueError):  # whoever this is, it is none of us
            connection.close()
            return
        if word != "hello" or not secrets.compare_digest(token, self._token):
            connection.close()
            return
        self._add_link(int(rank), connection)

    def _forget(self, rank: int) -> None:
        link = self._links.pop(rank)
        self._selector.unregister(link.connection)
        link.close()
        self._known.pop(rank, None)

    def _judge(self, own: _Known) -> None:
        if self._timeout_s is None:
            return
        if self._place.rank > 0:
            hub = self._known.get(0)  # it judges for all, as long as it speaks
            if hub is None or self._clock_s - hub.heard_s <= max(self._timeout_s, SILENCE_S):
                return
        standings = [
            Standing(
                rank=rank,
                phase=known.phase.name,
                is_watched=known.phase.is_watched,
                age_s=self._clock_s - known.since_s,
                silence_s=self._clock_s - known.heard_s,
            )
            for rank, known in sorted({**self._known, self._place.rank: own}.items())
        ]
        reason = find_hang(standings, self._timeout_s)
        if reason is not None:
            self._end_for_hang(reason)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _end_for_loss(self, who: str) -> None:
        for link in self._links.values():
            link.send(f"lost {who}")
        if not self._stopping.wait(_GRACE_S):
            self._end(
                f"rank {self._place.rank}: {who} is gone; look at what it said, then run the same command again with "
                f"--resume-from-checkpoint latest"
            )

    def _end_for_hang(self, reason: str) -> None:
        for link in self._links.values():
            link.send(f"hung {reason}")
        sys.stderr.flush()
        os.write(2, f"rank {self._place.rank}: stacks of all threads, for the ranks hang\n".encode())
        faulthandler.dump_traceback(2, all_threads=True)
        self._end(
            f"rank {self._place.rank}: {reason}. See the stacks above; if steps are only that slow, raise "
            f"run.watchdog_s. Run the same command again with --resume-from-checkpoint latest"
        )

    def _end(self, message: str) -> None:
        os.write(2, f"error: {message}\n".encode())
        os._exit(MachineError.exit_code)  # the main thread may never come back to be asked


class _Link:
    """A connection on which lines of text go both ways."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.is_closed = False
        self._read = b""
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, line: str) -> None:
        try:
            self.connection.send(f"{line}\n".encode()[:_MAX_LINE_BYTES])
        except BlockingIOError:
            pass  # it reads nothing: it is stopped, and its silence tells
        except OSError:
            self.is_closed = True  # found when it is next read from

    def receive(self) -> list[str]:
        """The lines that came."""
        try:
            data = self.connection.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self.is_closed = True
            return []
        *lines, self._read = (self._read + data).split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def close(self) -> None:
        self.connection.close()
