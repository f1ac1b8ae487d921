"""Which process this is among those that train together, by the environment: torchrun's, Slurm's, or alone."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mimir_shared.errors import InputError

Launcher = Literal["none", "torchrun", "slurm"]

_FIRST_PORT, _NUM_PORTS = 15_000, 20_000


@dataclass(frozen=True, kw_only=True)
class Place:
    """One process among its peers."""

    launcher: Launcher = "none"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among the processes of its machine: the index of its device."""
    local_world_size: int = 1
    """Processes of a machine."""
    master_address: str = "127.0.0.1"
    """Of the machine of rank 0."""
    master_port: int = 0
    """Where rank 0 listens for the others; 0 where there are none."""


def find_place(environment: Mapping[str, str] | None = None) -> Place:
    """Read torchrun's variables (RANK, WORLD_SIZE, …); else those of `srun` (SLURM_PROCID, SLURM_NTASKS, …).

    Raises: InputError where they contradict each other or leave out what is needed.
    """
    variables = os.environ if environment is None else environment
    if "RANK" in variables or "WORLD_SIZE" in variables:
        place = _torchrun_place(variables)
    elif "SLURM_PROCID" in variables and int(variables.get("SLURM_NTASKS", "1")) > 1:
        place = _slurm_place(variables)
    else:
        return Place()
    if not (0 <= place.rank < place.world_size and 0 <= place.local_rank < place.local_world_size):
        raise InputError(
            f"rank {place.rank} of {place.world_size} (on its machine {place.local_rank} of {place.local_world_size}), "
            f"as {place.launcher} has it: a rank must lie below its number of ranks; look at what sets these variables"
        )
    return place


def _torchrun_place(variables: Mapping[str, str]) -> Place:
    world_size = _number(variables, "WORLD_SIZE", 1)
    rank = _number(variables, "RANK", 0)
    if world_size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= variables.keys():
        raise InputError(f"WORLD_SIZE is {world_size}, but MASTER_ADDR or MASTER_PORT is not set; start with torchrun")
    local_world_size = _number(variables, "LOCAL_WORLD_SIZE", world_size)
    return Place(
        launcher="torchrun",
        rank=rank,
        world_size=world_size,
        local_rank=_number(variables, "LOCAL_RANK", rank % local_world_size),
        local_world_size=local_world_size,
        master_address=variables.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number(variables, "MASTER_PORT", 0),
    )


def _slurm_place(variables: Mapping[str, str]) -> Place:
    world_size = _number(variables, "SLURM_NTASKS", 1)
    job, step = _number(variables, "SLURM_JOB_ID", 0), _number(variables, "SLURM_STEP_ID", 0)
    nodes = max(_number(variables, "SLURM_NNODES", 1), 1)
    local_rank = _number(variables, "SLURM_LOCALID", 0)
    return Place(
        launcher="slurm",
        rank=_number(variables, "SLURM_PROCID", 0),
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=_tasks_of_this_node(variables, world_size, nodes),
        master_address=variables.get("MASTER_ADDR") or _slurm_master(variables, nodes),
        # every rank of a job step comes to the same port, and two jobs of a machine to different ones
        master_port=_number(variables, "MASTER_PORT", _FIRST_PORT + (job * 31 + step) % _NUM_PORTS),
    )


def _slurm_master(variables: Mapping[str, str], nodes: int) -> str:
    """The node of task 0: the first of the step's list; srun may have been called on a login node."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"):
        if variables.get(name):
            return first_host(variables[name])
    if variables.get("SLURM_LAUNCH_NODE_IPADDR"):
        return variables["SLURM_LAUNCH_NODE_IPADDR"]
    if nodes == 1:
        return "127.0.0.1"
    raise InputError("Slurm has set no list of nodes (SLURM_NODELIST): set MASTER_ADDR to the host of task 0")


def first_host(node_list: str) -> str:
    """The first host of Slurm's short form: "gpu[003-007,012],login1" begins with gpu003."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", node_list)  # up to the first comma outside brackets
    if first is None:
        raise InputError(f"SLURM_NODELIST {node_list!r}: expected hosts like gpu[003-007]; set MASTER_ADDR yourself")
    return re.sub(r"\[([^\]\-,]*)[^\]]*\]", r"\1", first[0])


def _tasks_of_this_node(variables: Mapping[str, str], world_size: int, nodes: int) -> int:
    """SLURM_STEP_TASKS_PER_NODE is like "8(x3),4": of the nodes in turn; SLURM_NODEID says which this is."""
    text = variables.get("SLURM_STEP_TASKS_PER_NODE") or variables.get("SLURM_TASKS_PER_NODE")
    if not text:
        return -(-world_size // nodes)
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise InputError(f"SLURM_TASKS_PER_NODE {text!r}: expected counts like 8(x3),4")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(variables, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else counts[-1]


def _number(variables: Mapping[str, str], name: str, default: int) -> int:
    text = variables.get(name, "")
    if text and not text.isdecimal():
        raise InputError(f"{name} is {text!r} in the environment: expected a whole number")
    return int(text) if text else default
