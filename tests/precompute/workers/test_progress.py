"""Progress: its arithmetic with a clock of the test's own, and several workers in one view from real files."""

import io
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mimir_precompute.cli.messages import describe_status
from mimir_precompute.inspection.status import CacheStatus, FeatureStatus, add_pace
from mimir_precompute.workers import seen as workers
from mimir_precompute.workers.pace import RecentRate, rate_together, time_left_s
from mimir_precompute.workers.progress import Progress
from mimir_precompute.workers.seen import SeenWorker, WorkerFile, WorkerReport, forget_dead_workers, read_workers
from mimir_precompute.workers.together import SharedWork
from mimir_shared.feature_folder import FeatureFolder
from mimir_shared.process_identity import process_domain
from mimir_shared.storage.folder import LocalStorage
from mimir_shared.wording import describe_duration

FINGERPRINT = "ab" * 32


@dataclass
class Clock:
    """Seconds that pass when the test says so."""

    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


def report(**fields: Any) -> WorkerReport:
    """What another worker says of itself: that of a process which lives."""
    told = {
        "host": "node7", "pid": os.getppid(), "domain": process_domain(), "feature": "latents",
        "fingerprint": FINGERPRINT[:12], "shard": 1, "since": "2026-01-01T00:00:00+00:00", "clips_in_shard": 30,
        "clips": 130, "bytes": 4_000_000_000, "quarantined": 2, "clips_per_s": 3.0,
    }  # fmt: skip
    return WorkerReport.model_validate({**told, **fields})


def shared_work(cache: Path, shards: int = 4, generations: dict[int, int] | None = None) -> SharedWork:
    """Shards of 100 clips that are to be made."""
    storage = LocalStorage(cache)
    folder = FeatureFolder(storage, "latents", FINGERPRINT)
    sizes = dict.fromkeys(range(shards), 100)
    return SharedWork(storage=storage, folder=folder, clips_of_shard=sizes, generations=generations or {})


def commit(work: SharedWork, shard: int, generation: int = 0) -> None:
    """As far as a view looks: a commit record of that name."""
    path = work.storage.path(work.folder.record_path(shard, generation))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def make_progress(clock: Clock, *, terminal: bool = False) -> tuple[Progress, io.StringIO]:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=200, highlight=False)
    return Progress(clock=clock, console=console), written


def test_a_rate_is_that_of_the_last_two_minutes_and_falls_while_nothing_comes() -> None:
    clock = Clock()
    rate = RecentRate(clock)
    assert rate.per_s() is None
    rate.add(0)
    assert rate.per_s() is None
    clock.now_s += 10
    rate.add(50)
    assert rate.per_s() == 5.0
    clock.now_s += 10
    assert rate.per_s() == 2.5
    for _ in range(300):  # long after: one clip a second, and the quick beginning is forgotten
        clock.now_s += 1
        rate.add(rate._counted[-1][1] + 1)
    assert rate.per_s() == pytest.approx(1.0, rel=0.02)


def test_a_rate_remembers_no_more_than_its_window_however_fast_clips_come() -> None:
    clock = Clock()
    rate = RecentRate(clock)
    for clips in range(100_000):
        clock.now_s += 0.01
        rate.add(clips)
    assert rate.per_s() == pytest.approx(100.0, rel=0.02)
    assert len(rate._counted) < 200


def test_time_left_follows_from_clips_and_rates_and_is_unknown_without_one() -> None:
    assert time_left_s(90, 3.0) == 30.0
    assert time_left_s(0, None) == 0.0
    assert time_left_s(90, None) is None
    assert time_left_s(90, 0.0) is None
    assert rate_together([None, 2.0, 0.5]) == 2.5
    assert rate_together([None]) is None
    told = [describe_duration(s) for s in (0.4, 45, 600, 11_100, 187_200)]
    assert told == ["0 s", "45 s", "10 min", "3 h 05 min", "2 d 4 h"]


