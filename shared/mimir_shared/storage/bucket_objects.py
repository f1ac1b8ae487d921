"""What is asked of a bucket: each method is one action, tried again while that makes sense (bucket_requests.py).

Writes that must not undo another's are conditional: only where there is nothing yet (If-None-Match), or only over the
version that was read (If-Match). The answer to such a write may be lost, and the next try refused because the first
was done: then what is there is compared with what was sent.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from mimir_shared.errors import MachineError
from mimir_shared.storage.bucket_client import open_store, parse_location, runtime_owner
from mimir_shared.storage.bucket_requests import Answer, IncompleteAnswerError, Requester, RequestLimits, describe_fault
from mimir_shared.storage.found_file import FoundFile

if TYPE_CHECKING:
    from obstore import ListResult, ObjectMeta, UpdateVersion  # known to type checkers alone

_UPLOADS: Final = 8
"""Parts of one object that are written at a time."""
_SMALLEST_PART: Final = 5 << 20
"""That S3 takes, but for the last."""

Version = tuple[str, str]
"""Entity tag and version, empty where the service gives none."""


@dataclass(frozen=True, kw_only=True)
class VersionedObject:
    """A small object, and what a write must name to replace just this state of it."""

    data: bytes
    modified_s: float
    """By the service's clock, in whole seconds on S3."""
    version: Version


