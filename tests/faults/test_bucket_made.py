"""A cache that is made in a bucket: the same as in a folder, whatever the bucket and the workers live through.

Against moto's server with a proxy in front. What a real service does beyond this is not known to these tests.
"""

import json
import random
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from mimir_precompute.gc import collect_garbage
from mimir_precompute.inspection.verify import verify_cache
from mimir_precompute.pipeline import EncodeJob
from mimir_precompute.provenance import RunLog
from mimir_precompute.remake import Remaking
from mimir_precompute.repair import repair_cache
from mimir_precompute.workers.progress import Progress
from mimir_shared.errors import MachineError
from mimir_shared.feature_folder import find_features
from mimir_shared.features import FeatureName
from mimir_shared.plan_file import Plan
from mimir_shared.storage.bucket import ObjectStorage
from mimir_shared.storage.disk import Disk
from mimir_shared.storage.folder import LocalStorage
from tests.buckets import QUICK, SECRET, environment, faulty, new_bucket, objects_of
from tests.fake_encoders import FakeEncoders
from tests.fault_proxy import Fault, FaultProxy
from tests.faults.bucket_workers import PATIENT, BucketWork, end_of, server_of_forks, start
from tests.faults.conftest import World
from tests.faults.workers import NOT_COMPARED, SHARD_SIZE, compared, encode, encode_into, make_clips

ONE: Mapping[str, Any] = {"features": ("t5",)}
"""Options of a job that takes a third of the requests."""
WRITE_FAULTS: tuple[Fault, ...] = ("500", "503", "409", "timeout", "reset", "lost", "cut", "garbled", "partial")
POINTS = [
    *(f"{kind}.{step}" for kind in ("plan", "spec", "empty", "data", "record", "snapshot_index", "snapshot")
      for step in ("written", "linked")),
    "lease.taken", "lease.heartbeat", "lease.dropped", "lease.taken_over",
]  # fmt: skip
AT_FIRST = [point for point in POINTS if point.split(".")[0] not in ("data", "record", "lease")] + ["lease.taken_over"]
"""Those that a run comes by once; at the others a worker dies when it comes there again."""


@pytest.fixture(scope="module")
def proxy(moto_port: int) -> Iterator[FaultProxy]:
    with FaultProxy(moto_port, timeout_s=1.2).serving() as serving:
        yield serving


@pytest.fixture(scope="module")
def forks() -> ForkServerContext:
    return server_of_forks()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Three shards, and the cache that an undisturbed worker makes of them in a folder with `ONE`."""
    folder = tmp_path_factory.mktemp("small")
    clips = make_clips(folder / "clips", 3 * SHARD_SIZE)
    encode(folder / "cache", clips, **ONE)
    return World(clips=clips, whole=folder / "cache", uninterrupted=compared(folder / "cache"))


@pytest.fixture
def url(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of an empty cache in a bucket of its own, reached through a proxy that fails at nothing yet."""
    for name, value in environment(proxy.endpoint).items():
        monkeypatch.setenv(name, value)
    proxy.faults.clear()
    proxy.requests.clear()
    yield f"s3://{new_bucket(proxy.upstream_port)}/caches/one"
    proxy.plan = lambda method, path, number: None
    proxy.hidden = set()


def storage_at(url: str) -> ObjectStorage:
    return ObjectStorage(url, limits=PATIENT)


def found_at(url: str) -> dict[str, bytes]:
    """All of a cache that must not depend on what its workers lived through."""
    found = objects_of(storage_at(url))
    return {name: data for name, data in found.items() if name.split("/")[0] not in NOT_COMPARED}


def assert_same(url: str, expected: Mapping[str, bytes]) -> None:
    found = found_at(url)
    assert sorted(found) == sorted(expected)
    assert [name for name, data in expected.items() if found[name] != data] == []


