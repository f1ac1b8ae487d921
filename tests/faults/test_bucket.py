"""A bucket that is slow or fails costs time and changes nothing; one that keeps failing ends the run with a clear line.

Against moto's server with a proxy in front. What a real service does beyond this is not known to these tests.
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mimir_precompute.inspection.status import read_status
from mimir_precompute.inspection.verify import verify_cache
from mimir_shared.errors import CacheError, MachineError
from mimir_shared.plan_file import read_plan
from mimir_shared.snapshot import list_snapshots, read_index
from mimir_shared.snapshot_reader import SnapshotReader, open_snapshot
from mimir_shared.storage.bucket import ObjectStorage
from mimir_shared.storage.bucket_requests import RequestLimits
from mimir_shared.storage.folder import LocalStorage
from mimir_shared.storage.local_read_cache import LocalReadCache
from tests.buckets import QUICK, SECRET, copy_behind, faulty, objects_of
from tests.fault_proxy import Fault, FaultProxy
from tests.faults.conftest import World
from tests.programs import run

LIMITS = replace(QUICK, action_s=60.0, part_bytes=3000)
"""For faults that pass; in parts, so that a sample takes several requests."""
IN_ONE_PIECE = replace(LIMITS, part_bytes=8 << 20)
IMPATIENT = replace(QUICK, action_s=1.5)
THREADS = 8
READ_FAULTS: tuple[Fault, ...] = ("500", "503", "timeout", "trickle", "cut", "short", "reset")


@pytest.fixture(scope="module")
def cache(world: World) -> Path:
    return world.whole


@pytest.fixture(scope="module")
def proxy(moto_port: int) -> Iterator[FaultProxy]:
    with FaultProxy(moto_port, timeout_s=1.2).serving() as serving:
        yield serving


@pytest.fixture
def location(proxy: FaultProxy, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with copy_behind(proxy, cache, monkeypatch.setenv) as url:
        yield url


def reader_of(storage: ObjectStorage) -> SnapshotReader:
    (snapshot,) = list_snapshots(storage)
    return SnapshotReader(storage, snapshot, read_index(storage, snapshot))


def read_everything(reader: SnapshotReader) -> dict[str, dict[str, bytes]]:
    """key → name of the tensor → its bytes, read by several threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        samples = pool.map(reader.sample, reader)
        return {
            key: {name: tensor.array.tobytes() for name, tensor in sample.items()}
            for key, sample in zip(reader, samples, strict=True)
        }


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_no_secret(text: str) -> None:
    assert SECRET not in text
    assert "Signature" not in text


@pytest.mark.parametrize("fault", READ_FAULTS)
def test_reading_under_a_fault_gives_the_same_bits(fault: Fault, location: str, proxy: FaultProxy, cache: Path) -> None:
    proxy.plan = faulty(0.25, fault)
    assert read_everything(reader_of(ObjectStorage(location, limits=LIMITS))) == read_everything(
        open_snapshot(str(cache))
    )
    assert proxy.faults[fault] >= 10, proxy.faults


def test_reading_under_all_faults_at_once_gives_the_same_bits(
    location: str, proxy: FaultProxy, cache: Path, tmp_path: Path
) -> None:
    proxy.plan = faulty(0.3, *READ_FAULTS)
    kept = LocalReadCache(tmp_path / "kept", 10**9)
    expected = read_everything(open_snapshot(str(cache)))
    for epoch in range(2):
        assert read_everything(reader_of(ObjectStorage(location, kept, limits=LIMITS))) == expected, epoch
    assert set(proxy.faults) == set(READ_FAULTS), proxy.faults


def test_bytes_that_were_changed_on_the_way_are_fetched_once_more(
    location: str, proxy: FaultProxy, cache: Path, tmp_path: Path
) -> None:
    reader = reader_of(ObjectStorage(location, LocalReadCache(tmp_path / "kept", 10**9), limits=IN_ONE_PIECE))
    proxy.plan = lambda method, path, number: "flip" if "/data/" in path and number % 5 == 0 else None
    expected = open_snapshot(str(cache))
    for _ in range(2):
        for key in reader:
            for name, tensor in reader.sample(key).items():
                assert tensor.array.tobytes() == expected.sample(key)[name].array.tobytes()
    assert proxy.faults["flip"] >= 3
    proxy.plan = lambda method, path, number: "flip" if "/data/" in path else None
    with pytest.raises(CacheError, match="do not match the hash"):
        reader_of(ObjectStorage(location, limits=IN_ONE_PIECE)).sample(next(iter(reader)))