class BucketObjects:
    """The objects below a prefix of a bucket. Safe between threads; not to be used across a fork."""

    def __init__(self, location: str, limits: RequestLimits) -> None:
        """Nothing is requested yet. Raises InputError for a URL of another form."""
        self._scheme, self.bucket, self._prefix = parse_location(location)
        self.limits = limits
        self._requester = Requester(limits)
        self._lock = threading.Lock()
        self._stores: dict[bool, Any] = {}

    @property
    def root(self) -> str:
        return f"{self._scheme}://{self.bucket}" + (f"/{self._prefix}" if self._prefix else "")

    def where(self, name: str) -> str:
        return f"{self.root}/{name}"

    def get_range(self, action: str, name: str, offset: int, nbytes: int) -> tuple[memoryview, int]:
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
            return self._requester.run(f"{action} in bucket {self.bucket}", self.where(name), get)
        except BaseError as fault:
            if describe_fault(fault).status != 416:
                raise
            return memoryview(b""), offset  # the object ends at `offset` or before it

    def get(self, name: str) -> VersionedObject:
        """A small object with its version. Raises FileNotFoundError where there is none."""

        def get() -> VersionedObject:
            answer = obstore.get(self._store(), name)
            meta = answer.meta
            data = bytes(answer.bytes())
            if len(data) != meta["size"]:
                raise IncompleteAnswerError
            version = (meta["e_tag"] or "", meta["version"] or "")
            return VersionedObject(data=data, modified_s=meta["last_modified"].timestamp(), version=version)

        return self._requester.run(f"reading in bucket {self.bucket}", self.where(name), get)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object if there is none of that name; False where there is one."""
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
                return attempts > 1 and self._version_with(name, data) is not None
            return True

        return self._write(name, put)

    def replace(self, name: str, data: bytes, version: Version) -> Version | None:
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

        def put() -> Version | None:
            nonlocal attempts
            attempts += 1
            try:
                written = obstore.put(self._store(), name, data, mode=mode, use_multipart=False)
            except (PreconditionError, FileNotFoundError) as refused:
                fault = describe_fault(refused)
                if fault.advice or fault.status not in (404, 412):
                    raise
                return self._version_with(name, data) if attempts > 1 else None
            return written["e_tag"] or "", written["version"] or ""

        return self._write(name, put)

    def put(self, name: str, data: bytes) -> None:
        """Write an object, over one that has the name: to be done only where both are worth the same."""
        self._write(name, lambda: obstore.put(self._store(), name, data, use_multipart=False))

    def upload(self, name: str, path: Path, nbytes: int) -> None:
        """Write a file as an object, large ones in parts; over one that has the name, whole or not at all."""
        part = max(_SMALLEST_PART, self.limits.part_bytes)
        if nbytes <= part:
            self.put(name, path.read_bytes())
            return
        before = self._state(name)

        def upload() -> None:
            try:
                store = self._store(retries=True)
                obstore.put(store, name, path, chunk_size=part, max_concurrency=_UPLOADS)
            except (BaseError, FileNotFoundError) as failed:
                # The answer to the last step may be lost, and that step cannot be repeated: "no such upload".
                state = self._state(name)
                if state is not None and state != before and state[0] == nbytes:
                    return
                if isinstance(failed, FileNotFoundError) and not describe_fault(failed).advice:
                    raise IncompleteAnswerError from None  # it is begun once more
                raise

        self._write(name, upload)
        state = self._state(name)
        if state is None or state[0] != nbytes:
            raise MachineError(
                f"{self.where(name)}: writing failed: {nbytes} bytes were sent, other are there; run it again"
            )

    def delete(self, name: str) -> None:
        """Remove an object, if it is there."""
        self._requester.run(
            f"removing from bucket {self.bucket}", self.where(name), lambda: obstore.delete(self._store(), name)
        )

    def copy(self, name: str, target: str) -> None:
        """Write an object once more under another name. Raises FileNotFoundError where there is none."""
        self._requester.run(
            f"copying in bucket {self.bucket}", self.where(name), lambda: obstore.copy(self._store(), name, target)
        )

    def names(self, directory: str) -> list[str]:
        """Names directly below `directory`, sorted; empty where there is none."""
        found = self._list(directory)
        names = {prefix.rstrip("/").rsplit("/", 1)[-1] for prefix in found["common_prefixes"]}
        names |= {entry["path"].rsplit("/", 1)[-1] for entry in found["objects"]}
        return sorted(names)

    def sizes(self, directory: str) -> dict[str, int]:
        """Name → bytes of the objects directly below `directory`."""
        return {entry["path"].rsplit("/", 1)[-1]: entry["size"] for entry in self._list(directory)["objects"]}

    def files(self, directory: str) -> list[FoundFile]:
        """Every object below `directory`, sorted."""

        def list_all() -> list[FoundFile]:
            return [
                FoundFile(name=entry["path"], nbytes=entry["size"], modified_s=entry["last_modified"].timestamp())
                for page in obstore.list(self._store(), directory)
                for entry in page
            ]

        found = self._requester.run(f"listing in bucket {self.bucket}", self.where(directory), list_all)
        return sorted(found, key=lambda file: file.name)

    def _list(self, directory: str) -> "ListResult[Sequence[ObjectMeta]]":
        return self._requester.run(
            f"listing in bucket {self.bucket}",
            self.where(directory),
            lambda: obstore.list_with_delimiter(self._store(), directory or None),
        )

    def _write(self, name: str, request: Callable[[], Answer]) -> Answer:
        return self._requester.run(f"writing to bucket {self.bucket}", self.where(name), request)

    def _version_with(self, name: str, data: bytes) -> Version | None:
        """The version of an object that holds these bytes; None where it does not, or is gone."""
        try:
            found = self.get(name)
        except FileNotFoundError:
            return None
        return found.version if found.data == data else None

    def _state(self, name: str) -> tuple[int, Version, float] | None:
        """Size, version and time of an object; None where there is none."""

        def get() -> tuple[int, Version, float]:
            # not HEAD: its answer has no body, and would not tell a missing object from a missing bucket
            meta = obstore.get(self._store(), name, options={"range": (0, 1)}).meta
            return meta["size"], (meta["e_tag"] or "", meta["version"] or ""), meta["last_modified"].timestamp()

        try:
            return self._requester.run(f"reading its size in bucket {self.bucket}", self.where(name), get)
        except FileNotFoundError:
            return None

    def _store(self, *, retries: bool = False) -> Any:  # a class of obstore's for each service
        runtime_owner.check(self.root)
        with self._lock:
            if retries not in self._stores:
                self._stores[retries] = open_store(self._scheme, self.bucket, self._prefix, self.limits, retries)
            return self._stores[retries]