def work_of(url: str, proxy: FaultProxy, world: World, **fields: Any) -> BucketWork:
    return BucketWork(url=url, clips=world.clips, variables=environment(proxy.endpoint), **fields)


def test_a_cache_made_in_a_bucket_has_the_bytes_of_one_made_in_a_folder(url: str, world: World) -> None:
    encode_into(storage_at(url), world.clips)
    assert_same(url, world.uninterrupted)
    assert {name.split("/")[0] for name in objects_of(storage_at(url))} >= {"logs"}
    assert storage_at(url).list("leases") == storage_at(url).list("tmp") == []


def test_a_zarr_cache_made_in_a_bucket_has_the_bytes_of_one_made_in_a_folder(
    url: str, small: World, tmp_path: Path
) -> None:
    options = {"features": ("t5",), "shards": (0, 1), "data_format": "zarr"}
    encode(tmp_path / "cache", small.clips, **options)
    encode_into(storage_at(url), small.clips, **options)
    assert_same(url, compared(tmp_path / "cache"))


@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_a_cache_made_under_a_fault_is_the_same(fault: Fault, url: str, proxy: FaultProxy, small: World) -> None:
    proxy.plan = faulty(0.08 if fault == "timeout" else 0.2, fault)
    encode_into(storage_at(url), small.clips, **ONE)
    assert proxy.faults[fault] >= 5, proxy.faults
    proxy.plan = lambda method, path, number: None
    assert_same(url, small.uninterrupted)


def test_answers_to_writes_alone_that_are_lost_change_nothing(url: str, proxy: FaultProxy, small: World) -> None:
    proxy.plan = faulty(0.5, "lost", method="PUT")
    encode_into(storage_at(url), small.clips, **ONE)
    assert proxy.faults["lost"] >= 10, proxy.faults
    proxy.plan = lambda method, path, number: None
    assert_same(url, small.uninterrupted)
    results = [json.loads(line) for line in storage_at(url).read(_only_log(url)).decode().splitlines()]
    assert [event["result"] for event in results if event["event"] == "shard"] == ["committed"] * 3


def _only_log(url: str) -> str:
    (log,) = (file.name for file in storage_at(url).files("logs"))
    return log


@pytest.mark.parametrize(("fault", "cause"), [("403", "403 AccessDenied"), ("503", "503 SlowDown"), ("reset", "")])
def test_a_bucket_that_takes_no_writes_ends_the_run_with_bucket_key_and_action(
    fault: Fault, cause: str, url: str, proxy: FaultProxy, small: World
) -> None:
    proxy.plan = faulty(1.0, fault, method="PUT")
    with pytest.raises(MachineError) as told:
        encode_into(ObjectStorage(url, limits=replace(QUICK, action_s=1.0)), small.clips, **ONE)
    message = str(told.value)
    assert told.value.exit_code == 5
    assert f"{url}/tmp/" in message
    assert f"writing to bucket {url.split('/')[2]} failed" in message
    assert cause in message
    assert SECRET not in message
    assert "Signature" not in message


def test_a_bucket_that_refuses_from_some_request_on_keeps_what_was_committed(
    url: str, proxy: FaultProxy, small: World
) -> None:
    proxy.plan = lambda method, path, number: "403" if number > 50 else None
    with pytest.raises(MachineError, match="403 AccessDenied"):
        encode_into(ObjectStorage(url, limits=QUICK), small.clips, **ONE)
    proxy.plan = lambda method, path, number: None
    kept = found_at(url)
    assert kept.items() <= small.uninterrupted.items()
    assert any("/manifests/" in name for name in kept)
    encode_into(storage_at(url), small.clips, **ONE)
    assert_same(url, small.uninterrupted)


