"""Workers at a cache in a bucket. A client's threads do not outlive a fork, so they come from a server of forks."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

from mimir_precompute.workers.lease import Leases
from mimir_shared import failpoints
from mimir_shared.errors import MimirError
from mimir_shared.storage.bucket import ObjectStorage
from mimir_shared.storage.lease_store import HeldLease
from tests.buckets import QUICK
from tests.faults.workers import encode_into

PATIENT = replace(QUICK, action_s=60.0)
END_S = 60.0


@dataclass(frozen=True, kw_only=True)
class BucketWork:
    """What a worker is to do, and what is to happen to it."""

    url: str
    clips: Path
    variables: Mapping[str, str]
    """Of the environment: with which it reaches the service."""
    options: Mapping[str, Any] = field(default_factory=dict)
    die_at: str = ""
    """A failpoint."""
    countdown: int = 1
    meet_at: Any = None
    """A barrier of processes: it waits there with its data written, whoever has the lease."""

    def __call__(self) -> None:
        os.environ.update(self.variables)
        hits = 0

        def act(point: str) -> None:
            nonlocal hits
            hits += point == self.die_at
            if hits == self.countdown:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.meet_at is not None and point == "data.written":
                self.meet_at.wait()

        def take_what_others_have(leases: Leases, name: str) -> bool:
            leases._held[name] = mock.create_autospec(HeldLease)
            return True

        failpoints.arm(act)
        try:
            with mock.patch.object(Leases, "take", take_what_others_have) if self.meet_at else mock.MagicMock():
                encode_into(ObjectStorage(self.url, limits=PATIENT), self.clips, **self.options)
        except MimirError as error:
            sys.stderr.write(f"{error}\n")
            sys.exit(error.exit_code)


def server_of_forks() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.bucket_workers"])
    return context


def start(context: ForkServerContext, work: Callable[[], None]) -> ForkServerProcess:
    process = context.Process(target=work)
    process.start()
    return process


def end_of(process: ForkServerProcess) -> int | None:
    """Its exit code, or minus the signal that killed it."""
    process.join(END_S)
    assert process.exitcode is not None, "a worker does not come to its end"
    return process.exitcode
