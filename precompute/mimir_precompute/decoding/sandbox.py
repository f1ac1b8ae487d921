"""Decoding in child processes: a clip that hangs, crashes or swallows memory costs itself alone.

Children are kept for the clips that follow; each has one clip at a time, and there are as many as threads that ask at
once. THE RULE OF BLAME: a clip is rejected as crashed_decoder, timeout or out_of_memory only when three children in
a row failed so that had never had another clip. A child that was killed from outside, a disk that fails or
does not answer, a host without memory or descriptors raise MachineError: they are no clip's fault. When the worker
itself dies, nobody is left to blame a clip, and the next worker tries it afresh.

What children say is not believed: they have met hostile bytes. Pixels come back in shared memory of a size that the
worker has chosen and sealed.
"""

import contextlib
import fcntl
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mimir_precompute.clips.rejection import ClipRejected
from mimir_precompute.clips.source import SourceFile, hash_file, open_source, reading_failed, source_name
from mimir_precompute.config import Bucket, DecodeLimits, Geometry
from mimir_precompute.decoding.clip_pixels import ClipInfo, ClipPixels, of_source
from mimir_precompute.decoding.frames import Pixels
from mimir_precompute.decoding.process import CHILD_PROGRAM, DecodeChild, DecoderFailed, EndedFromOutside
from mimir_precompute.decoding.replies import (
    AnyReply,
    FailedReply,
    InfoReply,
    MachineReply,
    PixelsReply,
    RejectedReply,
    StillReply,
    nonsense,
    parse_reply,
)
from mimir_shared.errors import MachineError

ATTEMPTS = 3
T = TypeVar("T")


