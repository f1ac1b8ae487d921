"""Kill `retry` and `verify --repair` anywhere: run again, they end with what an undisturbed one ends with."""

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mimir_precompute.inspection.verify import verify_cache
from mimir_precompute.pipeline import EncodeJob, encode_cache
from mimir_precompute.provenance import RunLog
from mimir_precompute.remake import Remaking
from mimir_precompute.repair import repair_cache
from mimir_precompute.retry import RetryChoice, retry_clips
from mimir_precompute.workers.progress import Progress
from mimir_shared.feature_folder import find_features
from mimir_shared.features import FeatureName
from mimir_shared.plan_file import Plan, read_plan
from mimir_shared.storage.folder import LocalStorage
from tests.fake_encoders import FakeEncoders
from tests.faults.conftest import World
from tests.faults.workers import TEXT, compared, end_of, kill, start

KILLS = 20


def job_maker(
    storage: LocalStorage, encoders: FakeEncoders
) -> Callable[[Plan, tuple[FeatureName, ...], Remaking], EncodeJob]:
    def make_job(plan: Plan, features: tuple[FeatureName, ...], remaking: Remaking) -> EncodeJob:
        return EncodeJob(
            storage=storage,
            plan=plan,
            encoders=encoders,
            shards=tuple(range(plan.num_shards)),
            features=features,
            remaking=remaking,
            max_quarantined=1.0,
            heartbeat_s=0.02,
            decode_workers=1,
        )

    return make_job


def retry(cache: Path, clip_s: float = 0.0) -> None:
    storage = LocalStorage(cache)
    make_job = job_maker(storage, FakeEncoders(clip_s=clip_s))
    retry_clips(storage, RetryChoice(), make_job, Progress(quiet=True), RunLog(storage, "cpu"))
    storage.tidy()


def repair(cache: Path, clip_s: float = 0.0) -> None:
    storage = LocalStorage(cache)
    make_job = job_maker(storage, FakeEncoders(clip_s=clip_s))
    repair_cache(storage, verify_cache(storage), make_job, Progress(quiet=True), RunLog(storage, "cpu"))
    storage.tidy()


@pytest.fixture(scope="module")
def lossy(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which every shard has lost a clip that can be had now."""
    cache = tmp_path_factory.mktemp("lossy") / "cache"
    poison = {f"{feature}/{n:03d}.mp4": "surplus" for n in range(0, 10, 3) for feature in TEXT}
    shutil.copytree(world.whole / "plan", cache / "plan")
    storage = LocalStorage(cache)
    plan = read_plan(storage)
    job = EncodeJob(
        storage=storage,
        plan=plan,
        encoders=FakeEncoders(poison=poison),
        shards=tuple(range(plan.num_shards)),
        features=TEXT,
        max_quarantined=1.0,
    )
    encode_cache(job, Progress(quiet=True), RunLog(storage, "cpu"))
    return cache


@pytest.fixture(scope="module")
def damaged(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which files of every feature are cut or gone, and a record and an empty prompt are flipped."""
    cache = Path(shutil.copytree(world.whole, tmp_path_factory.mktemp("damaged") / "cache"))
    for feature in TEXT:
        first, second, *_ = sorted(cache.glob(f"{feature}/*/data/*"))
        first.write_bytes(first.read_bytes()[:-3000])
        second.unlink()
    for pattern in ("t5/*/manifests/000003.0.parquet", "answers/*/empty.json"):
        (path,) = cache.glob(pattern)
        data = bytearray(path.read_bytes())
        data[-100] ^= 1
        path.write_bytes(bytes(data))
    return cache


def what_readers_get(cache: Path) -> dict[tuple[str, int], tuple[object, ...]]:
    """(feature, shard) → files and rows of its newest record."""
    found: dict[tuple[str, int], tuple[object, ...]] = {}
    for folder in find_features(LocalStorage(cache)):
        for shard, generation in folder.generations().items():
            record = folder.read_record(shard, generation)
            found[folder.feature, shard] = (record.metadata.files, record.samples)
    return found


@pytest.mark.parametrize("remake", [retry, repair])
def test_twenty_kills_change_nothing(
    request: pytest.FixtureRequest, memory_folder: Path, remake: Callable[..., None]
) -> None:
    before: Path = request.getfixturevalue("lossy" if remake is retry else "damaged")
    undisturbed = Path(shutil.copytree(before, memory_folder / "undisturbed"))
    remake(undisturbed)
    assert verify_cache(LocalStorage(undisturbed)).problems == []
    expected = compared(undisturbed)
    assert expected != compared(before)
    choose = random.Random(5)
    killed = 0
    for attempt in range(200):
        cache = Path(shutil.copytree(before, memory_folder / f"{attempt}"))
        while True:
            worker = start(lambda: remake(cache, clip_s=0.004))  # noqa: B023 (runs at once, in a fork)
            time.sleep(choose.uniform(0.01, 0.15))
            kill(worker)
            if end_of(worker) == 0:
                break
            killed += 1
        remake(cache)
        assert verify_cache(LocalStorage(cache)).problems == []
        assert what_readers_get(cache) == what_readers_get(undisturbed)
        found = compared(cache)
        # Killed between data and record, a repair has put the very file back that the old record names: that record
        # is true again, and there is nothing left for a next generation to say.
        restored = remake is repair and found.keys() != expected.keys()
        assert restored or found.keys() == expected.keys()
        differing = [name for name in expected.keys() & found.keys() if found[name] != expected[name]]
        assert [name for name in differing if not name.startswith("snapshots/")] == []
        shutil.rmtree(cache)
        if killed >= KILLS:
            return
    raise AssertionError(f"{killed} kills in 200 attempts")
