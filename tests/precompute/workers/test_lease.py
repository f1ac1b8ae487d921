"""Leases: who has a shard, for how long, and who may take it over."""

import json
import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mimir_precompute.termination import _endings
from mimir_precompute.workers.lease import Leases, ShardClaims, Waiting, take_over
from mimir_precompute.workers.seen_lease import LeaseOwner, read_lease
from mimir_shared import failpoints
from mimir_shared.errors import InputError, MachineError
from mimir_shared.feature_folder import FeatureFolder
from mimir_shared.layout import lease_name
from mimir_shared.process_identity import process_domain
from mimir_shared.storage.bucket import ObjectStorage
from mimir_shared.storage.disk import Disk
from mimir_shared.storage.folder import LocalStorage
from mimir_shared.storage.protocol import Storage
from tests.buckets import QUICK, backdate

FINGERPRINT = "0123456789ab"
HOUR_S = 3600.0


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return LocalStorage(tmp_path)
    return ObjectStorage(f"s3://{request.getfixturevalue('bucket')}/cache", limits=QUICK)


@pytest.fixture
def folder(storage: Storage) -> FeatureFolder:
    return FeatureFolder(storage, "t5", FINGERPRINT)


def name_of(shard: int) -> str:
    return lease_name("t5", FINGERPRINT, shard)


def commit(folder: FeatureFolder, shard: int) -> None:
    folder.storage.create(folder.record_path(shard, 0), b"only its name counts here")


def write_lease(storage: Storage, shard: int, *, pid: int, domain: str, age_s: float = 0.0) -> None:
    owner = {"host": "elsewhere", "domain": domain, "pid": pid, "token": f"token of {pid}"}
    assert storage.lease_store().create(name_of(shard), json.dumps(owner).encode()) is not None
    make_older(storage, shard, age_s)


