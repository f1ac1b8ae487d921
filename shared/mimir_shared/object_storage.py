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
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from mimir_shared.bucket_client import open_store, parse_location, runtime_owner
from mimir_shared.bucket_leases import BucketLeaseStore
from mimir_shared.bucket_requests import IncompleteAnswerError, Requester, RequestLimits, describe_fault
from mimir_shared.errors import InputError, MachineError
from mimir_shared.local_read_cache import LocalReadCache
from mimir_shared.storage import LocalStorage, TemporaryFile

if TYPE_CHECKING:
    from obstore import UpdateVersion  # known to type checkers alone

_UPLOADS: Final = 8
"""Parts of one object that are written at a time."""
_SMALLEST_PART: Final = 5 << 20
"""That S3 takes, but for the last."""
_READ_AHEAD: Final = 256
"""Objects of read_many that may be in memory at a time."""
_CLOCK_ASKED_EVERY_S: Final = 60.0
_LEASE_ACTION_S: Final = 5.0


@dataclass(frozen=True, kw_only=True)
class VersionedObject:
    """A small object, and what a write must name to replace just this state of it."""

    data: bytes
    modified_s: float
    """By the service's clock, in whole seconds on S3."""
    version: tuple[str, str]
    """Entity tag and version, empty where the service gives none."""


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
        self._scheme, self._bucket, self._prefix = parse_location(location)
        self._limits = limits or RequestLimits()
        self._requester = Requester(self._limits)
        self._lock = threading.Lock()
        self._stores: dict[bool, Any] = {}
        self._parts: ThreadPoolExecutor | None = None
        self._clock: tuple[float, float] | None = None
        """(the service's time, our monotonic time) of one moment."""
        self._spool = LocalStorage(Path(tempfile.gettempdir()) / f"mimir-uploads-{os.getuid()}")

    @property
    def root(self) -> str:
        return f"{self._scheme}://{self._bucket}" + (f"/{self._prefix}" if self._prefix else "")

    def where(self, name: str) -> str:
        return f"{self.root}/{name}"

    def now_s(self) -> float:
        """Now, by the service's clock, which stamps the objects; to a second or two. It is asked once a minute."""
        asked = self._clock
        if asked is None or time.monotonic() - asked[1] > _CLOCK_ASKED_EVERY_S:
            probe = f"tmp/clock-{uuid.uuid4().hex}"
            self.create(probe, b"")
            asked = self._clock = (self.read_versioned(probe).modified_s, time.monotonic())
            self.remove(probe)
        return asked[0] + time.monotonic() - asked[1]

    def lease_store(self) -> BucketLeaseStore:
        limits = replace(self._limits, action_s=min(_LEASE_ACTION_S, self._limits.action_s))
        limits = replace(limits, request_s=min(limits.request_s, limits.action_s))
        return BucketLeaseStore(self, ObjectStorage(self.root, limits=limits))

    def exists(self, name: str) -> bool:
        # not HEAD: its answer has no body, and would not tell a missing object from a missing bucket
        try:
            self._get_range("looking for it", name, 0, 1)
        except FileNotFoundError:
            return False
        return True

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError where there is none."""
        return self._get_range("reading its size", name, 0, 1)[1]

    def read(self, name: str) -> bytes:
        """The whole object, large ones in parts. Raises FileNotFoundError where there is none."""
        if self._local_cache is not None and _is_kept(name):
            data = bytearray(self.size(name))
            filled = self.read_into(name, 0, [memoryview(data)])
            return bytes(data[:filled])
        first, size = self._get_range("reading", name, 0, self._limits.part_bytes)
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
        first, size = self._get_range("reading", name, offset, min(part, wanted))
        done = _scatter(first, buffers, 0)
        rest = range(part, min(wanted, size - offset), part)

        def read_part(start: int) -> int:
            data, _ = self._get_range("reading", name, offset + start, min(part, wanted - start))
            return _scatter(data, buffers, start)

        return done + (sum(self._pool().map(read_part, rest)) if rest else 0)

    def list(self, directory: str) -> list[str]:
        """File and folder names directly below `directory`, sorted; empty where it does not exist. Never remembered."""
        found = self._requester.run(
            f"listing in bucket {self._bucket}",
            self.where(directory),
            lambda: obstore.list_with_delimiter(self._store(), directory),
        )
        names = {prefix.rstrip("/").rsplit("/", 1)[-1] for prefix in found["common_prefixes"]}
        names |= {entry["path"].rsplit("/", 1)[-1] for entry in found["objects"]}
        return sorted(names)

    def check_writable(self) -> None:
        """Raise early where the bucket takes no objects, or would overwrite one that exists.

        Raises: MachineError; InputError for a service without conditional writes, on which no commit is safe.
        """
        probe = f"tmp/probe-{uuid.uuid4().hex}"
        self.create(probe, b"first")
        safe = not self.create(probe, b"second")
        self.remove(probe)
        if not safe:
            raise InputError(
                f"{self.root}: the service overwrites an object that was to be created only if absent (If-None-Match), "
                f"so that workers could undo each other's commits; use a service that honours it"
            )

    def temporary(self) -> AbstractContextManager[TemporaryFile]:
        """A new file on this machine's disk, to be uploaded whole."""
        return self._spool.temporary()

    def create(self, name: str, data: bytes) -> bool:
        """Publish `data` under `name` if nothing has that name yet; False where something has."""
        attempts = 0

        def put() -> bool:
            nonlocal attempts
            attempts += 1
            try:
                obstore.put(self._store(), name, data, mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError) as taken:
                if describe_fault(taken).status != 412:
                    raise  # 409: another writer is at it now, nothing is decided
                # An earlier try of ours may have been done and its answer lost: then the bytes are ours.
                return attempts > 1 and self.read(name) == data
            return True

        return self._requester.run(f"writing to bucket {self._bucket}", self.where(name), put)

    def read_versioned(self, name: str) -> VersionedObject:
        """A small object with its version. Raises FileNotFoundError where there is none."""

        def get() -> VersionedObject:
            answer = obstore.get(self._store(), name)
            meta = answer.meta
            data = bytes(answer.bytes())
            if len(data) != meta["size"]:
                raise IncompleteAnswerError
            version = (meta["e_tag"] or "", meta["version"] or "")
            return VersionedObject(data=data, modified_s=meta["last_modified"].timestamp(), version=version)

        return self._requester.run(f"reading in bucket {self._bucket}", self.where(name), get)

    def replace(self, name: str, data: bytes, version: tuple[str, str]) -> tuple[str, str] | None:
        """Write `data`, which no other write ever has, over an object that still has the version that was read.

        Returns: its version now; None where it was another one before, or gone, and nothing was written.
        """
        e_tag, number = version
        mode: UpdateVersion = {}
        if e_tag:
            mode["e_tag"] = e_tag
        if number:
            mode["version"] = number
        attempts = 0

        def put() -> tuple[str, str] | None:
            nonlocal attempts
            attempts += 1
            try:
                written = obstore.put(self._store(), name, data, mode=mode, use_multipart=False)
            except (PreconditionError, FileNotFoundError) as refused:
                fault = describe_fault(refused)
                if fault.advice or fault.status not in (404, 412):
                    raise
                # An earlier try of ours may have been done and its answer lost: then the bytes are ours.
                return self._version_with(name, data) if attempts > 1 else None
            return written["e_tag"] or "", written["version"] or ""

        return self._requester.run(f"writing to bucket {self._bucket}", self.where(name), put)

    def _version_with(self, name: str, data: bytes) -> tuple[str, str] | None:
        try:
            found = self.read_versioned(name)
        except FileNotFoundError:
            return None
        return found.version if found.data == data else None

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        self._requester.run(
            f"removing from bucket {self._bucket}", self.where(name), lambda: obstore.delete(self._store(), name)
        )

    def publish_content(self, temporary: TemporaryFile, name: str, sha256: str) -> None:
        """Upload a written temporary file under the name that follows from its content.

        An object of that name is written again: with the same bytes, whole or not at all.
        """
        temporary.file.flush()
        nbytes = os.stat(temporary.path).st_size
        part = max(_SMALLEST_PART, self._limits.part_bytes)

        def upload() -> None:
            try:
                store = self._store(retries=True)
                obstore.put(store, name, temporary.path, chunk_size=part, max_concurrency=_UPLOADS)
            except (BaseError, FileNotFoundError):
                # the answer to the last step may be lost, and that step cannot be repeated
                if not self._has_size(name, nbytes):
                    raise

        self._requester.run(f"writing to bucket {self._bucket}", self.where(name), upload)
        if not self._has_size(name, nbytes):
            raise MachineError(
                f"{self.where(name)}: writing failed: {nbytes} bytes were sent, other are there; run it again"
            )

    def exists_durably(self, name: str) -> bool:
        return self.exists(name)  # what the service has confirmed, it keeps

    def settle(self, directory: str) -> None:
        """Nothing to be done: what the service has confirmed, it keeps."""

    def remove_abandoned(self) -> int:
        """Remove spooled files whose process, on this machine, is dead. Returns how many."""
        return self._spool.remove_abandoned()

    def tidy(self) -> None:
        """Remove what this process has spooled and not uploaded."""
        self._spool.tidy()

    def stop_creating(self) -> None:
        self._spool.stop_creating()

    def _has_size(self, name: str, nbytes: int) -> bool:
        try:
            return self.size(name) == nbytes
        except FileNotFoundError:
            return False

    def _get_range(self, action: str, name: str, offset: int, nbytes: int) -> tuple[memoryview, int]:
        """(bytes, size of the object); fewer bytes than asked for only where the object ends."""

        def get() -> tuple[memoryview, int]:
            answer = obstore.get(self._store(), name, options={"range": (offset, offset + nbytes)})
            begin, end = answer.range
            size = answer.meta["size"]
            data = memoryview(answer.bytes())
            if begin != offset or end != min(offset + nbytes, size) or len(data) != end - begin:
                raise IncompleteAnswerError
            return data, size

        try:
            return self._requester.run(f"{action} in bucket {self._bucket}", self.where(name), get)
        except BaseError as fault:
            if describe_fault(fault).status != 416:
                raise
            return memoryview(b""), offset  # the object ends at `offset` or before it

    def _store(self, *, retries: bool = False) -> Any:  # a class of obstore's for each service
        runtime_owner.check(self.root)
        with self._lock:
            if retries not in self._stores:
                self._stores[retries] = open_store(self._scheme, self._bucket, self._prefix, self._limits, retries)
            return self._stores[retries]

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