def test_alone_the_view_counts_clips_bytes_and_quarantined_and_says_how_long_still(tmp_path: Path) -> None:
    clock = Clock()
    progress, written = make_progress(clock)
    progress.expect({"latents": 400, "t5": 400})
    with progress.feature("latents", shards=4, clips=400, shared=shared_work(tmp_path)):
        progress.shard_begun(0)
        clock.now_s += 25
        progress.advance(100, quarantined=3)
        progress.shard_done(0, nbytes=2_000_000_000, quarantined=3)
        progress.shard_begun(1)
        clock.now_s += 5
        progress.advance(20, quarantined=1)
        progress.tick()
        together = progress.together()
    assert (together.clips, together.workers, together.nbytes, together.quarantined) == (120, 1, 2_000_000_000, 4)
    assert together.clips_per_s == 4.0
    assert (
        "latents: 120/400 clips · 4.0 clips/s · 2.00 GB · 4 quarantined · 70 s left · all features 120/800"
        in written.getvalue()
    )


def test_plain_lines_come_every_ten_seconds_and_not_with_every_clip(tmp_path: Path) -> None:
    clock = Clock()
    progress, written = make_progress(clock)
    with progress.feature("latents", shards=4, clips=400, shared=shared_work(tmp_path)):
        progress.shard_begun(0)
        for _ in range(25):
            clock.now_s += 1
            progress.advance(1, quarantined=0)
            progress.tick()
    assert written.getvalue().count("/400 clips") == 2


def test_on_a_terminal_bars_show_the_feature_and_all_of_them(tmp_path: Path) -> None:
    clock = Clock()
    progress, written = make_progress(clock, terminal=True)
    progress.expect({"latents": 100, "t5": 100})
    for feature in ("latents", "t5"):
        with progress.feature(feature, shards=1, clips=100, shared=shared_work(tmp_path / feature, shards=1)):
            progress.shard_begun(0)
            clock.now_s += 10
            progress.advance(40, quarantined=0)
            progress.tick()
    shown = written.getvalue()
    assert "40/100" in shown
    assert "4.0 clips/s" in shown
    assert "100/200" in shown, "a feature that is over counts in the total"
    assert "200/200" in shown


def test_several_workers_are_one_view_by_their_files_and_commit_records(tmp_path: Path) -> None:
    clock = Clock()
    progress, written = make_progress(clock)
    work = shared_work(tmp_path)
    other, elsewhere = WorkerFile(work.storage), WorkerFile(work.storage)
    other.write(report())
    elsewhere.write(report(feature="t5"))
    commit(work, 3)
    with progress.feature("latents", shards=4, clips=400, shared=work):
        progress.shard_begun(0)
        clock.now_s += 20
        progress.advance(20, quarantined=0)
        progress.tick()
        assert {seen.report.pid for seen in read_workers(work.storage)} == {os.getpid(), os.getppid()}
        # committed: shard 3; begun: 30 of shard 1 there, 20 of shard 0 here; the worker at t5 has no part in it
        assert "latents: 150/400 clips · 4.0 clips/s by 2 workers · 4.00 GB · 2 quarantined · 62 s left" in (
            written.getvalue()
        )
        # the other commits its shard, and its report is older than that: no clip counts twice
        commit(work, 1)
        clock.now_s += 10
        progress.tick()
        assert progress.together().clips == 220
        progress.shard_done(0, nbytes=1, quarantined=0)
        assert progress.together().clips == 300
        commit(work, 0)
        progress.tick(force=True)
        assert progress.together().clips == 300
    assert len(list(tmp_path.glob("logs/workers/*"))) == 2, "its own file is gone"


def test_a_shard_that_is_made_again_is_done_at_its_next_generation(tmp_path: Path) -> None:
    work = shared_work(tmp_path, shards=2, generations={0: 1, 1: 1})
    commit(work, 0)
    commit(work, 1)
    assert work.committed() == set()
    commit(work, 1, generation=1)
    assert work.committed() == {1}


def age(file: WorkerFile, storage: LocalStorage, seconds: float) -> None:
    path = storage.path(file.name)
    changed_s = path.stat().st_mtime - seconds
    os.utime(path, (changed_s, changed_s))


