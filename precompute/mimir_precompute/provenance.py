"""logs/: what may differ between two equal runs — clocks, hosts, devices, versions. Never read back by a run."""

import json
import os
import platform
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from typing import Any

from mimir_precompute.shard_writer import FinishedShard
from mimir_shared.storage import LocalStorage

_LIBRARIES = ("mimir-t2v", "torch", "transformers", "diffusers", "tokenizers", "av", "numpy")


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

    def __init__(self, storage: LocalStorage, device: str) -> None:
        started = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        self._path = storage.path(f"logs/encode-{started}-{os.getpid()}-{uuid.uuid4().hex[:6]}.jsonl")
        self._device = device

    def feature_started(self, feature: str, fingerprint: str) -> None:
        """Record what the feature is made with on this machine."""
        self._write(
            {
                "event": "feature",
                "feature": feature,
                "fingerprint": fingerprint,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "device": self._describe_device(),
                "threads": os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count()),
                "python": platform.python_version(),
                "machine": platform.machine(),
                "libraries": _installed_versions(),
            }
        )

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
        if torch is not None and self._device.startswith("cuda"):
            return f"{self._device} ({torch.cuda.get_device_name(self._device)})"
        return self._device

    def _write(self, event: dict[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **event})
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


@cache
def _installed_versions() -> dict[str, str]:
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
