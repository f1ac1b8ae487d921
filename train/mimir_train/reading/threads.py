"""Threads that read, and what is known of each piece of work: done, failed, or its thread is gone.

A pool of futures would hide a thread that dies; here whoever waits finds out within a second.
"""

import threading
from queue import SimpleQueue
from typing import Final, Protocol

from mimir_shared.errors import MachineError

_LOOK_EVERY_S: Final = 1.0
"""How often who waits looks whether the threads are alive."""


class Work(Protocol):
    """Parts that threads may do in any order, each once."""

    @property
    def num_parts(self) -> int: ...

    def do(self, part: int) -> None: ...


class Job:
    """A work that was given to the threads."""

    def __init__(self, work: Work) -> None:
        self._work: Work | None = work
        self._left = work.num_parts
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self.faults: dict[int, BaseException] = {}
        """part → what it raised."""

    @property
    def is_finished(self) -> bool:
        return self._finished.is_set()

    def wait(self, timeout_s: float) -> bool:
        return self._finished.wait(timeout_s)

    def do(self, part: int) -> None:
        assert self._work is not None, f"part {part} of a job that is finished"
        try:
            self._work.do(part)
        except BaseException as fault:  # noqa: BLE001 (raised where the batch is asked for)
            self.faults[part] = fault
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._work = None  # which may know of this job: a circle would keep a batch's memory in use
                self._finished.set()


class ReaderThreads:
    """Some threads and one queue. To be closed."""

    def __init__(self, num_threads: int) -> None:
        self._queue: SimpleQueue[tuple[Job, int] | None] = SimpleQueue()
        self._closing = False
        self._threads = [
            threading.Thread(target=self._run, name=f"reader-{number}", daemon=True) for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, work: Work) -> Job:
        """Queue all parts of a work, behind those that were queued before."""
        job = Job(work)
        for part in range(work.num_parts):
            self._queue.put((job, part))
        return job

    def wait(self, job: Job) -> None:
        """Return when every part is done or has failed. Raises MachineError where a thread is gone."""
        while not job.wait(_LOOK_EVERY_S):
            self._check_alive()

    def close(self) -> None:
        """Stop; what is queued is left, what is being read is finished."""
        self._closing = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _check_alive(self) -> None:
        gone = [thread.name for thread in self._threads if not thread.is_alive()]
        if gone:
            raise MachineError(
                f"{', '.join(gone)}: {len(gone)} of {len(self._threads)} threads that read the cache ended without a "
                f"word; run the same command again with --resume-from-checkpoint latest"
            )

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            job, part = item
            if not self._closing:
                job.do(part)
            del item, job  # a thread that waits must not keep a batch's memory from being used again
