"""Training from a bucket that fails: the losses of the folder, or an error, and never a hang."""

import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest

from mimir_shared.errors import MimirError
from mimir_shared.storage.bucket_requests import RequestLimits
from mimir_train.loop import train
from tests.buckets import QUICK, copy_behind, faulty
from tests.fault_proxy import FaultProxy
from tests.train.caches import build_cache, tiny_config

IMPATIENT = replace(QUICK, action_s=1.5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("bucket") / "cache", {"9x32x32": 12}, shard_size=4)


@pytest.fixture
def proxy(moto_port: int) -> Iterator[FaultProxy]:
    with FaultProxy(moto_port).serving() as serving:
        yield serving


@pytest.fixture
def location(proxy: FaultProxy, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with copy_behind(proxy, cache, monkeypatch.setenv) as url:
        yield url


def test_training_from_a_failing_bucket_gives_the_losses_of_the_folder(
    location: str, proxy: FaultProxy, cache: Path, tmp_path: Path
) -> None:
    proxy.plan = faulty(0.15, "500", "503", "cut", "short", "reset")
    losses = []
    for name, source in (("folder", str(cache)), ("bucket", location)):
        config = tiny_config(
            cache, tmp_path / name, data__cache=source, data__global_batch_size=4, data__validation_shards=0,
            data__local_cache_dir=str(tmp_path / "kept"), run__max_train_steps=4,
        )  # fmt: skip
        train(config)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([float(line.split('"loss": ')[1].split(",")[0]) for line in lines])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    assert proxy.faults.total() >= 5, proxy.faults
    assert any((tmp_path / "kept").rglob("??/*"))


def test_training_from_a_bucket_that_stops_answering_ends_with_an_error(
    location: str, proxy: FaultProxy, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RequestLimits, "__init__", lambda self, **_: _impatient(self))
    proxy.plan = lambda method, path, number: "503" if "/data/" in path and number > 25 else None
    config = tiny_config(
        cache, tmp_path / "run", data__cache=location, data__global_batch_size=4, data__validation_shards=0,
        run__max_train_steps=50,
    )  # fmt: skip
    began = time.monotonic()
    with pytest.raises(MimirError, match=f"{location}/.*reading in bucket .* failed .*503 SlowDown") as told:
        train(config)
    assert time.monotonic() - began < 30
    assert told.value.exit_code == 5


def _impatient(limits: RequestLimits) -> None:
    for field in fields(RequestLimits):
        object.__setattr__(limits, field.name, getattr(IMPATIENT, field.name))
