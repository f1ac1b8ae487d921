"""A cache in a bucket: s3://, gs:// or az://, through obstore.

Credentials, region and endpoint come from the environment, configuration files or the machine's role, as the
services' own tools take them; there is no option for them. Every object is immutable, so that reading one twice
gives the same bytes and a lost answer to a write can be told from a lost race by reading back.
"""

import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from mimir_shared.errors import InputError, MachineError
from mimir_shared.failpoints import publishing_failpoint
from mimir_shared.process_identity import Life, owner_life, owner_stem
from mimir_shared.storage.bucket_leases import BucketLeaseStore
from mimir_shared.storage.bucket_objects import BucketObjects
from mimir_shared.storage.bucket_requests import RequestLimits
from mimir_shared.storage.disk import FULL
from mimir_shared.storage.folder import LocalStorage, TemporaryFile
from mimir_shared.storage.found_file import FoundFile
from mimir_shared.storage.local_read_cache import LocalReadCache

_READ_AHEAD: Final = 256
"""Objects of read_many that may be in memory at a time."""
_CLOCK_ASKED_EVERY_S: Final = 60.0
_LEASE_ACTION_S: Final = 5.0
_TEMPORARY: Final = "tmp"


class ObjectStorage:
    """A cache below a prefix of a bucket. Safe between threads; not to be used across a fork."""

    def __init__(
        self, location: str, local_cache: LocalReadCache | None = None, *, limits: RequestLimits | None = None
    ) -> None:
        """Nothing is requested yet. Raises InputError for a URL of another form.

        Args:
            local_cache: keeps what is read of data files, and the indexes of snapshots.
        """
        self._local_cache = local_cache
        self._limits = limits or RequestLimits()
        self._objects = BucketObjects(location, self._limits)
        self._lock = threading.Lock()
        self._appended: dict[str, bytes] = {}
        self._parts: ThreadPoolExecutor | None = None
        self._clock: tuple[float, float] | None = None
        """(the service's time, our monotonic time) of one moment."""
        self._spool = LocalStorage(Path(tempfile.gettempdir()) / f"mimir-uploads-{os.getuid()}")

    @property
    def root(self) -> str:
        return self._objects.root

    def where(self, name: str) -> str:
        return self._objects.where(name)

    def now_s(self) -> float:
        """Now, by the service's clock, which stamps the objects; to a second or two. It is asked once a minute."""
        asked = self._clock
        if asked is None or time.monotonic() - asked[1] > _CLOCK_ASKED_EVERY_S:
            probe = self._temporary_name()
            self._objects.put(probe, b"")
            asked = self._clock = (self._objects.get(probe).modified_s, time.monotonic())
            self.remove(probe)
        return asked[0] + time.monotonic() - asked[1]

    def lease_store(self) -> BucketLeaseStore:
        limits = replace(self._limits, action_s=min(_LEASE_ACTION_S, self._limits.action_s))
        limits = replace(limits, request_s=min(limits.request_s, limits.action_s))
        return BucketLeaseStore(self._objects, BucketObjects(self.root, limits), self.now_s)

    def exists(self, name: str) -> bool:
        # not HEAD: its answer has no body, and would not tell a missing object from a missing bucket
        try:
            self._objects.get_range("looking for it", name, 0, 1)
        except FileNotFoundError:
            return False
        return True

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError where there is none."""
        return self._objects.get_range("reading its size", name, 0, 1)[1]

    def read(self, name: str) -> bytes:
        """The whole object, large ones in parts. Raises FileNotFoundError where there is none."""
        if self._local_cache is not None and _is_kept(name):
            data = bytearray(self.size(name))
            filled = self.read_into(name, 0, [memoryview(data)])
            return bytes(data[:filled])
        first, size = self._objects.get_range("reading", name, 0, self._limits.part_bytes)
        if len(first) == size:
            return bytes(first)
        data = bytearray(size)
        data[: len(first)] = first
        filled = len(first) + self.read_into(name, len(first), [memoryview(data)[len(first) :]])
        if filled != size:
            raise MachineError(f"{self.where(name)}: reading failed: it had {size} bytes, then {filled}; run it again")
        return bytes(data)

    def read_many(self, names: Sequence[str]) -> Iterator[bytes]:
        """Whole objects in the order of their names, several requests at a time."""
        with ThreadPoolExecutor(self._limits.connections, "bucket") as pool:
            for first in range(0, len(names), _READ_AHEAD):
                yield from pool.map(self.read, names[first : first + _READ_AHEAD])

    def read_into(
        self,
        name: str,
        offset: int,
        buffers: Sequence[memoryview],
        seen: Callable[[memoryview], None] | None = None,
    ) -> int:
        """Fill buffers of bytes, one after the other, with what an object holds from `offset` on.

        Args:
            seen: is given the buffers, once they are filled: to be hashed.
        Returns: bytes read; fewer than the buffers take only where the object ends.
        Raises: FileNotFoundError; MachineError.
        """
        filled = self._read_kept_into(name, offset, buffers)
        if seen is not None:
            for buffer in buffers:
                seen(buffer)
        return filled

    def _read_kept_into(self, name: str, offset: int, buffers: Sequence[memoryview]) -> int:
        kept = self._local_cache if _is_kept(name) else None
        if kept is not None and kept.read_into(self.where(name), offset, buffers):
            return sum(map(len, buffers))
        filled = self._fetch_into(name, offset, buffers)
        if kept is not None and filled == sum(map(len, buffers)):
            kept.add(self.where(name), offset, buffers)
        return filled

    def forget(self, name: str, offset: int, nbytes: int) -> bool:
        """Drop what is kept of a range whose bytes are not those that were committed; it is worth reading again."""
        if self._local_cache is not None:
            self._local_cache.forget(self.where(name), offset, nbytes)
        return True

    def _fetch_into(self, name: str, offset: int, buffers: Sequence[memoryview]) -> int:
        wanted = sum(map(len, buffers))
        part = self._limits.part_bytes
        if not wanted:
            return 0
        first, size = self._objects.get_range("reading", name, offset, min(part, wanted))
        done = _scatter(first, buffers, 0)
        rest = range(part, min(wanted, size - offset), part)

        def read_part(start: int) -> int:
            data, _ = self._objects.get_range("reading", name, offset + start, min(part, wanted - start))
            return _scatter(data, buffers, start)

        return done + (sum(self._pool().map(read_part, rest)) if rest else 0)

    def list(self, directory: str) -> list[str]:
        """File and folder names directly below `directory`, sorted; empty where it does not exist. Never remembered."""
        return self._objects.names(directory)

    def files(self, directory: str) -> Iterator[FoundFile]:
        """Every object below `directory`, sorted."""
        yield from self._objects.files(directory)

    def check_writable(self) -> None:
        """Raise early where the bucket takes no objects, or would overwrite one that exists.

        Raises: MachineError; InputError for a service without conditional writes, on which no commit is safe.
        """
        probe = self._temporary_name()
        self.create(probe, b"first")
        safe = not self.create(probe, b"second")
        self.remove(probe)
        if not safe:
            raise InputError(
                f"{self.root}: the service overwrites an object that was to be created only if absent (If-None-Match), "
                f"so that workers could undo each other's commits; use a service that honours it"
            )

    @contextmanager
    def temporary(self) -> Iterator[TemporaryFile]:
        """A new file on this machine's disk, to be uploaded whole.

        Raises: OSError; of a full disk, with what was written, what is free, and how to choose another.
        """
        try:
            with self._spool.temporary() as file:
                yield file
        except OSError as fault:
            if fault.errno not in FULL:
                raise
            advice = "a shard lies there until it is uploaded: set TMPDIR to a folder with more room"
            raise OSError(fault.errno, f"{fault.strerror}; {advice}") from fault

    def create(self, name: str, data: bytes) -> bool:
        """Publish `data` under `name` if nothing has that name yet; False where something has."""
        publishing_failpoint(name, "written")
        created = self._objects.create(name, data)
        publishing_failpoint(name, "linked")
        return created

    def publish_content(self, temporary: TemporaryFile, name: str, sha256: str) -> None:
        """Upload a written temporary file under the name that follows from its content.

        An object of that name is written again: with the same bytes, whole or not at all. What arrives is compared by
        the service with the sha256 that each request names.
        """
        temporary.file.flush()
        publishing_failpoint(name, "written")
        self._objects.upload(name, temporary.path, os.stat(temporary.path).st_size)
        publishing_failpoint(name, "linked")

    def overwrite(self, name: str, data: bytes) -> None:
        """Write a file that nobody relies on, over what it held."""
        self._objects.put(name, data)

    def append(self, name: str, data: bytes) -> None:
        """Add to a file that this process alone writes; what it has written so far stays in memory."""
        self._appended[name] = self._appended.get(name, b"") + data
        self._objects.put(name, self._appended[name])

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        self._objects.delete(name)

    def remove_tree(self, name: str) -> None:
        """Remove an object, and all objects below that name."""
        for file in self._objects.files(name):
            self._objects.delete(file.name)
        self._objects.delete(name)

    def set_aside(self, name: str) -> str:
        """Take an object out of the cache; it can still be read under the name returned.

        Raises: FileNotFoundError where it is gone already.
        """
        aside = self._temporary_name()
        self._objects.copy(name, aside)
        self._objects.delete(name)
        return aside

    def put_back(self, aside: str, name: str) -> None:
        """Undo `set_aside`."""
        self._objects.copy(aside, name)

    def has_second_name(self, name: str) -> bool:
        """False: what is being uploaded has its temporary file on another disk."""
        return False

    def remove_empty_folder(self, directory: str) -> None:
        """Nothing to be done: a bucket has no folders."""

    def temporaries(self) -> dict[str, Life]:
        """Name of each object that was written for a moment only → what is known of the process that made it."""
        return {f"{_TEMPORARY}/{name}": owner_life(name) for name in self.list(_TEMPORARY)}

    def exists_durably(self, name: str) -> bool:
        return self.exists(name)  # what the service has confirmed, it keeps

    def settle(self, directory: str) -> None:
        """Nothing to be done: what the service has confirmed, it keeps."""

    def remove_abandoned(self) -> int:
        """Remove temporary files and objects whose process, on this machine, is dead. Returns how many."""
        abandoned = [name for name, life in self.temporaries().items() if life == "dead"]
        for name in abandoned:
            self.remove(name)
        return len(abandoned) + self._spool.remove_abandoned()

    def tidy(self) -> None:
        """Remove what this process has spooled and not uploaded."""
        self._spool.tidy()

    def stop_creating(self) -> None:
        self._spool.stop_creating()

    def _temporary_name(self) -> str:
        return f"{_TEMPORARY}/{owner_stem()}-{uuid.uuid4().hex}"

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._parts is None:
                self._parts = ThreadPoolExecutor(self._limits.connections, "bucket-parts")
            return self._parts


def _is_kept(name: str) -> bool:
    """Whether a name follows from the content, so that what was once read under it stays true."""
    return "/data/" in name or name.endswith("/index.arrow")


def _scatter(data: memoryview, buffers: Sequence[memoryview], begin: int) -> int:
    """Copy bytes to their places in buffers that follow one another, from byte `begin` of them all on."""
    taken = 0
    for buffer in buffers:
        if begin < len(buffer) and taken < len(data):
            count = min(len(buffer) - begin, len(data) - taken)
            buffer[begin : begin + count] = data[taken : taken + count]
            taken += count
        begin = max(begin - len(buffer), 0)
    return len(data)
