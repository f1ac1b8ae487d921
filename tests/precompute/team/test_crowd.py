"""Thousands of workers at one folder: what they ask of it, counted."""

import random
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from mimir_precompute import pipeline
from mimir_precompute.cli.messages import describe_outcome
from mimir_precompute.pipeline import EncodeJob, EncodeOutcome, open_features
from mimir_precompute.team import crowd
from mimir_precompute.team.crowd import poll_s, start_pause_s
from mimir_precompute.team.slurm import SlurmTask
from mimir_precompute.workers.lease import Leases, ShardClaims, Waiting
from mimir_precompute.workers.seen_lease import this_process
from mimir_shared.feature_folder import FeatureFolder
from mimir_shared.plan_file import read_plan
from mimir_shared.storage.folder import LocalStorage
from mimir_shared.storage.lease_store import StoredLease
from mimir_shared.storage.local_leases import LocalLease, LocalLeaseStore
from tests.fake_encoders import FakeEncoders
from tests.faults.workers import TEXT, make_clips
from tests.precompute.team.fake_team import encode_with, plan_clips

FINGERPRINT = "0123456789ab"


class CountingStorage(LocalStorage):
    """Counts what is asked of a shared file system."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: Counter[str] = Counter()

    def list(self, directory: str) -> list[str]:
        self.asked["list"] += 1
        return super().list(directory)

    def lease_store(self) -> LocalLeaseStore:
        return CountingLeases(self)


class CountingLeases(LocalLeaseStore):
    def __init__(self, storage: CountingStorage) -> None:
        super().__init__(storage)
        self.asked = storage.asked

    def create(self, name: str, owner: bytes) -> LocalLease | None:
        lease = super().create(name, owner)
        self.asked["lease" if lease else "lease in vain"] += 1
        return lease

    def read(self, name: str) -> StoredLease | None:
        self.asked["read"] += 1
        return super().read(name)

    def now_s(self) -> float:
        self.asked["time"] += 1
        return super().now_s()


def encode_all(cache: Path, workers: int, shards: int) -> tuple[Counter[str], int]:
    """Have many workers of one array make all shards in turns: what they asked until all was done, and waits."""
    storage = CountingStorage(cache)
    folder = FeatureFolder(storage, "t5", FINGERPRINT)
    store = storage.lease_store()
    claims = []
    leases = [Leases(store, beats=False) for _ in range(workers)]
    for number, own in enumerate(leases):
        begin_with = SlurmTask(number=number, count=workers).own_shards(shards)
        claims.append(ShardClaims(folder, range(shards), own, begin_with=begin_with, choose=random.Random(number)))
    waits = 0
    at: dict[int, int] = {}
    working = list(range(workers))
    while working:
        for number in working.copy():
            if number in at:
                shard = at.pop(number)
                storage.create(folder.record_path(shard, 0), b"only its name counts here")
                claims[number].finished(shard)
            found = claims[number].attempt()
            if found is None:
                working.remove(number)
            elif isinstance(found, Waiting):
                waits += 1
            else:
                at[number] = found
    for own in leases:
        own.close()
    return storage.asked, waits


@pytest.mark.parametrize("workers", [4, 200])
def test_tasks_that_start_together_take_no_lease_in_vain_and_a_shard_costs_the_same_by_four_as_by_hundreds(
    tmp_path: Path, workers: int
) -> None:
    asked, waits = encode_all(tmp_path, workers, shards=400)
    assert asked["lease"] == 400
    assert asked["lease in vain"] == 0
    # three listings for a claim (done, leased, done since), and one by which each worker sees that nothing is left
    assert asked["list"] <= 3 * 400 + 2 * (workers + waits)
    assert asked["read"] <= 400 + 8 * waits
    assert waits <= workers


def test_more_workers_than_shards_wait_and_take_nothing_in_vain(tmp_path: Path) -> None:
    asked, _ = encode_all(tmp_path, workers=300, shards=100)
    assert asked["lease"] == 100
    assert asked["lease in vain"] == 0


def test_a_worker_that_starts_reads_some_of_very_many_leases(tmp_path: Path) -> None:
    storage = CountingStorage(tmp_path)
    store = storage.lease_store()
    with Leases(store, beats=False) as others, Leases(store, beats=False) as ours:
        for shard in range(300):
            others.take(f"leases/t5/{FINGERPRINT}/{shard:06d}")
        storage.asked.clear()
        ours.remove_abandoned()
        assert storage.asked["read"] == 64
        assert storage.asked["list"] == 5  # of each feature, and of the one that has leases
        storage.asked.clear()


@pytest.mark.parametrize("workers", [1, 10, 100, 1000, 5000])
def test_waiting_workers_ask_no_more_together_than_a_few_do_alone(workers: int) -> None:
    assert workers / poll_s(workers, own_s=2.0) <= 100
    assert poll_s(workers, own_s=2.0) >= 2.0


def test_starts_are_spread_and_one_that_is_alone_does_not_wait() -> None:
    assert start_pause_s(1, random.Random(0)) == 0
    pauses = [start_pause_s(4000, random.Random(seed)) for seed in range(4000)]
    in_a_second = Counter(int(pause) for pause in pauses)
    assert max(in_a_second.values()) <= 100
    assert max(pauses) <= 60
    assert max(start_pause_s(4, random.Random(seed)) for seed in range(100)) <= 0.1


@pytest.fixture
def finished(tmp_path: Path) -> EncodeJob:
    """A cache whose last shard has just been committed, and the job of a worker that sees that."""
    cache = tmp_path / "cache"
    plan_clips(cache, make_clips(tmp_path / "clips", 2))
    encode_with(cache, 1, features=TEXT)
    shutil.rmtree(cache / "snapshots")
    storage = LocalStorage(cache)
    plan = read_plan(storage)
    return EncodeJob(storage=storage, plan=plan, encoders=FakeEncoders(), shards=(0, 1), features=TEXT)


def conclude_and_count(job: EncodeJob, monkeypatch: pytest.MonkeyPatch) -> tuple[EncodeOutcome, int]:
    calls = []
    conclude = pipeline.conclude
    monkeypatch.setattr(crowd, "conclude", lambda *arguments: (calls.append(1), conclude(*arguments)))
    outcome = EncodeOutcome()
    crowd.conclude_once(job, open_features(job), outcome)
    return outcome, len(calls)


def test_one_worker_judges_the_whole_and_writes_the_snapshot_and_the_next_ones_take_it(
    finished: EncodeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, concluded = conclude_and_count(finished, monkeypatch)
    assert (first.snapshot is not None, concluded) == (True, 1)
    second, concluded = conclude_and_count(finished, monkeypatch)
    assert (second.snapshot, concluded) == (first.snapshot, 0)
    assert not (finished.storage.root / "leases").exists()


def test_a_worker_leaves_the_conclusion_to_one_that_is_at_it_unless_that_one_is_dead(
    finished: EncodeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = finished.storage.lease_store()
    with Leases(store, beats=False) as other:
        other.take("leases/conclusion")
        outcome, concluded = conclude_and_count(finished, monkeypatch)
        assert (outcome.snapshot, outcome.others_conclude, concluded) == (None, True, 0)
        assert "another worker writes the snapshot" in describe_outcome("cache", outcome)
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead = Leases(store, beats=False, owner=replace(this_process(1.0), pid=ended.pid))
    dead.take("leases/conclusion")
    outcome, concluded = conclude_and_count(finished, monkeypatch)
    assert (outcome.snapshot is not None, concluded) == (True, 1)


def test_what_is_not_complete_is_judged_by_each_for_its_own_shards(
    finished: EncodeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    next(finished.storage.root.glob("t5/*/manifests/000001*")).unlink()
    outcome, concluded = conclude_and_count(replace(finished, shards=(0,)), monkeypatch)
    assert (outcome.snapshot, outcome.others_conclude, concluded) == (None, False, 1)
