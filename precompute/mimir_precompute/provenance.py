"""logs/: what may differ between two equal runs — clocks, hosts, devices, versions.

Read back only to say what has changed since; nothing that a run makes follows from it.
"""

import json
import os
import platform
import re
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from typing import Any

from mimir_precompute.encoders.base import ReportingEncoder
from mimir_precompute.shard_writer import FinishedShard
from mimir_shared.fingerprint import differences
from mimir_shared.storage.folder import machine_faults
from mimir_shared.storage.protocol import Storage

_LIBRARIES = ("mimir-t2v", "torch", "transformers", "diffusers", "tokenizers", "av", "numpy")


_LOGS_LOOKED_AT = 50
"""Of the newest; a feature that none of them has made is not compared with anything."""


class ShardEntry:
    """Filled in while one shard is made."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {"result": "failed"}

    def finished(self, result: str, finished: FinishedShard) -> None:
        self.fields = {
            "result": result,
            "clips": len(finished.samples),
            "bytes": finished.nbytes,
            "data": finished.data_name,
        }


class RunLog:
    """One JSON-lines file per call of `encode`, opened at its first line: a call without work leaves none."""

    def __init__(self, storage: Storage, device: str) -> None:
        started = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        self._storage = storage
        self._name = f"logs/encode-{started}-{os.getpid()}-{uuid.uuid4().hex[:6]}.jsonl"
        self._device = device

    def feature_started(self, feature: str, fingerprint: str) -> str | None:
        """Record what the feature is made with on this machine.

        Returns: a warning that says how that differs from what made it last; the host itself does not count.
        """
        made_with = {
            "device": self._describe_device(),
            "threads": os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count()),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "libraries": _installed_versions(),
        }
        last = self._made_with_last(feature, fingerprint)
        self._write(
            {
                "event": "feature",
                "feature": feature,
                "fingerprint": fingerprint,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                **made_with,
            }
        )
        changes = [] if last is None else differences(_comparable(last), _comparable(made_with))
        if not changes:
            return None
        shown = "; ".join(f"{name}: {before!r} → {now!r}" for name, before, now in changes)
        return (
            f"{feature}: made by other means than last time: {shown}. Equal bytes are promised at equal means only; "
            f"`mimir-precompute diff` measures what that comes to, and logs/ says what made which shard"
        )

    def _made_with_last(self, feature: str, fingerprint: str) -> dict[str, Any] | None:
        logs = [name for name in self._storage.list("logs") if re.fullmatch(r"encode-.*\.jsonl", name)]
        others = [name for name in (f"logs/{log}" for log in logs) if name != self._name]
        # the newest by the time in their names: to ask for that of each file is too much for thousands of workers
        for name in sorted(others, reverse=True)[:_LOGS_LOOKED_AT]:
            for line in reversed(self._storage.read(name).decode(errors="replace").splitlines()):
                with suppress(ValueError):  # the last line of a worker that was killed may be cut
                    event = json.loads(line)
                    wanted = {"event": "feature", "feature": feature, "fingerprint": fingerprint}
                    if isinstance(event, dict) and event.items() >= wanted.items():
                        return event
        return None

    def encoder_finished(self, feature: str, encoder: object) -> str | None:
        """Record how an encoder fared, if it tells; one line for a person of it, if it did anything."""
        if not isinstance(encoder, ReportingEncoder):
            return None
        told = dict(encoder.report())
        self._write({"event": "encoder", "feature": feature, **told})
        if told.get("prompts") == 0:
            return None
        return f"{feature}: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in told.items())

    @contextmanager
    def shard(self, feature: str, shard: int) -> Iterator[ShardEntry]:
        """Time one shard; its line is written whether it succeeds or not."""
        entry = ShardEntry()
        started = time.monotonic()
        try:
            yield entry
        finally:
            seconds = round(time.monotonic() - started, 3)
            self._write({"event": "shard", "feature": feature, "shard": shard, "seconds": seconds, **entry.fields})

    def _describe_device(self) -> str:
        torch: Any = sys.modules.get("torch")  # loaded by the encoder, or not at all
        if torch is not None and self._device.startswith("cuda") and torch.cuda.is_available():
            return f"{self._device} ({torch.cuda.get_device_name(self._device)})"
        return self._device

    def _write(self, event: dict[str, Any]) -> None:
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **event})
        with machine_faults(f"{self._storage.root}/{self._name}: writing"):
            self._storage.append(self._name, f"{line}\n".encode())


def _comparable(made_with: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: made_with.get(name) for name in ("device", "threads", "python", "machine", "libraries")}
    # which of several equal GPUs it was changes nothing
    found["device"] = re.sub(r"^cuda:\d+", "cuda", str(found["device"]))
    return found


@cache
def _installed_versions() -> dict[str, str]:
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