def make_older(storage: Storage, shard: int, age_s: float) -> None:
    """Have the storage say that a lease was touched so much earlier."""
    if isinstance(storage, ObjectStorage):
        backdate(storage, name_of(shard), age_s)
    elif isinstance(storage, LocalStorage):
        touched_s = storage.path(name_of(shard)).stat().st_mtime - age_s
        os.utime(storage.path(name_of(shard)), (touched_s, touched_s))


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_mount_that_vanishes_while_a_lease_is_made_is_told_and_not_waited_for(tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    class VanishesBeforeTheLink(Disk):
        def link(self, source: Path, target: Path) -> None:
            cache.rename(tmp_path / "away")
            cache.mkdir()  # the folder that it was mounted on
            super().link(source, target)

    store = LocalStorage(cache, VanishesBeforeTheLink()).lease_store()
    with pytest.raises(MachineError, match="is not the folder any more"):
        store.create(name_of(0), b"{}")
    assert list(cache.iterdir()) == []


def test_a_lease_whose_file_is_taken_away_is_told_and_not_waited_for(tmp_path: Path) -> None:
    class LosesTheFile(Disk):
        def link(self, source: Path, target: Path) -> None:
            source.unlink()
            super().link(source, target)

    with pytest.raises(FileNotFoundError):
        LocalStorage(tmp_path, LosesTheFile()).lease_store().create(name_of(0), b"{}")


def test_a_lease_names_its_owner_from_the_moment_it_is_there(tmp_path: Path) -> None:
    class DiesBehindTheLink(Disk):
        def link(self, source: Path, target: Path) -> None:
            super().link(source, target)
            raise SystemExit

    storage = LocalStorage(tmp_path, DiesBehindTheLink())
    with pytest.raises(SystemExit), Leases(storage.lease_store()) as leases:
        leases.take(name_of(0))
    seen = read_lease(storage.lease_store(), name_of(0))
    assert seen is not None
    assert (seen.owner.pid, seen.owner.domain) == (os.getpid(), process_domain())


def test_a_lease_is_one_workers_until_it_drops_it(storage: Storage) -> None:
    with Leases(storage.lease_store()) as mine, Leases(storage.lease_store()) as other:
        assert mine.take(name_of(0))
        assert not other.take(name_of(0))
        mine.drop(name_of(0))
        assert other.take(name_of(0))
    assert storage.list("leases") == []


def test_a_heartbeat_is_seen_by_the_storages_clock(storage: Storage) -> None:
    with Leases(storage.lease_store()) as leases:
        leases.take(name_of(0))
        make_older(storage, 0, HOUR_S)
        seen = read_lease(storage.lease_store(), name_of(0))
        assert seen is not None
        assert seen.is_stale(storage.now_s())
        leases.touch()
        seen = read_lease(storage.lease_store(), name_of(0))
        assert seen is not None
        assert not seen.is_stale(storage.now_s())


def test_the_thread_touches_leases_on_its_own(storage: Storage) -> None:
    beats = threading.Event()
    failpoints.arm(lambda name: beats.set() if name == "lease.heartbeat" else None)
    try:
        with Leases(storage.lease_store(), heartbeat_s=0.01) as leases:
            leases.take(name_of(0))
            assert beats.wait(10)
    finally:
        failpoints.arm(None)


@pytest.mark.parametrize("age_s", [HOUR_S, -HOUR_S])
def test_a_lease_that_is_silent_or_lies_far_ahead_is_stale(storage: Storage, age_s: float) -> None:
    write_lease(storage, 0, pid=1, domain="another boot", age_s=age_s)
    seen = read_lease(storage.lease_store(), name_of(0))
    assert seen is not None
    assert seen.is_stale(storage.now_s())


def test_claims_take_over_the_lease_of_a_dead_process_at_once_and_of_a_silent_one(
    storage: Storage, folder: FeatureFolder
) -> None:
    write_lease(storage, 0, pid=dead_pid(), domain=process_domain())
    write_lease(storage, 1, pid=1, domain="another boot", age_s=HOUR_S)
    with Leases(storage.lease_store()) as leases:
        claims = ShardClaims(folder, (0, 1), leases)
        assert sorted(shard for shard in (claims.next(), claims.next()) if shard is not None) == [0, 1]
        assert claims.next() is None


def test_claims_wait_for_a_living_worker_and_end_when_it_has_committed(storage: Storage, folder: FeatureFolder) -> None:
    write_lease(storage, 0, pid=1, domain="another boot")
    said: list[str] = []
    with Leases(storage.lease_store()) as leases:
        claims = ShardClaims(folder, (0,), leases, say=said.append, poll_s=0.01)
        threading.Timer(0.2, commit, (folder, 0)).start()
        assert claims.next() is None
    assert said == ["t5: waiting for 1 shards that other workers hold"]


def test_claims_end_their_wait_when_they_are_closed(storage: Storage, folder: FeatureFolder) -> None:
    write_lease(storage, 0, pid=1, domain="another boot")
    with Leases(storage.lease_store()) as leases:
        claims = ShardClaims(folder, (0,), leases, poll_s=60)
        threading.Timer(0.2, claims.close).start()
        started = time.monotonic()
        assert claims.next() is None
        assert time.monotonic() - started < 30


def test_a_worker_that_is_alone_goes_in_order_and_skips_what_is_committed(
    storage: Storage, folder: FeatureFolder
) -> None:
    commit(folder, 1)
    with Leases(storage.lease_store()) as leases:
        claims = ShardClaims(folder, range(4), leases)
        assert [claims.next() for _ in range(4)] == [0, 2, 3, None]
        commit(folder, 2)
        claims.finished(2)
        assert claims.next() is None
        claims.finished(0)  # given up: not committed
        assert claims.next() == 0


def test_a_shard_waits_for_what_it_is_made_from(storage: Storage) -> None:
    answers, llm = FeatureFolder(storage, "answers", FINGERPRINT), FeatureFolder(storage, "llm", FINGERPRINT)
    commit(answers, 1)
    with Leases(storage.lease_store()) as leases, Leases(storage.lease_store()) as other:
        assert other.take(lease_name("answers", FINGERPRINT, 0))
        claims = ShardClaims(llm, (0, 1), leases, needs=[answers], poll_s=0.01)
        assert claims.next() == 1

        def finish_answers() -> None:
            commit(answers, 0)
            other.drop(lease_name("answers", FINGERPRINT, 0))

        threading.Timer(0.2, finish_answers).start()
        assert claims.next() == 0


def test_what_other_workers_of_the_run_see_to_is_waited_for_though_nobody_is_at_it(storage: LocalStorage) -> None:
    answers, llm = FeatureFolder(storage, "answers", FINGERPRINT), FeatureFolder(storage, "llm", FINGERPRINT)
    with Leases(storage.lease_store()) as leases:
        claims = ShardClaims(llm, (0,), leases, needs=[answers], needs_will_come=True)
        assert claims.attempt() == Waiting(1)
        commit(answers, 0)
        assert claims.attempt() == 0


def test_a_worker_takes_the_shards_first_that_it_is_to_begin_with(storage: LocalStorage, folder: FeatureFolder) -> None:
    with Leases(storage.lease_store()) as leases:
        claims = ShardClaims(folder, range(6), leases, begin_with=(2, 5))
        assert [claims.next(), claims.next()] == [2, 5]
        assert sorted(claims.next() for _ in range(4)) == [0, 1, 3, 4]


def test_what_nobody_makes_is_not_waited_for(storage: Storage) -> None:
    answers, llm = FeatureFolder(storage, "answers", FINGERPRINT), FeatureFolder(storage, "llm", FINGERPRINT)
    with (
        Leases(storage.lease_store()) as leases,
        pytest.raises(InputError, match=r"shard 0 has no `answers` yet.*answers,llm"),
    ):
        ShardClaims(llm, (0,), leases, needs=[answers]).next()


def test_a_worker_that_is_stopped_leaves_no_empty_folder_of_leases(storage: Storage) -> None:
    with Leases(storage.lease_store()) as leases:
        assert leases.take(name_of(0))
        _endings.run()
        assert "leases" not in storage.list("")


def test_a_lease_that_was_taken_over_is_not_dropped_by_its_former_owner(storage: Storage) -> None:
    with Leases(storage.lease_store()) as slow, Leases(storage.lease_store()) as fast:
        slow.take(name_of(0))
        seen = read_lease(storage.lease_store(), name_of(0))
        assert seen is not None
        assert take_over(storage.lease_store(), seen)
        assert fast.take(name_of(0))
        slow.touch()
        slow.drop(name_of(0))
        after = read_lease(storage.lease_store(), name_of(0))
        assert after is not None
        assert after.owner.token != seen.owner.token


def test_a_lease_taken_afresh_meanwhile_goes_back_to_its_owner(storage: Storage) -> None:
    write_lease(storage, 0, pid=dead_pid(), domain=process_domain())
    stale = read_lease(storage.lease_store(), name_of(0))
    assert stale is not None
    assert storage.lease_store().remove(stale.stored)
    with Leases(storage.lease_store()) as fast:
        fast.take(name_of(0))
        assert not take_over(storage.lease_store(), stale)
        assert not Leases(storage.lease_store()).take(name_of(0))


def test_leases_of_processes_that_died_here_are_removed_at_the_start_and_others_stay(storage: Storage) -> None:
    write_lease(storage, 0, pid=dead_pid(), domain=process_domain())
    write_lease(storage, 1, pid=os.getppid(), domain=process_domain(), age_s=HOUR_S)
    write_lease(storage, 2, pid=1, domain="another boot", age_s=HOUR_S)
    with Leases(storage.lease_store()) as leases:
        leases.remove_abandoned()
    assert [read_lease(storage.lease_store(), name_of(shard)) is None for shard in range(3)] == [True, False, False]


def test_a_lease_touched_meanwhile_is_not_taken_over(storage: Storage) -> None:
    with Leases(storage.lease_store()) as slow:
        slow.take(name_of(0))
        make_older(storage, 0, HOUR_S)
        seen = read_lease(storage.lease_store(), name_of(0))
        assert seen is not None
        assert seen.is_stale(storage.now_s())
        slow.touch()
        assert not take_over(storage.lease_store(), seen)
        assert not Leases(storage.lease_store()).take(name_of(0))


def test_of_many_workers_that_take_over_one_lease_one_does(storage: Storage) -> None:
    write_lease(storage, 0, pid=dead_pid(), domain=process_domain())
    seen = read_lease(storage.lease_store(), name_of(0))
    assert seen is not None
    barrier = threading.Barrier(8)

    def try_it(_: int) -> bool:
        barrier.wait()
        return take_over(storage.lease_store(), seen)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(try_it, range(8))) == 1


