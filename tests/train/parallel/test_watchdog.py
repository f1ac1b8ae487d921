"""A rank that dies or stands still ends all of them, wherever the others wait. Gloo on the CPU, no launcher."""

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mimir_train.config_document import write_document
from tests.train.caches import tiny_config
from tests.train.ranks import start_ranks

WATCHDOG_S = 2.0

SCENE = """
import os, signal, sys, time
from pathlib import Path
from mimir_train.config_document import read_document, train_config
from mimir_train.parallel.processes import start_parallel

with start_parallel(train_config(read_document(Path(sys.argv[1])))) as parallel:
    with parallel.watched("step 0"):
        parallel.wait_for_all()
    if parallel.rank == 1:
        time.sleep(3 * float(sys.argv[2]))  # as one that reads from a slow disk
    with parallel.watched("step 1"):
        parallel.wait_for_all()
    print("ready", flush=True)
    if f"stop rank {parallel.rank}" in sys.argv:
        os.kill(os.getpid(), signal.SIGSTOP)  # by itself: nobody else could be sure to come before a watchdog does
    with parallel.watched("step 2"):
        time.sleep(600)  # as an exchange that never notices
"""


@contextmanager
def ended(ranks: list[subprocess.Popen[str]]) -> Iterator[None]:
    try:
        yield
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def start_scene(small_cache: Path, folder: Path, watchdog_s: float, *words: str) -> list[subprocess.Popen[str]]:
    settings = folder / "settings.yaml"
    settings.write_text(write_document(tiny_config(small_cache, folder / "run", run__watchdog_s=watchdog_s)))
    return start_ranks(2, "-c", SCENE, str(settings), str(WATCHDOG_S), *words)


def start_training(small_cache: Path, folder: Path, **settings: object) -> list[subprocess.Popen[str]]:
    """Train on two ranks without end; returns when some steps were done."""
    config = tiny_config(small_cache, folder / "run", run__max_train_steps=10**6, **settings)
    (folder / "settings.yaml").write_text(write_document(config))
    ranks = start_ranks(
        2, "-m", "mimir_train", "run", "--preset", "tiny", "--config", str(folder / "settings.yaml"), "--output-dir",
        str(folder / "run"),
    )  # fmt: skip
    metrics = folder / "run/metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        for rank in ranks:
            assert rank.poll() is None, rank.communicate()[1]
        time.sleep(0.1)
    return ranks


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_rank_ends_a_training_within_thirty_seconds(small_cache: Path, tmp_path: Path, strategy: str) -> None:
    ranks = start_training(small_cache, tmp_path, parallel__strategy=strategy)
    with ended(ranks):
        ranks[1].kill()
        _, told = ranks[0].communicate(timeout=30)
        assert ranks[0].returncode == 5, told
        assert "error: rank 0: " in told


def test_a_stopped_rank_is_cut_with_the_stacks_of_all_threads(small_cache: Path, tmp_path: Path) -> None:
    ranks = start_training(small_cache, tmp_path, run__watchdog_s=WATCHDOG_S)
    with ended(ranks):
        ranks[1].send_signal(signal.SIGSTOP)
        _, told = ranks[0].communicate(timeout=120)
        assert ranks[0].returncode == 5, told
        assert "rank 0: stacks of all threads, for the ranks hang" in told
        assert "accumulate_gradients" in told or "exchange" in told  # where the main thread waited
        # stopped within a step it is ended before its silence is long enough to be told of
        assert "error: rank 0: no step was done for 2 s (run.watchdog_s): rank " in told
        assert "rank 1 in " in told


def test_a_death_is_noticed_where_the_others_do_not_exchange_anything(small_cache: Path, tmp_path: Path) -> None:
    ranks = start_scene(small_cache, tmp_path, watchdog_s=600.0)
    with ended(ranks):
        for rank in ranks:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "ready\n"
        ranks[1].kill()
        _, told = ranks[0].communicate(timeout=30)
        assert ranks[0].returncode == 5
        assert "error: rank 0: rank 1 is gone; look at what it said" in told


def test_slowness_by_design_is_no_hang_and_a_stopped_first_rank_is_one(small_cache: Path, tmp_path: Path) -> None:
    ranks = start_scene(small_cache, tmp_path, WATCHDOG_S, "stop rank 0")
    with ended(ranks):
        assert ranks[1].stdout is not None
        assert ranks[1].stdout.readline() == "ready\n"  # rank 0 waited three times its timeout for the slow one
        _, told = ranks[1].communicate(timeout=120)
        assert ranks[1].returncode == 5
        assert re.search(r"error: rank 1: no step was done for 2 s \(run.watchdog_s\): rank 0 in .*, silent for", told)
        assert 'File "<string>"' in told  # the stack of the main thread