@pytest.mark.parametrize("fault", [*READ_FAULTS, "403"])
def test_a_fault_that_lasts_ends_in_time_with_bucket_key_and_action(
    fault: Fault, location: str, proxy: FaultProxy
) -> None:
    reader = reader_of(ObjectStorage(location, limits=IMPATIENT))
    proxy.plan = faulty(1.0, fault)
    began = time.monotonic()
    with pytest.raises(MachineError) as told:
        reader.sample(next(iter(reader)))
    assert time.monotonic() - began < 10
    assert told.value.exit_code == 5
    message = str(told.value)
    assert location in message
    assert f"reading in bucket {location.split('/')[2]} failed" in message
    expected = {"500": "500 InternalError", "503": "503 SlowDown", "403": "403 AccessDenied", "cut": "broke off"}
    assert expected.get(fault, "") in message
    assert_no_secret(message)


def test_a_refusal_is_not_tried_again(location: str, proxy: FaultProxy) -> None:
    proxy.plan = faulty(1.0, "403")
    with pytest.raises(MachineError, match="403 AccessDenied; the credentials in use may not do this"):
        ObjectStorage(location, limits=LIMITS).read("plan/0000.parquet")
    assert len(proxy.requests) == 1


def test_tries_are_spread_and_become_rarer(location: str, proxy: FaultProxy) -> None:
    limits = RequestLimits(action_s=2.0, first_pause_s=0.05, longest_pause_s=0.4)
    proxy.plan = faulty(1.0, "503")
    storage = ObjectStorage(location, limits=limits)
    with pytest.raises(MachineError, match=r"failed \d+ times in [12] s"):
        storage.read("plan/0000.parquet")
    assert 5 <= len(proxy.requests) <= 40


def test_status_and_verify_under_faults_say_what_they_say_of_the_folder(
    location: str, proxy: FaultProxy, cache: Path
) -> None:
    proxy.plan = faulty(0.2, "500", "503", "cut", "short", "reset")
    storage = ObjectStorage(location, limits=IN_ONE_PIECE)
    assert read_status(storage).to_json() == read_status(LocalStorage(cache)).to_json()
    assert verify_cache(storage).to_json() == verify_cache(LocalStorage(cache)).to_json()
    assert len(proxy.faults) == 5, proxy.faults


def test_what_a_late_listing_leaves_out_is_never_wrong(location: str, proxy: FaultProxy, cache: Path) -> None:
    digest = list_snapshots(LocalStorage(cache))[0].digest
    proxy.plan = lambda method, path, number: "stale" if "list-type=2" in path else None
    proxy.hidden = {"000002.0.parquet", digest[:12], "plan/0000.parquet"}
    storage = ObjectStorage(location, limits=IN_ONE_PIECE)
    assert read_plan(storage).num_shards == 5  # the plan's name is known
    done = [one.shards_done for many in read_status(storage).features.values() for one in many]
    assert done == [4, 4, 4]
    assert verify_cache(storage).ok
    assert list_snapshots(storage) == []
    pinned = open_snapshot(location, snapshot=digest)  # as a run that goes on asks for it
    assert read_everything(pinned) == read_everything(open_snapshot(str(cache)))
    assert proxy.faults["stale"] >= 10


@pytest.mark.parametrize("fault", ["500", "503", "timeout", "reset", "lost", "409"])
def test_a_cache_that_is_written_under_faults_is_the_same_cache(
    fault: Fault, location: str, proxy: FaultProxy, cache: Path
) -> None:
    proxy.plan = faulty(0.3, fault, method="PUT")
    copy = ObjectStorage(f"{location}-copy", limits=LIMITS)
    files = files_of(cache)
    with ThreadPoolExecutor(THREADS) as pool:
        # own writes are known again, even where the answer was lost: every create wins
        assert all(pool.map(copy.create, files, files.values()))
    proxy.plan = lambda method, path, number: None
    assert objects_of(copy) == files
    assert proxy.faults[fault] >= 3, proxy.faults


