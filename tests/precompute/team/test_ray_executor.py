"""Workers as actors of a real Ray cluster of two nodes on this machine: the same cache, whoever is lost."""

import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mimir_precompute.config import TeamOptions
from mimir_precompute.pipeline import EncodeOutcome
from mimir_precompute.team.encode_team import choose_team
from mimir_precompute.team.ray_executor import RayCluster, connect
from mimir_shared.errors import CacheError, InputError
from mimir_shared.manifest import CacheFormat
from tests.conftest import REPOSITORY
from tests.faults.workers import TEXT, compared, make_clips
from tests.precompute.team.fake_team import LUCK, count_records, encode_with, plan_clips, wait_for
from tests.precompute.team.fake_worker import Misfortune, unlucky_encoders

ray = pytest.importorskip("ray")

OBJECT_STORE_BYTES = 100 * 10**6


class TwoNodes:
    """A cluster with one CPU on each of two nodes, so that of two actors each has a node of its own."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
        self.cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        self.second: Any = None
        self.add_second()

    def add_second(self) -> None:
        self.second = self.cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)
        self.cluster.wait_for_nodes()

    def lose_second(self) -> None:
        """Kill every process of that node, as a power cut does."""
        self.cluster.remove_node(self.second, allow_graceful=False)

    def connected(self) -> RayCluster:
        return replace(connect(self.cluster.address, "cpu"), encoders_of=unlucky_encoders)


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    with pytest.MonkeyPatch.context() as patch:
        # what actors import: these tests, and this checkout
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_DISABLE_IMPORT_WARNING", "1")
        started = TwoNodes()
        try:
            yield started
        finally:
            ray.shutdown()
            started.cluster.shutdown()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("ray") / "clips")


@pytest.fixture
def text_cache(tmp_path: Path, clips: Path) -> Path:
    """A plan of ten shards of one clip."""
    plan_clips(tmp_path / "cache", clips)
    return tmp_path / "cache"


def encode_by_actors(nodes: TwoNodes, cache: Path, misfortune: Misfortune = LUCK, **options: Any) -> EncodeOutcome:
    return encode_with(cache, 2, start=nodes.connected().start, misfortune=misfortune, **options)


@pytest.mark.parametrize("data_format", ["webdataset", "zarr"])
def test_actors_make_the_cache_of_one_worker(
    nodes: TwoNodes, tmp_path: Path, toy_clips: Path, data_format: CacheFormat
) -> None:
    caches = tmp_path / "by-actors", tmp_path / "alone"
    for cache in caches:
        plan_clips(cache, toy_clips, shard_size=2)
    encode_with(caches[1], 1, data_format=data_format)
    outcome = encode_by_actors(nodes, caches[0], data_format=data_format)
    assert outcome.snapshot is not None
    assert [made.shards_made for made in outcome.features] == [6] * 4
    assert compared(caches[0]) == compared(caches[1])


def test_an_actor_that_is_killed_is_replaced_and_its_shard_is_made(
    nodes: TwoNodes, text_cache: Path, tmp_path: Path, clips: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    once = tmp_path / "killed"
    outcome = encode_by_actors(nodes, text_cache, Misfortune(key="004.mp4", once=str(once)), features=TEXT)
    assert once.exists()
    assert outcome.snapshot is not None
    assert "(Ray) was lost, with its process or its node" in capfd.readouterr().err
    plan_clips(tmp_path / "alone", clips)
    encode_with(tmp_path / "alone", 1, features=TEXT)
    assert compared(text_cache) == compared(tmp_path / "alone")


def test_a_node_that_is_lost_costs_its_shards_alone(
    nodes: TwoNodes, text_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def lose_second_soon() -> None:
        wait_for(lambda: count_records(text_cache) >= 4, "the actors make nothing")
        nodes.lose_second()

    thief = threading.Thread(target=lose_second_soon)
    thief.start()
    outcome = encode_by_actors(nodes, text_cache, Misfortune(clip_s=0.3), features=TEXT)
    thief.join()
    nodes.add_second()
    assert [made.encoded for made in outcome.features] == [10] * 3
    assert outcome.snapshot is not None
    assert "(Ray) was lost" in capfd.readouterr().err


def test_an_error_of_one_actor_is_that_of_the_run_and_ends_the_others_cleanly(
    nodes: TwoNodes, text_cache: Path
) -> None:
    with pytest.raises(CacheError, match=r"^this cache is damaged, says the test$"):
        encode_by_actors(nodes, text_cache, Misfortune(key="004.mp4", what="damaged", clip_s=0.05), features=TEXT)
    assert not (text_cache / "leases").exists()


def test_the_cluster_says_how_many_workers_there_are(nodes: TwoNodes) -> None:
    options = TeamOptions(executor="ray", ray_address=nodes.cluster.address)
    team = choose_team(options, LUCK.models(), TEXT, None)
    assert (team.told, team.devices, team.is_one) == ("1 Ray actor", ("cpu",), False)
    team = choose_team(replace(options, workers="3", place=("llm=0",)), LUCK.models(), TEXT, None)
    assert team.told == "3 Ray actors"
    assert team.placement["answers"] == (0,)


def test_where_ray_is_not_installed_or_no_cluster_is_there_the_way_on_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"--executor 'dask': expected one of local, ray"):
        choose_team(TeamOptions(executor="dask"), LUCK.models(), TEXT, None)
    with pytest.raises(InputError, match=r"--device cuda:1: Ray says which GPU an actor has"):
        connect("auto", "cuda:1")

    def find_none(**options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "init", find_none)
        with pytest.raises(InputError, match=r"--ray-address auto: no Ray cluster there .* `ray start --head`"):
            connect("auto", "cpu")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"ray is not installed here; pip install 'mimir-t2v\[ray\]' on every node"):
        connect("auto", "cpu")
