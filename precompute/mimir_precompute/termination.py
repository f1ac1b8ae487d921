"""SIGTERM and SIGINT end a run at once and cleanly: what is committed stays, what is not has no name yet."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mimir_shared.storage.protocol import Storage

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


class _Endings:
    """What is to be done when a signal ends this process, last registered first."""

    def __init__(self) -> None:
        self._actions: list[Callable[[], None]] = []

    def add(self, action: Callable[[], None]) -> None:
        self._actions.append(action)

    def remove(self, action: Callable[[], None]) -> None:
        with contextlib.suppress(ValueError):
            self._actions.remove(action)

    def run(self) -> None:
        for action in reversed(self._actions.copy()):
            # OSError: it is over already, or the disk has failed; the process ends all the same
            with contextlib.suppress(OSError, ValueError):
                action()


_endings = _Endings()


@contextmanager
def when_stopped(action: Callable[[], None]) -> Iterator[None]:
    """While the block runs, have `action` called if a signal ends this process. It must be quick."""
    _endings.add(action)
    try:
        yield
    finally:
        _endings.remove(action)


def leave_nothing(storage: Storage) -> None:
    """Drop leases, remove temporary files and let none be made any more: this process is about to end."""
    _endings.run()
    storage.stop_creating()
    with contextlib.suppress(Exception):
        storage.tidy()


@contextmanager
def working_on(storage: Storage) -> Iterator[None]:
    """While the block runs, SIGTERM ends the process with 143 and SIGINT with 130, leaving nothing behind.

    Leases are dropped and temporary files removed (the latter also when the block ends); children end by
    themselves, for they ask the system to (PR_SET_PDEATHSIG). A thread waits for the signal, for a handler of
    Python's would wait for the end of a long call into a library in the main thread. To be called from there.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def wait_and_leave() -> None:
        # every signal that Python handles puts its number here; 0 is our own word that the block has ended
        while (number := receiver.recv(1)[0]) not in EXIT_CODES:
            if number == 0:
                return
        leave_nothing(storage)
        name = signal.Signals(number).name
        with contextlib.suppress(OSError, ValueError):  # whoever would read it may have gone first
            sys.stderr.write(f"stopped by {name}; what was committed stays, the same command goes on from there\n")
            sys.stderr.flush()
        os._exit(EXIT_CODES[signal.Signals(number)])

    handlers_before = {number: signal.signal(number, lambda *_: None) for number in EXIT_CODES}
    descriptor_before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    waiter = threading.Thread(target=wait_and_leave, name="signals", daemon=True)
    waiter.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor_before)
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
        sender.send(b"\0")
        waiter.join()
        receiver.close()
        sender.close()
        storage.tidy()
