"""Leases: who has a shard, for how long, and who may take it over."""

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from mimir_precompute.lease import Leases, ShardClaims, read_lease, storage_time_s, take_over
from mimir_precompute.termination import _endings
from mimir_shared import failpoints
from mimir_shared.disk import Disk
from mimir_shared.errors import InputError
from mimir_shared.feature_folder import FeatureFolder
from mimir_shared.layout import lease_name
from mimir_shared.process_identity import process_domain
from mimir_shared.storage import LocalStorage

FINGERPRINT = "0123456789ab"
HOUR_S = 3600.0


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


@pytest.fixture
def folder(storage: LocalStorage) -> FeatureFolder:
    return FeatureFolder(storage, "t5", FINGERPRINT)


def name_of(shard: int) -> str:
    return lease_name("t5", FINGERPRINT, shard)


def commit(folder: FeatureFolder, shard: int) -> None:
    folder.storage.create(folder.record_path(shard, 0), b"only its name counts here")


def write_lease(storage: LocalStorage, shard: int, *, pid: int, domain: str, age_s: float = 0.0) -> None:
    owner = {"host": "elsewhere", "domain": domain, "pid": pid, "token": f"token of {pid}"}
    storage.create(name_of(shard), json.dumps(owner).encode())
    touched = storage_time_s(storage) - age_s
    os.utime(storage.path(name_of(shard)), (touched, touched))


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_lease_names_its_owner_from_the_moment_it_is_there(tmp_path: Path) -> None:
    class DiesBehindTheLink(Disk):
        def link(self, source: Path, target: Path) -> None:
            super().link(source, target)
            raise SystemExit

    storage = LocalStorage(tmp_path, DiesBehindTheLink())
    with pytest.raises(SystemExit), Leases(storage) as leases:
        leases.take(name_of(0))
    seen = read_lease(storage, name_of(0))
    assert seen is not None
    assert (seen.pid, seen.domain) == (os.getpid(), process_domain())


def test_a_lease_is_one_workers_until_it_drops_it(storage: LocalStorage) -> None:
    with Leases(storage) as mine, Leases(storage) as other:
        assert mine.take(name_of(0))
        assert not other.take(name_of(0))
        mine.drop(name_of(0))
        assert other.take(name_of(0))
    assert not (storage.root / "leases").exists()


def test_a_heartbeat_is_seen_by_the_storages_clock(storage: LocalStorage) -> None:
    with Leases(storage) as leases:
        leases.take(name_of(0))
        os.utime(storage.path(name_of(0)), (1.0, 1.0))
        seen = read_lease(storage, name_of(0))
        assert seen is not None
        assert seen.is_stale(storage_time_s(storage))
        leases.touch()
        seen = read_lease(storage, name_of(0))
        assert seen is not None
        assert not seen.is_stale(storage_time_s(storage))


def test_the_thread_touches_leases_on_its_own(storage: LocalStorage) -> None:
    beats = threading.Event()
    failpoints.arm(lambda name: beats.set() if name == "lease.heartbeat" else None)
    try:
        with Leases(storage, heartbeat_s=0.01) as leases:
            leases.take(name_of(0))
            assert beats.wait(10)
    finally:
        failpoints.arm(None)


@pytest.mark.parametrize("age_s", [HOUR_S, -HOUR_S])
def test_a_lease_that_is_silent_or_lies_far_ahead_is_stale(storage: LocalStorage, age_s: float) -> None:
    write_lease(storage, 0, pid=1, domain="another boot", age_s=age_s)
    seen = read_lease(storage, name_of(0))
    assert seen is not None
    assert seen.is_stale(storage_time_s(storage))


def test_claims_take_over_the_lease_of_a_dead_process_at_once_and_of_a_silent_one(
    storage: LocalStorage, folder: FeatureFolder
) -> None:
    write_lease(storage, 0, pid=dead_pid(), domain=process_domain())
    write_lease(storage, 1, pid=1, domain="another boot", age_s=HOUR_S)
    with Leases(storage) as leases:
        claims = ShardClaims(folder, (0, 1), leases)
        assert sorted(shard for shard in (claims.next(), claims.next()) if shard is not None) == [0, 1]
        assert claims.next() is None