def test_of_writers_whose_answers_are_lost_one_wins(location: str, proxy: FaultProxy) -> None:
    proxy.plan = faulty(0.5, "lost", "409", method="PUT")
    storage = ObjectStorage(location, limits=LIMITS)
    with ThreadPoolExecutor(THREADS) as pool:
        for attempt in range(10):
            data = [f"worker {number}".encode() for number in range(THREADS)]
            won = list(pool.map(lambda mine, attempt=attempt: storage.create(f"race/{attempt}", mine), data))
            assert [mine for mine, wins in zip(data, won, strict=True) if wins] == [storage.read(f"race/{attempt}")]
    assert proxy.faults["lost"] >= 5


@pytest.mark.parametrize("fault", ["500", "503", "lost", "reset", "timeout"])
def test_an_upload_in_parts_survives_faults(fault: Fault, location: str, proxy: FaultProxy) -> None:
    data = np.random.default_rng(0).bytes(11_000_000)
    limits = replace(LIMITS, request_s=5.0, part_bytes=5 << 20)
    storage = ObjectStorage(location, limits=limits)
    seen: set[tuple[str, str]] = set()

    def once(method: str, path: str, number: int) -> Fault | None:
        step = (method, path.split("?")[-1].split("&")[0])
        first = method != "GET" and step not in seen
        seen.add(step)
        return fault if first else None  # every step fails once: begin, each part, end

    proxy.plan = once
    with storage.temporary() as temporary:
        temporary.file.write(data)
        storage.publish_content(temporary, "data/x.tar", "")
    assert storage.read("data/x.tar") == data
    assert proxy.faults[fault] >= 4, proxy.faults


def test_an_upload_whose_end_was_done_and_its_answer_lost_is_known_again(location: str, proxy: FaultProxy) -> None:
    data = np.random.default_rng(1).bytes(11_000_000)
    storage = ObjectStorage(location, limits=replace(IN_ONE_PIECE, request_s=5.0))
    ends = iter(["lost", *["404"] * 10])  # a second end finds no upload
    proxy.plan = lambda method, path, number: next(ends) if method == "POST" and "uploadId" in path else None  # type: ignore[return-value]
    with storage.temporary() as temporary:
        temporary.file.write(data)
        storage.publish_content(temporary, "data/x.tar", "")
    assert storage.read("data/x.tar") == data
    assert dict(proxy.faults) == {"lost": 1, "404": 1}


def test_an_upload_that_ends_half_way_is_not_there(location: str, proxy: FaultProxy) -> None:
    storage = ObjectStorage(location, limits=replace(IMPATIENT, request_s=5.0, part_bytes=5 << 20))
    proxy.plan = lambda method, path, number: "500" if "partNumber=2" in path else None
    with storage.temporary() as temporary:
        temporary.file.write(bytes(11_000_000))
        with pytest.raises(MachineError, match=r"writing to bucket .* failed"):
            storage.publish_content(temporary, "data/x.tar", "")
    assert not storage.exists("data/x.tar")
    assert storage.list("data") == []


def test_the_commands_that_only_look_take_a_bucket(location: str, cache: Path) -> None:
    key = next(iter(open_snapshot(str(cache))))
    inspected = run("mimir-precompute", "inspect", location, key, "--json")
    assert (inspected.code, inspected.err) == (0, "")
    assert json.loads(inspected.out)["key"] == key
    shown = run("mimir-precompute", "status", location, "--json")
    assert (shown.code, shown.err) == (0, "")
    assert json.loads(shown.out)["complete"]


def test_commands_that_a_bucket_refuses_end_with_5_and_one_line(location: str, proxy: FaultProxy) -> None:
    proxy.plan = faulty(1.0, "403")
    order = ["order", "--global-batch-size", 4, "--cache"]
    for program, command in (
        ("mimir-precompute", ["status"]),
        ("mimir-precompute", ["verify"]),
        ("mimir-train", order),
    ):
        ended = run(program, *command, location)
        assert ended.code == 5
        assert ended.err.count("\n") == 1
        assert "403 AccessDenied" in ended.err
        assert location in ended.err
        assert_no_secret(ended.out + ended.err)
