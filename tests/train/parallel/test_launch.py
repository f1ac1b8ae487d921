"""Who a process is among its peers, as torchrun and Slurm tell it."""

import pytest

from mimir_shared.errors import InputError
from mimir_train.parallel.launch import Place, find_place, first_host

TORCHRUN = {
    "RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "gpu1",
    "MASTER_PORT": "29500",
}  # fmt: skip
SLURM = {
    "SLURM_PROCID": "9", "SLURM_NTASKS": "12", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NNODES": "2",
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "8,4", "SLURM_NODELIST": "gpu[007,012]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}  # fmt: skip


def test_without_a_launcher_a_process_is_alone() -> None:
    assert find_place({}) == Place(launcher="none", rank=0, world_size=1)
    assert find_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == Place()  # a batch job's own shell


def test_torchrun_says_it_all() -> None:
    place = find_place({**SLURM, **TORCHRUN})  # it may run inside a Slurm job, and wins
    assert (place.launcher, place.rank, place.world_size) == ("torchrun", 11, 16)
    assert (place.local_rank, place.local_world_size) == (3, 8)
    assert (place.master_address, place.master_port) == ("gpu1", 29500)


def test_slurm_tells_rank_node_and_where_the_first_task_runs() -> None:
    place = find_place(SLURM)
    assert (place.launcher, place.rank, place.world_size) == ("slurm", 9, 12)
    assert (place.local_rank, place.local_world_size) == (1, 4)
    assert place.master_address == "gpu007"
    other_job = find_place({**SLURM, "SLURM_JOB_ID": "4712"})
    assert 15_000 <= place.master_port < 35_000
    assert other_job.master_port != place.master_port


def test_slurm_without_a_list_of_nodes_falls_back_and_what_the_user_sets_wins() -> None:
    bare = {name: value for name, value in SLURM.items() if name != "SLURM_NODELIST"}
    assert find_place(bare).master_address == "10.0.0.1"
    set_by_hand = find_place({**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (set_by_hand.master_address, set_by_hand.master_port) == ("head", 1234)
    nowhere = {name: value for name, value in bare.items() if name != "SLURM_LAUNCH_NODE_IPADDR"}
    with pytest.raises(InputError, match="set MASTER_ADDR to the host of task 0"):
        find_place(nowhere)


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[003-007,012],login1", "gpu003"),
        ("gpu[12,3-7]", "gpu12"),
        ("rack[1-2]node[03-04]", "rack1node03"),
        ("dgx-a[1-2].cluster,dgx-b1", "dgx-a1.cluster"),
    ],
)
def test_the_first_host_of_a_list_is_found(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": "one"}, "RANK is 'one' in the environment: expected a whole number"),
        ({"RANK": "16"}, "rank 16 of 16 .*a rank must lie below its number of ranks"),
        ({"LOCAL_RANK": "8"}, "on its machine 8 of 8"),
    ],
)
def test_places_that_cannot_be_are_refused(changed: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_place({**TORCHRUN, **changed})


def test_ranks_without_a_meeting_point_are_refused() -> None:
    with pytest.raises(InputError, match="MASTER_ADDR or MASTER_PORT is not set; start with torchrun"):
        find_place({"RANK": "0", "WORLD_SIZE": "2"})
