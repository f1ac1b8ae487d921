"""Who works on a cache right now, and how fast: one small file for each worker, written anew every few seconds.

These files are for eyes alone. What is done stands in the commit records, and nothing is decided by what is here; a
file that is missing, torn or old makes a line of `status` wrong and nothing else.
"""

import contextlib
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from mimir_shared.errors import MimirError
from mimir_shared.process_identity import life_of, process_domain
from mimir_shared.storage.protocol import Storage

DIRECTORY: Final = "logs/workers"
BEAT_S: Final = 10.0
STALE_S: Final = 6 * BEAT_S
"""A worker that has not written for so long is stopped, cut off or dead."""
FORGOTTEN_S: Final = 24 * 3600.0
"""Files as old as this are removed by the next worker, and shown no more."""
_REMOVE_TIMEOUT_S: Final = 2.0
"""Of waiting for a report that is being written: a disk that hangs must not hold up who was told to end."""

WorkerState = Literal["working", "stale", "dead"]
"""stale: not heard of for STALE_S; dead: its process, on this machine, has ended without saying so."""


class WorkerReport(BaseModel):
    """What a worker says of itself."""

    model_config = ConfigDict(frozen=True)
    host: str
    pid: int
    domain: str
    feature: str
    fingerprint: str
    """The first 12 digits."""
    shard: int | None
    """The one that is being written; None before the first."""
    since: str | None
    """When that began: UTC, by the worker's clock."""
    clips_in_shard: int
    """Written, of the shard that is not committed yet."""
    clips: int
    """Written by this call of `encode`, of this feature."""
    bytes: int
    """Committed by this call, of this feature."""
    quarantined: int
    clips_per_s: float | None
    """Over the last two minutes; None before there is anything to measure."""


@dataclass(frozen=True, kw_only=True)
class SeenWorker:
    """A worker as its file shows it."""

    name: str
    """Of the file."""
    report: WorkerReport
    state: WorkerState
    silent_s: float
    """Since it last wrote, by the clock of the storage."""


class WorkerFile:
    """This process's own file. A disk that refuses it is not complained about: the shard being written will be."""

    def __init__(self, storage: Storage) -> None:
        name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}.json"
        self.name = f"{DIRECTORY}/{name}"
        self._storage = storage
        self._removed = False
        self._writing = threading.Lock()

    def write(self, report: WorkerReport) -> None:
        """Say how far this worker is."""
        with self._writing, contextlib.suppress(OSError, MimirError):
            if not self._removed:
                self._storage.overwrite(self.name, report.model_dump_json().encode() + b"\n")
            if self._removed:  # by somebody who has not waited so long
                self._storage.remove(self.name)

    def remove(self) -> None:
        """Say that this worker has left. A process that ends by a signal may be gone when this returns."""
        self._removed = True
        # what is being written would lie there for ever, and its worker would be called dead
        waited = self._writing.acquire(timeout=_REMOVE_TIMEOUT_S)
        try:
            with contextlib.suppress(OSError, MimirError):
                self._storage.remove(self.name)
            self._storage.remove_empty_folder(DIRECTORY)
        finally:
            if waited:
                self._writing.release()


def read_workers(storage: Storage) -> list[SeenWorker]:
    """Every worker that wrote within a day, by host and process; files that cannot be read are left out."""
    return [worker for worker in _read_all(storage) if worker.silent_s < FORGOTTEN_S]


def forget_dead_workers(storage: Storage) -> None:
    """Remove the files of workers that are dead for certain, or were not heard of for a day."""
    for worker in _read_all(storage):
        if worker.state == "dead" or worker.silent_s >= FORGOTTEN_S:
            with contextlib.suppress(OSError, MimirError):
                storage.remove(worker.name)


def _read_all(storage: Storage) -> list[SeenWorker]:
    found: list[tuple[str, WorkerReport, float]] = []
    for file in storage.files(DIRECTORY):
        with contextlib.suppress(OSError, ValueError, MimirError):  # it has just been removed, or is no report
            report = WorkerReport.model_validate_json(storage.read(file.name))
            found.append((file.name, report, file.modified_s))
    if not found:
        return []
    now_s = _now_s(storage, newest_s=max(changed_s for _, _, changed_s in found))
    workers = []
    for name, report, changed_s in found:
        silent_s = max(0.0, now_s - changed_s)
        state: WorkerState = "stale" if silent_s > STALE_S else "working"
        if life_of(report.domain, report.pid) == "dead":
            state = "dead"
        workers.append(SeenWorker(name=name, report=report, state=state, silent_s=silent_s))
    return sorted(workers, key=lambda worker: (worker.report.host, worker.report.pid))


def _now_s(storage: Storage, *, newest_s: float) -> float:
    """Now by the storage's clock. It is asked, by writing to it, only where this machine's clock makes all look old."""
    own_s = time.time()
    if not 0 <= own_s - newest_s <= STALE_S:
        with contextlib.suppress(OSError):  # a cache mounted read-only has no other clock than ours
            return storage.now_s()
    return own_s


def describe_self(
    feature: str,
    fingerprint: str,
    *,
    shard: int | None,
    since_s: float | None,
    clips_in_shard: int,
    clips: int,
    nbytes: int,
    quarantined: int,
    clips_per_s: float | None,
) -> WorkerReport:
    """A report of this process.

    Args:
        since_s: seconds since 1970.
    """
    since = None if since_s is None else datetime.fromtimestamp(since_s, UTC).isoformat(timespec="seconds")
    return WorkerReport(
        host=socket.gethostname(),
        pid=os.getpid(),
        domain=process_domain(),
        feature=feature,
        fingerprint=fingerprint[:12],
        shard=shard,
        since=since,
        clips_in_shard=clips_in_shard,
        clips=clips,
        bytes=nbytes,
        quarantined=quarantined,
        clips_per_s=clips_per_s,
    )