def test_claims_wait_for_a_living_worker_and_end_when_it_has_committed(
    storage: LocalStorage, folder: FeatureFolder
) -> None:
    write_lease(storage, 0, pid=1, domain="another boot")
    said: list[str] = []
    with Leases(storage) as leases:
        claims = ShardClaims(folder, (0,), leases, say=said.append, poll_s=0.01)
        threading.Timer(0.2, commit, (folder, 0)).start()
        assert claims.next() is None
    assert said == ["t5: waiting for 1 shards that other workers hold"]


def test_claims_end_their_wait_when_they_are_closed(storage: LocalStorage, folder: FeatureFolder) -> None:
    write_lease(storage, 0, pid=1, domain="another boot")
    with Leases(storage) as leases:
        claims = ShardClaims(folder, (0,), leases, poll_s=60)
        threading.Timer(0.2, claims.close).start()
        started = time.monotonic()
        assert claims.next() is None
        assert time.monotonic() - started < 30


def test_a_worker_that_is_alone_goes_in_order_and_skips_what_is_committed(
    storage: LocalStorage, folder: FeatureFolder
) -> None:
    commit(folder, 1)
    with Leases(storage) as leases:
        claims = ShardClaims(folder, range(4), leases)
        assert [claims.next() for _ in range(4)] == [0, 2, 3, None]
        commit(folder, 2)
        claims.finished(2)
        assert claims.next() is None
        claims.finished(0)  # given up: not committed
        assert claims.next() == 0


def test_a_shard_waits_for_what_it_is_made_from(storage: LocalStorage) -> None:
    answers, llm = FeatureFolder(storage, "answers", FINGERPRINT), FeatureFolder(storage, "llm", FINGERPRINT)
    commit(answers, 1)
    with Leases(storage) as leases, Leases(storage) as other:
        assert other.take(lease_name("answers", FINGERPRINT, 0))
        claims = ShardClaims(llm, (0, 1), leases, needs=[answers], poll_s=0.01)
        assert claims.next() == 1

        def finish_answers() -> None:
            commit(answers, 0)
            other.drop(lease_name("answers", FINGERPRINT, 0))

        threading.Timer(0.2, finish_answers).start()
        assert claims.next() == 0


def test_what_nobody_makes_is_not_waited_for(storage: LocalStorage) -> None:
    answers, llm = FeatureFolder(storage, "answers", FINGERPRINT), FeatureFolder(storage, "llm", FINGERPRINT)
    with Leases(storage) as leases, pytest.raises(InputError, match=r"shard 0 has no `answers` yet.*answers,llm"):
        ShardClaims(llm, (0,), leases, needs=[answers]).next()


def test_a_worker_that_is_stopped_leaves_no_empty_folder_of_leases(storage: LocalStorage) -> None:
    with Leases(storage) as leases:
        assert leases.take(name_of(0))
        _endings.run()
        assert not (storage.root / "leases").exists()


def test_a_lease_that_was_taken_over_is_not_dropped_by_its_former_owner(storage: LocalStorage) -> None:
    with Leases(storage) as slow, Leases(storage) as fast:
        slow.take(name_of(0))
        seen = read_lease(storage, name_of(0))
        assert seen is not None
        assert take_over(storage, seen)
        assert fast.take(name_of(0))
        slow.touch()
        slow.drop(name_of(0))
        after = read_lease(storage, name_of(0))
        assert after is not None
        assert after.token != seen.token


def test_a_lease_taken_afresh_meanwhile_goes_back_to_its_owner(storage: LocalStorage) -> None:
    write_lease(storage, 0, pid=dead_pid(), domain=process_domain())
    stale = read_lease(storage, name_of(0))
    assert stale is not None
    storage.path(name_of(0)).unlink()
    with Leases(storage) as fast:
        fast.take(name_of(0))
        assert not take_over(storage, stale)
        assert not Leases(storage).take(name_of(0))


def test_leases_of_processes_that_died_here_are_removed_at_the_start_and_others_stay(storage: LocalStorage) -> None:
    write_lease(storage, 0, pid=dead_pid(), domain=process_domain())
    write_lease(storage, 1, pid=os.getppid(), domain=process_domain(), age_s=HOUR_S)
    write_lease(storage, 2, pid=1, domain="another boot", age_s=HOUR_S)
    with Leases(storage) as leases:
        leases.remove_abandoned()
    assert [read_lease(storage, name_of(shard)) is None for shard in range(3)] == [True, False, False]
