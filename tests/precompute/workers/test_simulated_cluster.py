"""Many workers under a simulated clock, with the real leases and the real commit."""

import math

import pytest
from benchmarks.simulated_cluster import Cluster, Outcome, Simulation

from mimir_precompute.workers import lease
from mimir_shared.features import FEATURES

SMALL = Cluster(workers=12, shards=360, dying=0.1, slow=1)


def _run(cluster: Cluster) -> Outcome:
    simulation = Simulation(cluster)
    outcome = simulation.run()
    committed = [len(folder.generations()) for folder in simulation.folders.values()]
    assert committed == [cluster.shards] * len(FEATURES)
    assert outcome.results["committed"] == outcome.committed == cluster.shards * len(FEATURES)
    return outcome


def test_deaths_and_a_slow_worker_cost_little_time_and_hardly_any_work_twice() -> None:
    outcome = _run(SMALL)
    assert 1 <= outcome.ratio <= 1.1
    assert outcome.duplicated <= 0.02
    assert outcome.lost > 0


def test_without_second_copies_a_slow_worker_holds_up_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with_copies = _run(SMALL)
    monkeypatch.setattr(lease, "SLOW_MEDIANS", math.inf)
    assert _run(SMALL).makespan_s > 1.1 * with_copies.makespan_s


def test_workers_of_equal_speed_make_nothing_twice() -> None:
    outcome = _run(Cluster(workers=8, shards=64, dying=0, slow=0))
    assert outcome.results == {"committed": 256}
    assert outcome.duplicated == outcome.lost == 0


def test_workers_that_are_preempted_and_come_back_finish_the_cache() -> None:
    outcome = _run(Cluster(workers=10, shards=60, dying=0.1, preempted=0.5, slow=1))
    assert outcome.lost > 0


def test_a_simulation_follows_from_its_seed() -> None:
    cluster = Cluster(workers=6, shards=24, dying=0.2, preempted=0.2)
    assert _run(cluster) == _run(cluster)
    other = _run(Cluster(workers=6, shards=24, dying=0.2, preempted=0.2, seed=1))
    assert other.makespan_s != _run(cluster).makespan_s