def test_listings_that_are_late_cost_work_and_change_nothing(url: str, proxy: FaultProxy, small: World) -> None:
    encode_into(storage_at(url), small.clips, shards=(0, 1), **ONE)
    # what was just written is in no listing yet: neither plan nor records nor leases
    proxy.hidden = {"plan", "000001", "spec.json"}
    proxy.plan = lambda method, path, number: "stale" if method == "GET" and "list-type" in path else None
    encode_into(storage_at(url), small.clips, shards=(1, 2), **ONE)
    assert proxy.faults["stale"] > 5
    proxy.plan = lambda method, path, number: None
    encode_into(storage_at(url), small.clips, **ONE)
    assert_same(url, small.uninterrupted)


@pytest.mark.parametrize("point", POINTS)
def test_workers_killed_at_a_failpoint_leave_the_cache_of_an_undisturbed_one(
    point: str, url: str, proxy: FaultProxy, small: World, forks: ForkServerContext
) -> None:
    endings = []
    for number in range(2 if point == "lease.taken_over" else 1):
        at = "lease.taken" if point == "lease.taken_over" and number == 0 else point
        slowly = {"clip_s": 0.05} if point == "lease.heartbeat" else {}
        work = work_of(
            url, proxy, small, die_at=at, countdown=1 if number or point in AT_FIRST else 2, options={**ONE, **slowly}
        )
        endings.append(end_of(start(forks, work)))
    assert endings[0] == -signal.SIGKILL
    assert set(endings) <= {0, -signal.SIGKILL}
    assert end_of(start(forks, work_of(url, proxy, small, options=ONE))) == 0
    assert_same(url, small.uninterrupted)
    assert storage_at(url).list("leases") == storage_at(url).list("tmp") == []


def test_a_worker_killed_during_any_request_leaves_the_cache_of_an_undisturbed_one(
    url: str, proxy: FaultProxy, small: World, forks: ForkServerContext
) -> None:
    choose = random.Random(0)
    for _ in range(6):
        worker = start(forks, work_of(url, proxy, small, options=ONE))
        fatal = len(proxy.requests) + choose.randrange(45)
        fault: Fault = choose.choice(("reset", "lost"))  # before the service has done it, or after

        proxy.plan = partial(_kill_at_request, worker, fatal, fault)
        assert end_of(worker) in (0, -signal.SIGKILL)
        proxy.plan = lambda method, path, number: None
    assert end_of(start(forks, work_of(url, proxy, small, options=ONE))) == 0
    assert_same(url, small.uninterrupted)


def _kill_at_request(
    worker: ForkServerProcess, fatal: int, fault: Fault, method: str, path: str, number: int
) -> Fault | None:
    if number < fatal or worker.exitcode is not None:
        return None
    worker.kill()
    return fault


def test_of_6_workers_that_commit_one_shard_at_once_one_wins_each_time(
    url: str, proxy: FaultProxy, small: World, forks: ForkServerContext
) -> None:
    for shard in range(3):
        options = {**ONE, "shards": (shard,)}
        if shard == 0:
            encode_into(storage_at(url), small.clips, features=("t5",), shards=())
        work = work_of(url, proxy, small, meet_at=forks.Barrier(6), options=options)
        assert [end_of(worker) for worker in [start(forks, work) for _ in range(6)]] == [0] * 6
    assert_same(url, small.uninterrupted)
    lines = [line for file in storage_at(url).files("logs") for line in storage_at(url).read(file.name).splitlines()]
    events = [json.loads(line) for line in lines]
    results = Counter(event["result"] for event in events if event["event"] == "shard")
    assert results == {"committed": 3, "same": 15}


def test_workers_share_the_shards_beside_a_gc_without_grace_and_the_cache_is_the_same(
    url: str, proxy: FaultProxy, small: World, forks: ForkServerContext
) -> None:
    encode_into(storage_at(url), small.clips, features=("t5",), shards=())
    storage = storage_at(url)
    (folder,) = find_features(storage)
    for shard in range(3):
        storage.create(f"{folder.directory}/data/{shard:06d}-{8 * 'a'}.tar", b"of a worker that was killed")
    workers = [start(forks, work_of(url, proxy, small, options={**ONE, "clip_s": 0.02})) for _ in range(2)]
    while any(worker.exitcode is None for worker in workers):
        collect_garbage(storage, grace_s=0)
    assert [end_of(worker) for worker in workers] == [0, 0]
    collect_garbage(storage, grace_s=0)
    assert_same(url, small.uninterrupted)


