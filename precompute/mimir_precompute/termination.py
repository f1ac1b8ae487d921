"""SIGTERM ends a run at once and cleanly: what is committed stays, what is not has no name yet."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mimir_shared.storage_protocol import Storage

EXIT_CODE = 143


@contextmanager
def leave_on_sigterm(storage: Storage) -> Iterator[None]:
    """While the block runs, SIGTERM removes this process's temporary files and ends it with 143.

    A thread waits for the signal, for a handler of Python's would wait for the end of a long call into a
    library in the main thread. To be called from the main thread.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def wait_and_leave() -> None:
        # every signal that Python handles puts its number here; 0 is our own word that the block has ended
        while (number := receiver.recv(1)[0]) != signal.SIGTERM:
            if number == 0:
                return
        storage.remove_own_temporaries()
        sys.stderr.write("stopped by SIGTERM; what was committed stays, the same command goes on from there\n")
        sys.stderr.flush()
        os._exit(EXIT_CODE)

    handler_before = signal.signal(signal.SIGTERM, lambda *_: None)
    descriptor_before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    waiter = threading.Thread(target=wait_and_leave, name="sigterm", daemon=True)
    waiter.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor_before)
        signal.signal(signal.SIGTERM, handler_before)
        sender.send(b"\0")
        waiter.join()
        receiver.close()
        sender.close()
