"""A bucket holds a cache as a folder does; the same contract runs over both."""

import hashlib
import os
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mimir_shared.errors import InputError, MachineError
from mimir_shared.storage.bucket import ObjectStorage
from mimir_shared.storage.bucket_client import parse_location
from mimir_shared.storage.bucket_requests import RequestLimits, describe_fault
from mimir_shared.storage.folder import LocalStorage
from mimir_shared.storage.open import open_storage
from mimir_shared.storage.protocol import Storage
from tests.buckets import QUICK, SECRET, environment

SMALL_PARTS = RequestLimits(part_bytes=50_000, action_s=10.0)
"""So that a file of some kilobytes is read in several requests."""


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return LocalStorage(tmp_path / "cache")
    return ObjectStorage(f"s3://{request.getfixturevalue('bucket')}/some/prefix", limits=SMALL_PARTS)


class TestContract:
    def test_what_was_created_is_read_and_has_its_size(self, storage: Storage) -> None:
        for nbytes in (0, 1, 50_000, 123_450):
            data = os.urandom(nbytes)
            assert storage.create(f"a/b/{nbytes}", data)
            assert storage.read(f"a/b/{nbytes}") == data
            assert storage.size(f"a/b/{nbytes}") == nbytes
            assert storage.exists(f"a/b/{nbytes}")
            assert storage.exists_durably(f"a/b/{nbytes}")

    def test_the_second_create_of_a_name_loses_and_changes_nothing(self, storage: Storage) -> None:
        assert storage.create("x", b"first")
        assert not storage.create("x", b"second")
        assert not storage.create("x", b"first")
        assert storage.read("x") == b"first"

    def test_of_16_threads_that_create_one_name_exactly_one_wins_20_times_over(self, storage: Storage) -> None:
        with ThreadPoolExecutor(16) as pool:
            for attempt in range(20):
                barrier = threading.Barrier(16)

                def create(number: int, barrier: threading.Barrier = barrier, attempt: int = attempt) -> bool:
                    barrier.wait()
                    return storage.create(f"race/{attempt}", f"worker {number}".encode())

                won = [number for number, wins in enumerate(pool.map(create, range(16))) if wins]
                assert len(won) == 1
                assert storage.read(f"race/{attempt}") == f"worker {won[0]}".encode()

    @pytest.mark.parametrize("action", ["read", "size", "read_into"])
    def test_a_missing_file_is_a_file_not_found(self, storage: Storage, action: str) -> None:
        storage.create("there", b"x")
        actions: dict[str, Callable[[], object]] = {
            "read": lambda: storage.read("not/there"),
            "size": lambda: storage.size("not/there"),
            "read_into": lambda: storage.read_into("not/there", 0, [memoryview(bytearray(3))]),
        }
        assert not storage.exists("not/there")
        with pytest.raises(FileNotFoundError):
            actions[action]()

    @pytest.mark.parametrize(
        ("offset", "sizes"),
        [
            (0, [10]), (7, [1, 0, 20]), (49_990, [20]), (100, [40_000, 30_000, 50_001]), (0, [123_450]),
            (123_400, [50]), (123_445, [10]), (123_450, [10]), (200_000, [10]), (3, []), (90_000, [100_000]),
        ],
    )  # fmt: skip
    def test_ranges_fill_their_buffers_and_end_with_the_file(
        self, storage: Storage, offset: int, sizes: list[int]
    ) -> None:
        data = os.urandom(123_450)
        storage.create("data", data)
        buffers = [bytearray(size) for size in sizes]
        expected = data[offset : offset + sum(sizes)]
        assert storage.read_into("data", offset, [memoryview(buffer) for buffer in buffers]) == len(expected)
        assert b"".join(buffers)[: len(expected)] == expected

    def test_many_files_come_in_the_order_of_their_names(self, storage: Storage) -> None:
        names = [f"many/{number}" for number in (3, 1, 2, 0)]
        for name in names:
            storage.create(name, name.encode())
        assert list(storage.read_many(names)) == [name.encode() for name in names]
        assert list(storage.read_many([])) == []

    def test_a_listing_has_the_files_and_folders_directly_below(self, storage: Storage) -> None:
        for name in ("plan/0000.parquet", "t5/abc/spec.json", "t5/abd/spec.json", "t5x/file", "top"):
            storage.create(name, b"x")
        assert storage.list("t5") == ["abc", "abd"]
        assert storage.list("t5/abc") == ["spec.json"]
        assert set(storage.list("")) - {"tmp"} == {"plan", "t5", "t5x", "top"}
        assert storage.list("t") == []
        assert storage.list("not/there") == []
        storage.create("t5/abe/spec.json", b"x")
        assert storage.list("t5") == ["abc", "abd", "abe"]

    @pytest.mark.parametrize("nbytes", [0, 300, 5_300_000])
    def test_a_temporary_file_gets_the_name_of_its_content(self, storage: Storage, nbytes: int) -> None:
        data = os.urandom(nbytes)
        for _ in range(2):  # the second worker finds the same bytes there
            with storage.temporary() as temporary:
                temporary.file.write(data)
                storage.publish_content(temporary, "data/x.tar", hashlib.sha256(data).hexdigest())
            assert not temporary.path.exists()
        assert storage.read("data/x.tar") == data

    def test_a_place_that_takes_files_passes_the_check_and_keeps_nothing_of_it(self, storage: Storage) -> None:
        storage.check_writable()
        storage.tidy()
        assert storage.list("") == []

    def test_a_file_that_nobody_relies_on_is_written_over_and_added_to(self, storage: Storage) -> None:
        for data in (b"first", b"second and longer", b""):
            storage.overwrite("logs/workers/a.json", data)
            assert storage.read("logs/workers/a.json") == data
        storage.append("logs/b.jsonl", b"one\n")
        storage.append("logs/b.jsonl", b"two\n")
        assert storage.read("logs/b.jsonl") == b"one\ntwo\n"

    def test_what_is_removed_is_gone_and_may_be_gone_already(self, storage: Storage) -> None:
        for name in ("a/b/1", "a/b/c/2", "a/bc", "d"):
            storage.create(name, b"x")
        storage.remove("d")
        storage.remove("d")
        storage.remove_tree("a/b")
        storage.remove_tree("a/b")
        assert [file.name for file in storage.files("")] == ["a/bc"]
        storage.remove_tree("a/bc")
        assert list(storage.files("a")) == []

    def test_what_was_set_aside_can_be_put_back(self, storage: Storage) -> None:
        storage.create("a/b", b"bytes")
        aside = storage.set_aside("a/b")
        assert not storage.exists("a/b")
        assert storage.temporaries() == {aside: "living"}
        storage.put_back(aside, "a/b")
        storage.remove(aside)
        assert [file.name for file in storage.files("")] == ["a/b"]
        assert storage.read("a/b") == b"bytes"
        with pytest.raises(FileNotFoundError):
            storage.set_aside("a/c")

    def test_files_are_found_at_any_depth_with_size_and_the_time_of_the_storages_clock(self, storage: Storage) -> None:
        began_s = storage.now_s()
        sizes = {"a/1": 3, "a/b/2": 0, "a/b/c/3": 100}
        for name, nbytes in sizes.items():
            storage.create(name, bytes(nbytes))
        found = [file for file in storage.files("a") if not file.name.startswith("tmp/")]
        assert {file.name: file.nbytes for file in found} == sizes
        assert all(abs(file.modified_s - began_s) < 300 for file in found)


