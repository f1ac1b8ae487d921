"""Threads that work at once on what one hands to the next, and that end together.

A `Crew` has threads and the channels between them. Channels are bounded: whoever is ahead waits. The first exception
in any of the threads, or in the block of the crew, stops them all: a wait at a channel ends with `Stopped`, and the
block ends with that first exception as it was raised.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, Thread
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Stopped(Exception):
    """Another thread of the crew has failed; it never leaves the crew's block."""


class Channel(Generic[Item]):
    """A queue of at most `capacity` items between two threads of a crew."""

    def __init__(self, crew: "Crew", capacity: int) -> None:
        assert capacity >= 1, f"{capacity}"
        self._crew = crew
        self._capacity = capacity
        self._items: deque[Item] = deque()
        self._closed = False

    def put(self, item: Item) -> None:
        """Append an item, once there is room. Raises: Stopped."""
        with self._crew.waiting_until(lambda: len(self._items) < self._capacity):
            assert not self._closed, "put after close"
            self._items.append(item)

    def get(self) -> Item:
        """Take the first item, once there is one. Raises: Stopped."""
        with self._crew.waiting_until(lambda: bool(self._items)):
            return self._items.popleft()

    def close(self) -> None:
        """Say that no item follows, so that iteration ends after those that are there. Raises: Stopped."""
        with self._crew.waiting_until(lambda: True):
            self._closed = True

    def __iter__(self) -> Iterator[Item]:
        """Take items until the channel is closed and empty."""
        while True:
            with self._crew.waiting_until(lambda: bool(self._items) or self._closed):
                if not self._items:
                    return
                item = self._items.popleft()
            yield item
            del item  # a clip is fifty megabytes: not to be kept while the next one is waited for


class Crew:
    """Threads that begin within a `with` block and are over when it ends.

    The block ends when every thread has. After a failure waits end at once, and what runs is waited for: a thread
    cleans up behind itself.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._threads: list[Thread] = []
        self._running = 0
        self._stopped = False
        self._fault: BaseException | None = None
        self._wakes: list[Callable[[], None]] = []

    def channel(self, capacity: int) -> "Channel[Item]":
        """A channel between threads of this crew."""
        return Channel(self, capacity)

    def start(self, name: str, work: Callable[[], None], *, wake: Callable[[], None] | None = None) -> None:
        """Run `work` in a thread.

        Args:
            wake: called from another thread when the crew stops after a failure, to end a wait of `work` that is not
                at a channel of the crew. Must be harmless if called at any time.
        """
        # daemon: a thread that hangs in a system call must not outlive a second Ctrl-C
        thread = Thread(target=self._run, args=(work,), name=name, daemon=True)
        if wake is not None:
            self._wakes.append(wake)
        self._threads.append(thread)
        self._running += 1
        thread.start()

    @contextmanager
    def waiting_until(self, is_true: Callable[[], bool]) -> Iterator[None]:
        """Wait for a condition, then hold the crew's lock for a block that changes what others wait for."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or is_true())
            if self._stopped:
                raise Stopped
            yield
            self._changed.notify_all()

    def __enter__(self) -> "Crew":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if fault is None:
                self._wait_for_all()
            else:
                self._stop(fault)
        finally:
            self._join()
        if self._fault is not None and (fault is None or isinstance(fault, Stopped)):
            context = self._fault.__context__
            try:
                raise self._fault
            finally:
                # what it was raised in the handling of, and not our own `Stopped`
                self._fault.__context__ = context

    def _wait_for_all(self) -> None:
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._running == 0)
        except BaseException as interrupt:  # Ctrl-C while the last shard is written
            self._stop(interrupt)
            raise

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Stopped:
            pass
        except BaseException as fault:  # handed to the thread that owns the crew  # noqa: BLE001
            self._stop(fault)
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _stop(self, fault: BaseException) -> None:
        with self._changed:
            if self._stopped:
                return
            self._stopped = True
            self._fault = fault
            self._changed.notify_all()
        for wake in self._wakes:
            wake()

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()