def test_what_a_worker_would_wait_for_can_be_asked_without_waiting(storage: Storage, folder: FeatureFolder) -> None:
    write_lease(storage, 1, pid=1, domain="another boot")
    with Leases(storage.lease_store(), owner=LeaseOwner(host="a", domain="b", pid=1, token="c"), beats=False) as leases:
        claims = ShardClaims(folder, (0, 1), leases)
        assert claims.attempt() == 0
        assert claims.attempt() == Waiting(1)
        commit(folder, 1)
        assert claims.attempt() is None
        claims.close()


class OwnClock:
    """A worker's clock, which its test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make_three_shards(claims: ShardClaims, folder: FeatureFolder, clock: OwnClock, *, unit_s: float = 10.0) -> None:
    """Give a worker some experience, of three shards that are free."""
    for _ in range(3):
        shard = claims.attempt()
        assert isinstance(shard, int)
        clock.now_s += unit_s
        commit(folder, shard)
        claims.finished(shard)


def write_slow_lease(storage: Storage, shard: int, *, held_s: float) -> None:
    """Of a living worker elsewhere that has had the shard for so long."""
    owner = {"host": "elsewhere", "domain": "another boot", "pid": 1, "token": "slow"}
    document = {**owner, "taken_s": storage.now_s() - held_s}
    assert storage.lease_store().create(name_of(shard), json.dumps(document).encode()) is not None


def test_an_idle_worker_makes_once_more_what_another_has_had_for_long(storage: Storage, folder: FeatureFolder) -> None:
    write_slow_lease(storage, 3, held_s=15)
    write_slow_lease(storage, 4, held_s=30)
    clock, others_clock = OwnClock(), OwnClock()
    with (
        Leases(storage.lease_store(), clock=clock) as mine,
        Leases(storage.lease_store(), clock=others_clock) as others,
    ):
        claims, others_claims = ShardClaims(folder, range(5), mine), ShardClaims(folder, range(3, 8), others)
        make_three_shards(claims, folder, clock)
        assert claims.attempt() == 4
        # twice at once and not three times; 3 was not held for long enough
        assert claims.attempt() == Waiting(1)
        make_three_shards(others_claims, folder, others_clock)
        assert others_claims.attempt() == Waiting(2)
        commit(folder, 4)
        claims.finished(4)
        assert storage.list(f"leases/t5/{FINGERPRINT}") == ["000003", "000004"]
        assert claims.attempt() == Waiting(1)


def test_a_worker_that_does_not_know_how_long_a_shard_takes_waits(storage: Storage, folder: FeatureFolder) -> None:
    write_slow_lease(storage, 0, held_s=HOUR_S)
    with Leases(storage.lease_store()) as leases:
        assert ShardClaims(folder, (0,), leases).attempt() == Waiting(1)


def test_a_second_copy_whose_maker_died_is_made_by_the_next(storage: Storage, folder: FeatureFolder) -> None:
    write_slow_lease(storage, 3, held_s=30)
    dead = {"host": "here", "domain": process_domain(), "pid": dead_pid(), "token": "dead"}
    assert storage.lease_store().create(f"{name_of(3)}.again", json.dumps(dead).encode()) is not None
    clock = OwnClock()
    with Leases(storage.lease_store(), clock=clock) as leases:
        claims = ShardClaims(folder, range(4), leases)
        make_three_shards(claims, folder, clock)
        assert claims.attempt() == Waiting(1)
        assert claims.attempt() == 3


def test_a_lease_says_when_it_was_taken_by_the_storages_clock(storage: Storage) -> None:
    clock = OwnClock()
    with Leases(storage.lease_store(), clock=clock) as leases:
        began_s = storage.now_s()
        leases.take(name_of(0))
        clock.now_s += 40
        leases.take(name_of(1))
        taken_s = []
        for shard in range(2):
            seen = read_lease(storage.lease_store(), name_of(shard))
            assert seen is not None
            taken_s.append(seen.owner.taken_s)
        assert taken_s[1] - taken_s[0] == pytest.approx(40)
        assert began_s - 1 <= taken_s[0] <= storage.now_s() + 1