def test_caches_of_two_prefixes_of_a_bucket_do_not_see_each_other(bucket: str) -> None:
    one, two, both = (ObjectStorage(f"s3://{bucket}{prefix}") for prefix in ("/a", "/b/", ""))
    one.create("x", b"1")
    two.create("x", b"2")
    assert (one.read("x"), two.read("x"), both.read("b/x")) == (b"1", b"2", b"2")
    assert one.list("") == ["x"]
    assert both.list("") == ["a", "b"]


def test_credentials_come_from_the_file_of_a_profile(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    with pytest.raises(InputError, match="AWS_PROFILE mine"):
        ObjectStorage(f"s3://{bucket}").exists("x")
    (tmp_path / "credentials").write_text(f"[mine]\naws_access_key_id = AKIA\naws_secret_access_key = {SECRET}\n")
    assert not ObjectStorage(f"s3://{bucket}").exists("x")


def test_a_process_forked_from_one_that_used_a_bucket_is_told_and_does_not_hang(bucket: str) -> None:
    storage = ObjectStorage(f"s3://{bucket}")
    assert not storage.exists("x")
    receiver, sender = os.pipe()
    if os.fork() == 0:
        try:
            storage.exists("x")
        except InputError as refused:
            os.write(sender, str(refused).encode())
        os._exit(0)
    os.close(sender)
    with open(receiver) as told:
        assert "forked" in told.read()
    os.wait()


@pytest.mark.parametrize(
    "location",
    [
        f"s3://user:{SECRET}@bucket/x",
        f"s3://{SECRET}@bucket/x",
        f"s3://bucket/x?X-Amz-Signature={SECRET}",
        f"az://container/x#{SECRET}",
    ],
)
def test_a_url_that_holds_a_secret_is_refused_without_repeating_it(location: str) -> None:
    with pytest.raises(InputError, match="password") as refused:
        open_storage(location)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("location", ["s3://", "s3:///x", "s3://bucket/a//b", "s3://bucket/../x", "gs://bück/x"])
def test_a_url_of_another_form_is_refused(location: str) -> None:
    with pytest.raises(InputError, match="expected"):
        open_storage(location)


def test_the_three_services_and_folders_are_told_apart(tmp_path: Path) -> None:
    assert parse_location("gs://b.c/x/y/") == ("gs", "b.c", "x/y")
    assert str(open_storage("az://container").root) == "az://container"
    assert open_storage(f"file://{tmp_path}").root == open_storage(str(tmp_path)).root == tmp_path
    with pytest.raises(InputError, match="unknown scheme"):
        open_storage("ftp://host/cache")


class TestFaults:
    """What is told of a failed request."""

    def test_a_missing_bucket(self, bucket: str) -> None:
        storage = ObjectStorage("s3://no-such-bucket/p")
        for action in (lambda: storage.read("x"), lambda: storage.exists("x"), lambda: storage.create("x", b"")):
            with pytest.raises(MachineError, match=r"s3://no-such-bucket/p/x: .*404 NoSuchBucket; there is no such"):
                action()
        with pytest.raises(MachineError, match="listing in bucket no-such-bucket failed: 404 NoSuchBucket"):
            storage.list("plan")

    def test_a_service_that_nobody_listens_at(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in environment("http://127.0.0.1:9").items():
            monkeypatch.setenv(name, value)
        limits = RequestLimits(action_s=0.3, first_pause_s=0.01)
        with pytest.raises(MachineError, match=r"failed \d+ times in 0 s: no connection to the service") as told:
            ObjectStorage("s3://bucket/p", limits=limits).read("x")
        assert told.value.exit_code == 5

    def test_credentials_that_nobody_gives(self, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(MachineError, match="no credentials were found; set AWS_ACCESS_KEY_ID"):
            ObjectStorage(f"s3://{bucket}", limits=QUICK).read("x")

    @pytest.mark.parametrize(
        ("text", "cause", "is_transient"),
        [
            ("status code: 503 Service Unavailable: <Code>SlowDown</Code>", "503 SlowDown", True),
            ("status code: 400 Bad Request: <Code>ExpiredToken</Code>", "400 ExpiredToken", False),
            ("status code: 400 Bad Request: <Code>RequestTimeout</Code>", "400 RequestTimeout", True),
            ("status code: 403 Forbidden: <Code>SignatureDoesNotMatch</Code>", "403 SignatureDoesNotMatch", False),
            ("status code: 429 Too Many Requests", "429", True),
            ("status code: 501 Not Implemented", "501", False),
            ("kind: Timeout", "no complete answer in time", True),
            ("inner: BareRedirect", "redirected to nowhere", False),
            ("something new", "Exception", False),
        ],
    )
    def test_faults_are_sorted_into_those_that_pass_and_others(self, text: str, cause: str, is_transient: bool) -> None:
        secrets = f" uri: https://x/?sig={SECRET} <StringToSign>{SECRET}</StringToSign> "
        fault = describe_fault(Exception(text + secrets))
        assert (fault.cause, fault.is_transient) == (cause, is_transient)
        assert SECRET not in fault.cause + fault.advice


def test_names_of_uploads_are_not_shared_by_users() -> None:
    storage = ObjectStorage(f"s3://bucket/{uuid.uuid4().hex}")
    with storage.temporary() as temporary:
        assert str(os.getuid()) in str(temporary.path)