class DecodeSandbox:
    """A ClipDecoder whose work is done by child processes. For many threads at once; close it, or use it in `with`.

    Children are started when they are needed, and end with this process, whatever ends it.
    """

    def __init__(self, limits: DecodeLimits | None = None, *, program: Sequence[str] = CHILD_PROGRAM) -> None:
        """
        Args:
            program: arguments of Python that start a child; tests give one that misbehaves.
        """
        self._limits = limits or DecodeLimits()
        self._program = tuple(program)
        self._lock = threading.Lock()
        self._is_closed = False
        self._children: set[DecodeChild] = set()
        self._idle: list[DecodeChild] = []
        # the kernel ends a child with the thread that started it: this one stays as long as the process
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="start-decoder")

    def __enter__(self) -> "DecodeSandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all children, also those that decode."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            for child in self._children.difference(idle):
                child.kill()  # whoever asks it hears of it, and ends it
            self._children.clear()
        for child in idle:
            child.end()
        self._starter.shutdown()

    def decode(
        self, source: bytes | Path, *, geometry: Geometry, start_s: float | None = None, end_s: float | None = None
    ) -> ClipPixels:
        """As clips.read_clip, but in a child. Raises: ClipRejected, MachineError."""
        buckets = {str(bucket): bucket for bucket in geometry.buckets}
        request = {"want": "pixels", "buckets": [*buckets], "fps": geometry.fps, "start_s": start_s, "end_s": end_s}
        num_bytes = max(math.prod(_shape(bucket)) for bucket in geometry.buckets)

        def accept(reply: AnyReply) -> Bucket | None:
            return buckets.get(reply.bucket) if isinstance(reply, PixelsReply) else None

        with open_source(source) as file:
            source_xxh3 = hash_file(file)
            with of_source(source_xxh3), _shared_memory(num_bytes) as memory:
                bucket = self._ask(request, source, file, memory, accept)
                return ClipPixels(pixels=_view(memory, _shape(bucket)), bucket=bucket, source_xxh3=source_xxh3)

    def probe(self, source: bytes | Path) -> ClipInfo:
        """As clips.probe_clip, but in a child. Raises: ClipRejected, MachineError."""

        def accept(reply: AnyReply) -> ClipInfo | None:
            return ClipInfo(**reply.model_dump(exclude={"outcome"})) if isinstance(reply, InfoReply) else None

        with open_source(source) as file, _shared_memory(mmap.PAGESIZE) as memory:
            return self._ask({"want": "info"}, source, file, memory, accept)

    def read_first_frame(self, source: bytes | Path, *, longest_side: int, start_s: float | None = None) -> Pixels:
        """As clips.read_first_frame, but in a child. Raises: ClipRejected, MachineError."""
        side = 16 * math.ceil(longest_side / 16)

        def accept(reply: AnyReply) -> tuple[int, int, int] | None:
            fits = isinstance(reply, StillReply) and max(reply.height, reply.width) <= side
            return (reply.height, reply.width, 3) if isinstance(reply, StillReply) and fits else None

        request = {"want": "still", "longest_side": longest_side, "start_s": start_s}
        with open_source(source) as file, _shared_memory(side * side * 3) as memory:
            return _view(memory, self._ask(request, source, file, memory, accept))

    def _ask(
        self,
        request: dict[str, Any],
        source: bytes | Path,
        file: SourceFile,
        memory: int,
        accept: Callable[[AnyReply], T | None],
    ) -> T:
        """Let children try until one answers or the clip is to blame: see the rule at the top."""
        failures = interruptions = 0
        fresh = False
        with _descriptor(source, file) as clip:
            while True:
                child = self._take(fresh=fresh)
                fresh = True
                is_alone = child.num_asked == 0
                try:
                    return self._attempt(child, request, (clip, memory), source, accept)
                except EndedFromOutside:
                    interruptions += 1
                    if interruptions == ATTEMPTS:
                        raise MachineError(
                            f"{source_name(source)}: the process that decoded it was killed {ATTEMPTS} times from "
                            "outside, most likely because the machine has no memory left; no clip is to blame: lower "
                            "--decode-workers and run the same command again"
                        ) from None
                except DecoderFailed as failure:
                    if failure.reason == "out_of_memory":
                        self._refuse_poor_host()
                    # what an earlier clip has left behind may be the cause: that attempt counts for nothing
                    failures += is_alone
                    if failures == ATTEMPTS:
                        raise ClipRejected("decode", failure.reason, failure.detail) from failure

    def _attempt(
        self,
        child: DecodeChild,
        request: dict[str, Any],
        descriptors: tuple[int, int],
        source: bytes | Path,
        accept: Callable[[AnyReply], T | None],
    ) -> T:
        """One answer of one child, which is kept for other clips if it has answered sensibly."""
        is_sound = False
        try:
            reply = parse_reply(child.ask(request, descriptors))
            if isinstance(reply, MachineReply):
                raise reading_failed(source, os.strerror(reply.errno))
            if isinstance(reply, FailedReply):
                raise reply.failure()
            if isinstance(reply, RejectedReply):
                is_sound = True
                raise ClipRejected(reply.stage, reply.reason, reply.detail)
            result = accept(reply)
            if result is None:
                raise nonsense()
            is_sound = True
            return result
        except TimeoutError as stall:
            raise reading_failed(source, stall.strerror) from stall
        finally:
            self._give_back(child, is_sound)

    def _take(self, *, fresh: bool) -> DecodeChild:
        """A child that waits, if it may have had other clips; else a new one."""
        with self._lock:
            if self._is_closed:
                raise MachineError("decoding was stopped; run the same command again")
            if self._idle and not fresh:
                return self._idle.pop()
        try:
            child = self._starter.submit(DecodeChild, self._program, self._limits).result()
        except OSError as fault:
            raise _no_means(fault) from fault
        with self._lock:
            self._children.add(child)
        try:
            child.wait_until_ready()
        except BaseException:
            self._give_back(child, is_sound=False)
            raise
        return child

    def _give_back(self, child: DecodeChild, is_sound: bool) -> None:
        with self._lock:
            if is_sound and child in self._children:
                self._idle.append(child)
                return
            self._children.discard(child)
        child.end()

    def _refuse_poor_host(self) -> None:
        """Raise MachineError where a child cannot have had the memory that it may have."""
        num_bytes = int(self._limits.memory_gb * 1e9)
        try:
            mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
        except (OSError, MemoryError, OverflowError) as fault:
            raise MachineError(
                f"this machine does not give the {self._limits.memory_gb:g} GB of --decode-memory-gb to a process; no "
                "clip is to blame: lower it or --decode-workers and run the same command again"
            ) from fault


def _no_means(fault: OSError) -> MachineError:
    return MachineError(
        f"a clip cannot be decoded: {fault.strerror}; no clip is to blame: mend the limits of the machine and run the "
        "same command again"
    )


def _shape(bucket: Bucket) -> tuple[int, int, int, int]:
    return bucket.frames, bucket.height, bucket.width, 3


@contextlib.contextmanager
def _shared_memory(num_bytes: int) -> Iterator[int]:
    """Descriptor of memory whose size nobody can change: else a child could make reading it here a bus error."""
    try:
        memory = os.memfd_create("clip-pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(memory, num_bytes)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(memory)
            raise
    except OSError as fault:
        raise _no_means(fault) from fault
    try:
        yield memory
    finally:
        os.close(memory)


def _view(memory: int, shape: tuple[int, ...]) -> Pixels:
    """The pixels where the child has written them: no copy; the memory goes with the last array on it."""
    try:
        return np.frombuffer(mmap.mmap(memory, 0), np.uint8, math.prod(shape)).reshape(shape)
    except OSError as fault:
        raise _no_means(fault) from fault


@contextlib.contextmanager
def _descriptor(source: bytes | Path, file: SourceFile) -> Iterator[int]:
    """Of a file that a child can read the clip from."""
    if isinstance(source, Path):
        yield file.fileno()
        return
    try:
        memory = os.memfd_create("clip", os.MFD_CLOEXEC)
    except OSError as fault:
        raise _no_means(fault) from fault
    with os.fdopen(memory, "wb") as copy:
        copy.write(source)
        copy.flush()
        yield memory
