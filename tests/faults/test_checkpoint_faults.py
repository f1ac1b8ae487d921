"""Saving a checkpoint is killed at every point, or finds the disk full: the checkpoint before it is there and good."""

import os
import resource
import shutil
import signal
from pathlib import Path

import pytest

from mimir_shared import failpoints
from mimir_shared.errors import MachineError
from mimir_train.checkpoint.folder import check_checkpoint, find_checkpoint
from mimir_train.checkpoint.saver import Kept
from tests.faults.failing_disk import in_own_mounts, mount_memory
from tests.faults.kills import Counter, die_at
from tests.faults.workers import end_of, start
from tests.train.checkpoints import Numbers, assert_is_of_step, saver_of

POINTS = sorted(name for name in failpoints.DECLARED if name.startswith("checkpoint."))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of steps 1, 2 and 3."""
    model = Numbers()
    with saver_of(tmp_path / "run", model) as saver:
        for step in (1, 2, 3):
            model.become(step)
            saver.start(step)
    return tmp_path / "run"


def save_again(run: Path) -> None:
    """Replace that of step 3, and keep two."""
    model = Numbers()
    model.become(3)
    with saver_of(run, model, kept=Kept(newest=2)) as saver:
        saver.start(3)


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_every_point_of_a_save_leaves_a_good_checkpoint(run: Path, tmp_path: Path, point: str) -> None:
    killed = 0
    for countdown in (1, 2):  # there are two tensors
        spoiled, passed = Path(shutil.copytree(run, tmp_path / str(countdown))), Counter()

        def saved_and_killed(spoiled: Path = spoiled, countdown: int = countdown, passed: Counter = passed) -> None:
            die_at(point, countdown, passed)
            save_again(spoiled)

        code = end_of(start(saved_and_killed))
        assert code == (-signal.SIGKILL if passed.value == countdown else 0)
        killed += code != 0
        good = find_checkpoint(spoiled, say=lambda line: pytest.fail(f"a half-written one is in sight: {line}"))
        assert good.name == ("step-00000002" if point == "checkpoint.old_set_aside" and code else "step-00000003")
        assert_is_of_step(good, int(good.name[-1]))
        save_again(spoiled)
        names = sorted(path.name for path in (spoiled / "checkpoints").iterdir())
        assert names == ["step-00000002", "step-00000003"]
        assert_is_of_step(find_checkpoint(spoiled), 3)
    assert killed >= 1


def test_a_full_disk_is_told_with_what_a_checkpoint_takes_and_there_is_one_when_there_is_room(tmp_path: Path) -> None:
    def fill_and_mend() -> None:
        mount_memory(tmp_path, "size=40k")
        model = Numbers()
        with saver_of(tmp_path, model) as saver:
            for step in (1, 2):
                model.become(step)
                saver.start(step)
            model.become(3)
            saver.start(3)
            with pytest.raises(
                MachineError, match=r"No space left on device \(ENOSPC\).*it takes 12.0 kB, and .* free"
            ):
                saver.wait()
            assert_is_of_step(find_checkpoint(tmp_path), 2)
            assert len(os.listdir(tmp_path / "checkpoints")) == 2
            mount_memory(tmp_path, "size=1m", again=True)
            saver.start(3)
        assert_is_of_step(find_checkpoint(tmp_path), 3)

    in_own_mounts(fill_and_mend)


def test_a_file_that_may_not_grow_so_large_is_told(run: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))
    try:
        with pytest.raises(MachineError, match=r"File too large \(EFBIG\) on rank 0; it takes 12.0 kB") as caught:
            save_again(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 5
    assert check_checkpoint(find_checkpoint(run)) is None
    assert sorted(os.listdir(run / "checkpoints")) == [f"step-0000000{step}" for step in (1, 2, 3)]
