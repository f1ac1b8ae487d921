"""What is kept of a bucket on a near disk: the same bytes or none, bounded, and no harm where the disk fails."""

import errno
import logging
import multiprocessing
import os
import random
from pathlib import Path

import pytest

from mimir_shared.errors import InputError
from mimir_shared.storage.bucket import ObjectStorage
from mimir_shared.storage.local_read_cache import LocalReadCache
from tests.buckets import QUICK, environment, new_bucket
from tests.fault_proxy import FaultProxy

URL = "s3://bucket/cache/t5/abc/data/000000-00000000.tar"


def add(cache: LocalReadCache, offset: int, data: bytes) -> None:
    cache.add(URL, offset, [memoryview(data[:3]), memoryview(data[3:])])


def read(cache: LocalReadCache, offset: int, nbytes: int) -> bytes | None:
    one, two = bytearray(nbytes // 2), bytearray(nbytes - nbytes // 2)
    found = cache.read_into(URL, offset, [memoryview(one), memoryview(two)])
    return bytes(one + two) if found else None


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def total_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def test_a_range_that_was_added_is_read_and_no_other(tmp_path: Path) -> None:
    cache = LocalReadCache(tmp_path / "kept", 10**6)
    add(cache, 7, b"0123456789")
    assert read(cache, 7, 10) == b"0123456789"
    assert read(LocalReadCache(tmp_path / "kept", 10**6), 7, 10) == b"0123456789"  # it outlives the process
    for offset, nbytes in ((7, 9), (7, 11), (8, 10), (0, 10)):
        assert read(cache, offset, nbytes) is None


def test_an_entry_with_any_byte_changed_or_cut_is_a_miss_and_is_removed(tmp_path: Path) -> None:
    cache = LocalReadCache(tmp_path, 10**6)
    add(cache, 0, b"0123456789")
    (entry,) = files(tmp_path)
    whole = entry.read_bytes()
    for damaged in [whole[:cut] for cut in range(len(whole))] + [
        whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(len(whole))
    ]:
        entry.write_bytes(damaged)
        assert read(cache, 0, 10) is None
        assert not entry.exists()
    entry.write_bytes(whole)
    assert read(cache, 0, 10) == b"0123456789"


def test_it_never_holds_more_than_its_limit(tmp_path: Path) -> None:
    cache = LocalReadCache(tmp_path, 100_000)
    for number in range(300):
        add(cache, number, os.urandom(1000))
        assert total_bytes(tmp_path) <= 100_000
    assert total_bytes(tmp_path) > 80_000


def _fill(folder: Path, seed: int) -> None:
    cache = LocalReadCache(folder, 200_000)
    for number in range(300):
        add(cache, seed * 1000 + number, os.urandom(1000))


def test_processes_that_share_it_stay_within_its_limit_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(tmp_path, seed)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert 150_000 < total_bytes(tmp_path) <= 200_000
    assert not list(tmp_path.glob("tmp-*"))


def test_what_an_earlier_run_left_makes_room_least_recently_used_first(tmp_path: Path) -> None:
    before = LocalReadCache(tmp_path, 100_000)
    for number in range(60):
        add(before, number, bytes(1000))
    for age, path in enumerate(sorted(files(tmp_path))):
        os.utime(path, (10**9 - age, 10**9 - age))
    cache = LocalReadCache(tmp_path, 100_000)
    assert read(cache, 17, 1000) is not None  # used again: it stays
    for number in range(100, 250):
        add(cache, number, bytes(1000))
    assert read(cache, 17, 1000) is not None
    assert sum(read(cache, number, 1000) is not None for number in range(60)) < 10
    assert total_bytes(tmp_path) <= 100_000


def test_with_room_for_half_of_an_epoch_nearly_half_of_the_reads_are_served(tmp_path: Path) -> None:
    cache = LocalReadCache(tmp_path, 200 * 1016)
    draw = random.Random(0)
    shares = []
    for _ in range(3):
        order = list(range(400))
        draw.shuffle(order)
        hits = 0
        for number in order:
            hits += read(cache, number, 1000) is not None
            if hits == 0 or read(cache, number, 1000) is None:
                add(cache, number, bytes(1000))
        shares.append(hits / 400)
    assert shares[0] == 0
    assert min(shares[1:]) > 0.4, shares  # LRU would serve 0.15: see the module's docstring


def test_a_disk_that_takes_no_more_is_told_once_and_reading_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = LocalReadCache(tmp_path, 10**6)
    add(cache, 0, b"0123456789")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.WARNING):
        for number in range(1, 5):
            add(cache, number, b"0123456789")
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: nothing more is kept: No space left on device; reading goes on from the bucket"
    ]
    assert read(cache, 0, 10) == b"0123456789"
    assert len(files(tmp_path)) == 1


def test_a_folder_that_cannot_be_made_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--cache-dir .*file/kept: cannot be made"):
        LocalReadCache(tmp_path / "file" / "kept", 10**6)


class TestWithABucket:
    @pytest.fixture
    def storage(self, moto_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStorage:
        for name, value in environment(f"http://127.0.0.1:{moto_port}").items():
            monkeypatch.setenv(name, value)
        storage = ObjectStorage(
            f"s3://{new_bucket(moto_port)}/x", LocalReadCache(tmp_path / "kept", 10**6), limits=QUICK
        )
        storage.create("t5/abc/data/0.tar", bytes(range(100)))
        storage.create("t5/abc/spec.json", b"{}")
        storage.create("snapshots/abc/index.arrow", b"index")
        return storage

    def test_data_files_and_indexes_are_kept_and_what_may_be_made_anew_is_not(
        self, storage: ObjectStorage, tmp_path: Path
    ) -> None:
        buffer = bytearray(10)
        for _ in range(2):
            assert storage.read_into("t5/abc/data/0.tar", 5, [memoryview(buffer)]) == 10
            assert buffer == bytes(range(5, 15))
            assert storage.read("snapshots/abc/index.arrow") == b"index"
            assert storage.read("t5/abc/spec.json") == b"{}"
        assert len(files(tmp_path / "kept")) == 2

    def test_a_second_epoch_makes_no_request_for_data(
        self, storage: ObjectStorage, moto_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with FaultProxy(moto_port).serving() as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            for epoch in range(2):
                for offset in range(0, 90, 10):
                    storage_now = ObjectStorage(storage.root, LocalReadCache(tmp_path / "kept", 10**6), limits=QUICK)
                    storage_now.read_into("t5/abc/data/0.tar", offset, [memoryview(bytearray(10))])
                assert len(proxy.requests) == 9, epoch

    def test_a_range_that_is_forgotten_is_fetched_again(self, storage: ObjectStorage, tmp_path: Path) -> None:
        storage.read_into("t5/abc/data/0.tar", 5, [memoryview(bytearray(10))])
        assert storage.forget("t5/abc/data/0.tar", 5, 10)
        assert files(tmp_path / "kept") == []

    def test_a_range_beyond_the_end_is_short_and_not_kept(self, storage: ObjectStorage, tmp_path: Path) -> None:
        assert storage.read_into("t5/abc/data/0.tar", 95, [memoryview(bytearray(10))]) == 5
        assert files(tmp_path / "kept") == []