def test_a_worker_that_fell_silent_is_stale_and_one_that_died_is_dead(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    reports = {"a": report(host="a"), "b": report(host="b"), "c": report(host="c", pid=ended.pid)}
    files = {host: WorkerFile(storage) for host in reports}
    for host, told in reports.items():
        files[host].write(told)
    age(files["b"], storage, 100)
    assert [(seen.report.host, seen.state) for seen in read_workers(storage)] == [
        ("a", "working"), ("b", "stale"), ("c", "dead"),
    ]  # fmt: skip
    age(files["b"], storage, 2 * 24 * 3600)
    assert [seen.report.host for seen in read_workers(storage)] == ["a", "c"]
    forget_dead_workers(storage)
    assert [path.name for path in (tmp_path / "logs/workers").iterdir()] == [Path(files["a"].name).name]


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_an_hour_off_makes_nobody_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    storage = LocalStorage(tmp_path)
    alive, silent = WorkerFile(storage), WorkerFile(storage)
    alive.write(report(host="a"))
    silent.write(report(host="b"))
    age(silent, storage, 100)
    now_s = time.time() + hours * 3600
    monkeypatch.setattr(workers.time, "time", lambda: now_s)
    assert [seen.state for seen in read_workers(storage)] == ["working", "stale"]
    assert not list(tmp_path.glob("tmp/*"))


def test_what_is_no_report_is_passed_over(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    file = WorkerFile(storage)
    file.write(report())
    for name, content in (("torn.json", b'{"host": "a", '), ("other.json", b"[]"), ("empty.json", b"")):
        storage.path(f"logs/workers/{name}").write_bytes(content)
    assert len(read_workers(storage)) == 1
    file.remove()
    file.write(report())
    assert read_workers(storage) == [], "a last beat does not bring back a file that was removed"


def test_who_leaves_while_its_report_is_written_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    file, begun, overwrite = WorkerFile(storage), threading.Event(), storage.overwrite

    def slowly(name: str, data: bytes) -> None:
        begun.set()
        time.sleep(0.2)
        overwrite(name, data)

    monkeypatch.setattr(storage, "overwrite", slowly)
    writer = threading.Thread(target=file.write, args=(report(),))
    writer.start()
    begun.wait()
    file.remove()
    assert read_workers(storage) == [], "the process may end here"
    writer.join()
    assert read_workers(storage) == []


def test_a_disk_that_refuses_the_file_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    progress, _ = make_progress(Clock())
    with progress.feature("latents", shards=4, clips=400, shared=shared_work(tmp_path)):
        progress.tick(force=True)


def seen(state: workers.WorkerState = "working", **fields: Any) -> SeenWorker:
    return SeenWorker(name="", report=report(**fields), state=state, silent_s=0.0 if state == "working" else 720.0)


def test_status_gives_rate_and_time_left_of_what_living_workers_make() -> None:
    told = [seen(), seen(clips_in_shard=10, clips_per_s=2.0), seen("stale", clips_per_s=50.0), seen(feature="t5")]
    one = FeatureStatus(fingerprint=FINGERPRINT[:12], format="webdataset", ok=290, quarantined=10)
    add_pace(one, "latents", 1000, told)
    assert one.clips_per_s == 5.0
    assert one.eta_s == (1000 - 300 - 40) / 5.0
    idle = FeatureStatus(fingerprint="0" * 12, format="webdataset", ok=5)
    add_pace(idle, "latents", 1000, told)
    assert (idle.clips_per_s, idle.eta_s) == (None, None)
    status = CacheStatus(clips=1000, shards=10, features={"latents": [one, idle]}, workers=told)
    printed = json.loads(json.dumps(status.to_json()))
    assert (printed["clips_per_s"], printed["eta_s"]) == (5.0, 132.0)
    assert [worker["state"] for worker in printed["workers"]] == ["working", "working", "stale", "working"]
    assert "domain" not in printed["workers"][0]


def test_status_names_every_worker_its_shard_and_since_when_and_marks_the_lost_ones() -> None:
    told = [seen(), seen("stale", host="node8"), seen("dead", host="node9"), seen(shard=None, clips=0, host="node10")]
    one = FeatureStatus(fingerprint=FINGERPRINT[:12], format="webdataset", shards_done=3, ok=290, bytes=7_000_000)
    add_pace(one, "latents", 1000, told)
    text = describe_status("cache", CacheStatus(clips=1000, shards=10, features={"latents": [one]}, workers=told))
    assert "shard 1 since 2026-01-01T00:00:00+00:00, 30 clips of it, 3.0 clips/s" in text
    assert "node8" in text
    assert "STALE, not heard of for 12 min" in text
    assert "DEAD, last heard of 12 min ago" in text
    assert "no clip written yet" in text
    (total,) = [line.split() for line in text.splitlines() if line.startswith("total")]
    assert total == ["total", "3/10", "290", "0", "7.0", "6.0", "2", "min"]
