"""Tasks of Slurm: which shards they begin with, and arrays of real processes with the variables that Slurm sets."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from mimir_precompute import device
from mimir_precompute.cli import commands
from mimir_precompute.cli.commands import EncodeRequest, run_encode
from mimir_precompute.config import DecodeLimits, ModelOptions, TeamOptions
from mimir_precompute.planning.plan import PlanRequest
from mimir_precompute.team import slurm
from mimir_precompute.team.slurm import SlurmTask, device_of_task, read_task, slurm_task
from mimir_shared.errors import InputError
from mimir_shared.manifest import CacheFormat
from tests.fake_encoders import FakeEncoders
from tests.faults.workers import compared, end_of, start
from tests.precompute.team.fake_team import count_records, encode_with, plan_clips, wait_for

ARRAY = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "3", "SLURM_ARRAY_TASK_COUNT": "4"}


@pytest.mark.parametrize(
    ("variables", "task"),
    [
        ({"SLURM_ARRAY_TASK_ID": "2", **ARRAY}, SlurmTask(number=2, count=4)),
        (
            {"SLURM_ARRAY_TASK_ID": "30", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_MAX": "40",
             "SLURM_ARRAY_TASK_STEP": "10", "SLURM_ARRAY_TASK_COUNT": "4"},
            SlurmTask(number=2, count=4),
        ),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, SlurmTask(number=5, count=8, local_id=1)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "9", "SLURM_STEP_NUM_TASKS": "2"}, SlurmTask(number=1, count=2)),
        (
            {"SLURM_ARRAY_TASK_ID": "3", **ARRAY, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"},
            SlurmTask(number=7, count=8, local_id=1),
        ),
        ({"SLURM_ARRAY_TASK_ID": "7"}, SlurmTask(number=7, count=8)),
        (
            {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "9",
             "SLURM_ARRAY_TASK_COUNT": "3"},
            SlurmTask(number=0, count=3, is_exact=False),
        ),
    ],
    ids=["array", "array by tens", "srun", "srun of a part", "srun in an array", "id alone", "odd array"],
)  # fmt: skip
def test_a_task_finds_its_number_among_all(variables: Mapping[str, str], task: SlurmTask) -> None:
    assert read_task(variables) == task


def test_tasks_begin_with_shards_that_no_other_begins_with_and_with_all_of_them() -> None:
    own = [SlurmTask(number=number, count=5).own_shards(23) for number in range(5)]
    assert sorted(shard for shards in own for shard in shards) == list(range(23))
    assert own[4] == (4, 9, 14, 19)
    assert SlurmTask(number=30, count=40).own_shards(23) == ()


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({}, "neither SLURM_ARRAY_TASK_ID nor SLURM_PROCID is set, so this is no Slurm task; give --shards all"),
        ({"SLURM_PROCID": "one"}, "SLURM_PROCID is 'one'; expected a number"),
        ({"SLURM_PROCID": "4", "SLURM_NTASKS": "4"}, r"SLURM_PROCID is 4 and there are 4 tasks"),
        ({"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "0"}, "SLURM_ARRAY_TASK_COUNT is 0"),
    ],
)
def test_variables_that_say_nothing_are_told(variables: Mapping[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_task(variables)


def test_only_own_shards_goes_with_tasks_whose_numbers_are_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--only-own-shards: goes with --shards auto, got --shards all"):
        slurm_task("all", only_own_shards=True)
    for name, value in {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "9",
                        "SLURM_ARRAY_TASK_COUNT": "3"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="two tasks may take the same shards"):
        slurm_task("auto", only_own_shards=True)


def test_a_task_takes_its_own_gpu_where_it_sees_several(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, third = TeamOptions(), SlurmTask(number=6, count=8, local_id=2)
    monkeypatch.setattr(slurm, "choose_device", lambda text: "cuda")
    monkeypatch.setattr(slurm, "visible_gpus", lambda: ("0", "1", "2", "3"))
    assert device_of_task(third, "auto", alone) == "cuda:2"
    assert device_of_task(SlurmTask(number=6, count=8, local_id=6), "auto", alone) == "cuda:2"
    assert device_of_task(third, "cuda:1", alone) == "cuda:1"
    assert device_of_task(third, "auto", TeamOptions(workers="auto")) == "auto"
    monkeypatch.setattr(slurm, "visible_gpus", lambda: ("5",))
    assert device_of_task(third, "auto", alone) == "auto"
    assert device.visible_gpus() == ()


def encode_as_task(
    cache: Path,
    task: int,
    *,
    clip_s: float = 0.0,
    only_own_shards: bool = False,
    data_format: CacheFormat | None = None,
) -> int:
    """Start array task `task` // 2 of four, and of its two ranks the one that is left over. Returns the pid."""

    def work() -> None:
        os.environ |= ARRAY | {
            "SLURM_ARRAY_TASK_ID": str(task // 2), "SLURM_PROCID": str(task % 2), "SLURM_NTASKS": "2"
        }  # fmt: skip
        commands.open_encoders = lambda plan, options, features, device: FakeEncoders(clip_s=clip_s)  # type: ignore
        run_encode(request(cache, data_format, only_own_shards=only_own_shards))

    return start(work)


def request(cache: Path, data_format: CacheFormat | None, *, only_own_shards: bool) -> EncodeRequest:
    return EncodeRequest(
        clips=None, cache=str(cache), shards="auto", features="latents,t5,answers,llm", plan=PlanRequest(), limit=None,
        video_key="file_name", caption_key="text", models=ModelOptions(device="cpu"), output_format=data_format,
        decode_workers=1, decode_limits=DecodeLimits(), max_quarantined=0.01, accept_quarantine=False,
        on_mismatch="error", team=TeamOptions(only_own_shards=only_own_shards),
    )  # fmt: skip


@pytest.mark.parametrize("data_format", ["webdataset", "zarr"])
def test_array_tasks_one_of_them_killed_and_queued_again_make_the_cache_of_one_worker(
    tmp_path: Path, toy_clips: Path, data_format: CacheFormat
) -> None:
    caches = tmp_path / "array", tmp_path / "alone"
    for cache in caches:
        plan_clips(cache, toy_clips)
    array, alone = caches
    encode_with(alone, 1, data_format=data_format)
    tasks = [encode_as_task(array, number, clip_s=0.05, data_format=data_format) for number in (0, 3, 7)]
    wait_for(lambda: count_records(array) >= 4, "the tasks make nothing")
    os.kill(tasks[1], signal.SIGKILL)
    assert end_of(tasks[1]) == -signal.SIGKILL
    again = encode_as_task(array, 3, data_format=data_format)
    # five of the eight were never started: their shards are made by the three
    assert [end_of(pid) for pid in (tasks[0], again, tasks[2])] == [0, 0, 0]
    assert compared(array) == compared(alone)


def test_tasks_that_keep_to_their_own_shards_leave_the_others_alone_and_all_together_make_all(
    tmp_path: Path, toy_clips: Path
) -> None:
    cache = tmp_path / "cache"
    plan_clips(cache, toy_clips)
    assert end_of(encode_as_task(cache, 3, only_own_shards=True)) == 0
    made = sorted(path.name.partition(".")[0] for path in cache.glob("latents/*/manifests/*"))
    assert made == ["000003", "000011"]
    assert not (cache / "snapshots").exists()
    others = [encode_as_task(cache, number, only_own_shards=True) for number in (0, 1, 2, 4, 5, 6, 7)]
    assert [end_of(pid) for pid in others] == [0] * 7
    assert count_records(cache) == 4 * 12
    assert len(list((cache / "snapshots").iterdir())) == 1
