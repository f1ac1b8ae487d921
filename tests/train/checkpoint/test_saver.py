"""Checkpoints are written beside the steps: what is saved is what was there when it began, and faults are told."""

import errno
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mimir_shared import failpoints
from mimir_shared.errors import InputError, MachineError
from mimir_shared.storage.disk import Disk
from mimir_train.checkpoint.folder import check_checkpoint, find_checkpoint, list_checkpoints
from mimir_train.checkpoint.saver import Kept
from mimir_train.config import OptimizerConfig
from mimir_train.learning_rate import rate_factor
from mimir_train.loop import train
from mimir_train.parallel.processes import EXCHANGE_TIMEOUT, start_parallel
from tests.faults.failing_disk import FailingDisk
from tests.train.caches import metrics_of, tiny_config
from tests.train.checkpoints import Numbers, assert_is_of_step, saver_of, tensors_of

pytestmark = pytest.mark.usefixtures("one_thread")


class HeldDisk(Disk):
    """Makes no file durable until it is let."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.let = threading.Event()

    def sync_file(self, file) -> None:  # type: ignore[no-untyped-def]  # as there
        self.reached.set()
        assert self.let.wait(60)
        super().sync_file(file)


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm(None)


def test_what_changes_while_it_is_written_is_not_saved(tmp_path: Path) -> None:
    model, disk = Numbers(), HeldDisk()
    with saver_of(tmp_path, model, disk=disk) as saver:
        for step in (1, 2):  # the second save copies into the memory of the first
            disk.let.clear()
            model.become(step)
            saver.start(step)
            model.become(99)
            assert disk.reached.wait(60)
            assert step_names(tmp_path) == [f"step-0000000{n}" for n in range(1, step)]
            disk.let.set()
            assert_is_of_step(some(saver.wait()), step)


def test_a_background_save_holds_the_same_as_one_that_is_waited_for(tmp_path: Path) -> None:
    saved = {}
    for background in (True, False):
        model = Numbers()
        model.become(3)
        with saver_of(tmp_path / str(background), model, background=background) as saver:
            saver.start(3)
            saved[background] = some(saver.wait())
    assert tensors_of(saved[True]).keys() == tensors_of(saved[False]).keys()
    names = sorted(path.relative_to(saved[True]) for path in saved[True].rglob("*") if path.is_file())
    assert [name for name in names if (saved[True] / name).read_bytes() != (saved[False] / name).read_bytes()] == []


def test_steps_go_on_while_a_checkpoint_is_written(small_cache: Path, tmp_path: Path) -> None:
    """The save of step 2 is held until step 3 has been trained and told; nobody looks at a clock."""
    metrics, seen = tmp_path / "run/metrics.jsonl", []
    pause = threading.Event()

    def hold(name: str) -> None:
        if name == "checkpoint.manifest_written" and not seen:
            for _ in range(6000):
                if metrics.read_text().count("\n") >= 3:
                    break
                pause.wait(0.01)
            seen.append(metrics.read_text().count("\n"))

    failpoints.arm(hold)
    outcome = train(tiny_config(small_cache, tmp_path / "run", run__max_train_steps=6, run__checkpointing_steps=2))
    assert seen[0] >= 3
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [f"step-0000000{n}" for n in (2, 4, 6)]
    assert outcome.checkpoint == find_checkpoint(tmp_path / "run")


def test_sigterm_is_answered_by_a_checkpoint_before_any_validation(
    small_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rate_and_sigterm(config: OptimizerConfig, step: int, max_train_steps: int) -> float:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate_factor(config, step, max_train_steps)

    monkeypatch.setattr("mimir_train.loop.rate_factor", rate_and_sigterm)
    outcome = train(tiny_config(small_cache, tmp_path / "run", data__validation_shards=1, run__validation_steps=1))
    assert outcome.stopped_by_signal
    assert ["validation/loss" in line for line in metrics_of(tmp_path / "run")] == [True, True, False]
    assert step_names(tmp_path / "run") == ["step-00000003"]


def test_one_save_is_under_way_at_a_time(tmp_path: Path) -> None:
    model, events = Numbers(), []
    failpoints.arm(events.append)
    with saver_of(tmp_path, model) as saver:
        for step in range(1, 5):
            model.become(step)
            saver.start(step)
    steps = [event for event in events if event in ("checkpoint.folder_made", "checkpoint.renamed")]
    assert steps == ["checkpoint.folder_made", "checkpoint.renamed"] * 4
    for step in range(1, 5):
        assert_is_of_step(tmp_path / f"checkpoints/step-0000000{step}", step)


def test_a_save_under_way_is_finished_when_the_steps_end_by_an_error(tmp_path: Path) -> None:
    model, disk = Numbers(), HeldDisk()
    threading.Timer(0.2, disk.let.set).start()

    def step_that_fails() -> None:
        with saver_of(tmp_path, model, disk=disk) as saver:
            saver.start(0)
            raise ValueError("a step failed")

    with pytest.raises(ValueError, match="a step failed"):
        step_that_fails()
    assert check_checkpoint(find_checkpoint(tmp_path)) is None


# --- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_a_disk_that_fails_at_any_operation_leaves_the_checkpoint_before(
    tmp_path: Path, number: int, background: bool
) -> None:
    """One of the same step is replaced and one more is removed, so that every operation is met."""

    def run_with(disk: Disk, run: Path) -> None:
        model = Numbers()
        with saver_of(run, model, background=background) as saver:
            for step in (1, 2, 3):
                model.become(step)
                saver.start(step)
        with saver_of(run, model, disk=disk, kept=Kept(newest=2), background=background) as saver:
            model.become(3)
            saver.start(3)

    counting = FailingDisk(None, 0)
    run_with(counting, tmp_path / "whole")
    assert counting.operations > 10
    for fails_at in range(1, counting.operations + 1):
        run = tmp_path / str(fails_at)
        with pytest.raises(MachineError) as caught:
            run_with(FailingDisk(fails_at, number), run)
        assert caught.value.exit_code == 5
        good = find_checkpoint(run, say=lambda line: None)
        assert_is_of_step(good, int(good.name[-1]))
        assert good.name in ("step-00000002", "step-00000003")
        if "saving the checkpoint" in str(caught.value):
            advice = "make room" if number == errno.ENOSPC else "mend it"
            assert "it takes 12.0 kB, and " in str(caught.value)
            assert f"Checkpoints from before are untouched: {advice}" in str(caught.value)
        else:
            assert "removing an old checkpoint" in str(caught.value)
        with saver_of(run, Numbers()) as saver:
            saver.start(4)
        assert check_checkpoint(run / "checkpoints/step-00000004") is None
        assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_a_fault_in_the_background_ends_the_run_after_the_next_step(
    small_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        if name == "checkpoint.tensor_written":
            raise OSError(errno.ENOSPC, "No space left on device")

    def writers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("AsyncCheckpointExecutor")]

    def rate_when_nobody_writes(*arguments: Any) -> float:
        for thread in writers():
            thread.join(60)
        return rate_factor(*arguments)

    failpoints.arm(fail)
    monkeypatch.setattr("mimir_train.loop.rate_factor", rate_when_nobody_writes)
    told = (
        r"step-00000002: saving the checkpoint: No space left on device \(ENOSPC\) on rank 0; "
        r"it takes 1\.\d+ MB, and .* are free there"
    )
    with pytest.raises(MachineError, match=told):
        train(tiny_config(small_cache, tmp_path / "run", run__max_train_steps=50, run__checkpointing_steps=2))
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2]
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_a_fault_is_told_once_and_the_next_save_may_succeed(tmp_path: Path) -> None:
    model, failing = Numbers(), [True]

    def fail(name: str) -> None:
        if name == "checkpoint.manifest_written" and failing:
            failing.clear()
            raise OSError(errno.EIO, "Input/output error")

    failpoints.arm(fail)
    with saver_of(tmp_path, model) as saver:
        saver.start(1)
        with pytest.raises(MachineError, match=r"Input/output error \(EIO\)"):
            saver.wait()
        assert not saver.has_failed
        assert saver.wait() is None
        saver.start(2)
    assert step_names(tmp_path) == ["step-00000002"]


def test_the_folders_of_a_first_checkpoint_outlive_a_power_cut(tmp_path: Path) -> None:
    synced: list[Path] = []

    class Recording(Disk):
        def sync_directory(self, path: Path) -> None:
            synced.append(path)

    run = tmp_path / "runs" / "first"
    with saver_of(run, Numbers(), disk=Recording()) as saver:
        saver.start(1)
    assert {run.parent, run, run / "checkpoints"} <= set(synced)


def test_ranks_wait_for_a_slow_save_as_long_as_for_any_exchange(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "cache", tmp_path / "run", parallel__strategy="fsdp")
    with start_parallel(config), saver_of(tmp_path, Numbers()) as saver:
        assert saver._group is not None
        waits = saver._group._get_backend(torch.device("cpu")).options._timeout
    assert waits == EXCHANGE_TIMEOUT


# --- which are kept -----------------------------------------------------------------------------------------------


def test_the_newest_and_every_nth_are_kept(tmp_path: Path) -> None:
    with saver_of(tmp_path, Numbers(), kept=Kept(newest=2, every=4)) as saver:
        for step in range(1, 12):
            saver.start(step)
    assert step_names(tmp_path) == [f"step-{step:08d}" for step in (4, 8, 10, 11)]


def test_the_checkpoint_just_written_stays_beside_damaged_ones_of_later_steps(tmp_path: Path) -> None:
    with saver_of(tmp_path, Numbers()) as saver:
        for step in (2, 6, 8):
            saver.start(step)
    for step in (6, 8):
        (tmp_path / f"checkpoints/step-0000000{step}/model/00000.safetensors").write_bytes(b"")
    with saver_of(tmp_path, Numbers(), kept=Kept(newest=1)) as saver:
        saver.start(4)
    assert find_checkpoint(tmp_path, say=lambda line: None).name == "step-00000004"


def test_keep_every_without_a_limit_is_refused(small_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"--checkpoints-keep-every must be given with --checkpoints-total-limit.*got 4"
    ):
        tiny_config(small_cache, tmp_path, run__checkpoints_keep_every=4)


def step_names(run: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run)]


def some(path: Path | None) -> Path:
    assert path is not None
    return path
