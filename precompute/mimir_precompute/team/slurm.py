"""Which of many Slurm tasks this process is: `encode --shards auto`.

A task begins with every n-th shard, so that tasks which start together do not ask for the same ones, and helps with the
rest by leases when its own are done. So a task that never starts, or is killed for good, costs no shard.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mimir_precompute.config import TeamOptions
from mimir_precompute.device import choose_device, visible_gpus
from mimir_shared.errors import InputError

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class SlurmTask:
    """One task among those that encode into the same cache."""

    number: int
    """From 0 on."""
    count: int
    local_id: int = 0
    """Among the tasks on this machine that were started by one srun."""
    is_exact: bool = True
    """Whether no other task can have this number: an array of odd task ids leaves that open."""

    def own_shards(self, num_shards: int) -> tuple[int, ...]:
        """Every count-th shard, from `number` on."""
        return tuple(range(self.number, num_shards, self.count))


def read_task(environment: Mapping[str, str]) -> SlurmTask:
    """From the variables that Slurm sets for array tasks and for the tasks of srun, or both.

    Raises: InputError where there are none, and where they contradict each other.
    """
    if "SLURM_ARRAY_TASK_ID" not in environment and "SLURM_PROCID" not in environment:
        raise InputError(
            "--shards auto: neither SLURM_ARRAY_TASK_ID nor SLURM_PROCID is set, so this is no Slurm task; give "
            "--shards all: workers share the shards anyway"
        )
    index, tasks, is_exact = _array_index(environment)
    # of the step, where srun started this process: the job may have room for other ones
    ranks = _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS", 1))
    rank = _number(environment, "SLURM_PROCID", 0)
    if not 0 <= rank < ranks:
        raise InputError(f"--shards auto: SLURM_PROCID is {rank} and there are {ranks} tasks (SLURM_NTASKS)")
    return SlurmTask(
        number=index * ranks + rank,
        count=tasks * ranks,
        local_id=_number(environment, "SLURM_LOCALID", 0),
        is_exact=is_exact,
    )


def _array_index(environment: Mapping[str, str]) -> tuple[int, int, bool]:
    """(place of this task in its array, tasks in it, whether that place is certain)."""
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return 0, 1, True
    task_id = _number(environment, "SLURM_ARRAY_TASK_ID", 0)
    first = _number(environment, "SLURM_ARRAY_TASK_MIN", 0)
    last = _number(environment, "SLURM_ARRAY_TASK_MAX", task_id)
    step = max(1, _number(environment, "SLURM_ARRAY_TASK_STEP", 1))
    count = _number(environment, "SLURM_ARRAY_TASK_COUNT", (last - first) // step + 1)
    if count < 1:
        raise InputError(f"--shards auto: SLURM_ARRAY_TASK_COUNT is {count}; expected at least 1")
    index, rest = divmod(task_id - first, step)
    if rest == 0 and 0 <= index < count and (last - first) // step + 1 == count:
        return index, count, True
    # an array like 1,5,9-12: Slurm does not say which of them a task is
    return task_id % count, count, count == 1


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError as fault:
        raise InputError(f"--shards auto: {name} is {text!r}; expected a number") from fault


def slurm_task(shards: str, *, only_own_shards: bool) -> SlurmTask | None:
    """This process as a Slurm task, where --shards auto asks for that. Raises InputError."""
    if shards != AUTO:
        if only_own_shards:
            raise InputError(f"--only-own-shards: goes with --shards auto, got --shards {shards}")
        return None
    task = read_task(os.environ)
    if only_own_shards and not task.is_exact:
        raise InputError(
            "--only-own-shards: the ids of this array are no regular row, so that two tasks may take the same shards "
            "and others none; submit it as --array=0-N"
        )
    return task


def device_of_task(task: SlurmTask, device: str, team: TeamOptions) -> str:
    """The device of a task: where several GPUs are seen, its own by SLURM_LOCALID.

    Args:
        device: as typed.
    """
    if (
        device not in ("auto", "cuda")
        or team.workers not in (None, "1")
        or not choose_device(device).startswith("cuda")
    ):
        return device
    gpus = visible_gpus()
    return f"cuda:{task.local_id % len(gpus)}" if len(gpus) > 1 else device
