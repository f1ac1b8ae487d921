"""`encode --workers` with the toy models: stopped together, going on together, and the cache of one worker."""

import signal
import time
from pathlib import Path

from mimir_precompute.workers.seen import read_workers
from mimir_shared.process_identity import life_of
from mimir_shared.storage.folder import LocalStorage
from tests.faults.workers import compared
from tests.programs import run, start


def test_sigterm_ends_all_workers_with_143_and_the_same_command_makes_the_cache_of_one(
    toy_world: Path, tmp_path: Path
) -> None:
    options = ("--models", toy_world / "models", "--preset", "tiny", "--shard-size", 1, "--device", "cpu")
    command = ("encode", toy_world / "clips", "--cache", tmp_path / "together", *options, "--workers", 2)
    parent = start("mimir-precompute", *command)
    storage = LocalStorage(tmp_path / "together")
    deadline_s = time.monotonic() + 120
    while not list(storage.root.glob("*/*/manifests/*.parquet")):
        assert parent.poll() is None, parent.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    workers = [worker.report for worker in read_workers(storage)]
    assert len(workers) in (1, 2)  # the other may still load its model
    parent.send_signal(signal.SIGTERM)
    asked_s = time.monotonic()
    _, said = parent.communicate(timeout=60)
    assert time.monotonic() - asked_s < 30
    assert parent.returncode == 143, said
    assert said.count("stopped by SIGTERM; what was committed stays") == 1
    assert all(life_of(worker.domain, worker.pid) == "dead" for worker in workers)
    assert not (storage.root / "leases").exists()

    done = run("mimir-precompute", *command, "--place", "t5=0,llm=0")
    assert done.code == 0, done.err
    assert "complete, snapshot" in done.out
    alone = run("mimir-precompute", "encode", toy_world / "clips", "--cache", tmp_path / "alone", *options)
    assert alone.code == 0, alone.err
    assert compared(storage.root) == compared(tmp_path / "alone")