def test_what_is_damaged_in_a_bucket_is_found_and_mended(url: str, small: World) -> None:
    storage = storage_at(url)
    encode_into(storage, small.clips, **ONE)
    (folder,) = find_features(storage)
    data = {s: f"{folder.directory}/{folder.read_record(s, 0).metadata.files[0].path}" for s in range(3)}
    record = folder.record_path(2, 0)
    for name in (data[0], record):
        whole = storage.read(name)
        storage.overwrite(name, whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    storage.remove(data[1])
    report = verify_cache(storage_at(url))
    assert {problem.shard for problem in report.problems} == {0, 1, 2}

    def make_job(plan: Plan, features: tuple[FeatureName, ...], remaking: Remaking) -> EncodeJob:
        return EncodeJob(
            storage=storage,
            plan=plan,
            encoders=FakeEncoders(),
            shards=tuple(range(plan.num_shards)),
            features=features,
            remaking=remaking,
        )

    outcome = repair_cache(storage, report, make_job, Progress(quiet=True), RunLog(storage, "cpu"))
    assert (outcome.ok, outcome.shards_made) == (True, 3)
    assert verify_cache(storage_at(url)).problems == []
    assert folder.generations() == {0: 1, 1: 1, 2: 1}
    assert [storage.read(name) for name in data.values()] == [small.uninterrupted[name] for name in data.values()]


class _FullDisk(Disk):
    def create(self, path: Path) -> BinaryIO:
        return open("/dev/full", "wb")


def test_a_full_disk_for_uploads_says_where_it_is_and_how_to_choose_another(
    url: str, small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = storage_at(url)
    monkeypatch.setattr(storage, "_spool", LocalStorage(Path("/dev/shm"), _FullDisk()))
    with pytest.raises(MachineError, match=r"t5.*No space left.*/dev/shm has \d+ bytes.*set TMPDIR"):
        encode_into(storage, small.clips, **ONE)


@pytest.mark.parametrize("faults", [("500", "503", "reset", "garbled"), ("lost",)])
def test_a_file_uploaded_in_parts_arrives_whole(faults: tuple[Fault, ...], url: str, proxy: FaultProxy) -> None:
    data = random.Random(0).randbytes(12 << 20)
    storage = ObjectStorage(url, limits=replace(PATIENT, part_bytes=5 << 20, request_s=10.0))
    proxy.plan = faulty(0.3, *faults)
    with storage.temporary() as temporary:
        temporary.file.write(data)
        storage.publish_content(temporary, "t5/x/data/000000-aaaaaaaa.tar", "")
    proxy.plan = lambda method, path, number: None
    assert storage.read("t5/x/data/000000-aaaaaaaa.tar") == data
    assert any("partNumber=3" in path for _, path in proxy.requests)


def test_an_upload_that_cannot_end_is_not_taken_for_done_where_a_damaged_file_has_the_name(
    url: str, proxy: FaultProxy
) -> None:
    data = bytes(6 << 20)
    name = "t5/x/data/000000-aaaaaaaa.tar"
    storage = ObjectStorage(url, limits=replace(QUICK, part_bytes=5 << 20, request_s=10.0, action_s=2.0))
    storage.overwrite(name, b"damaged".ljust(len(data)))
    proxy.plan = lambda method, path, number: "500" if method == "POST" and "uploadId" in path else None
    with storage.temporary() as temporary:
        temporary.file.write(data)
        with pytest.raises(MachineError, match="writing to bucket"):
            storage.publish_content(temporary, name, "")
