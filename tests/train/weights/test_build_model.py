"""A rank builds its part of the model and no more; the parts together are the model."""

import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import mimir_train.weights.build_model
from mimir_shared.errors import InputError
from mimir_train.cache_reader import open_cache
from mimir_train.config import ParallelConfig
from mimir_train.fit import FittedRun, fit
from mimir_train.model.dit import DiT
from mimir_train.parallel.launch import Place
from mimir_train.parallel.processes import Parallel
from mimir_train.parallel.sharding import Sharing, settle_sharing, write_held_rows
from mimir_train.weights.build_model import build_model
from mimir_train.weights.transformer_folder import load_transformer, save_transformer
from tests.train.caches import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
WORLD_SIZE = 4


def build_part(fitted: FittedRun, rank: int, folder: Path) -> None:
    """As one rank of four, the others imagined: nothing that is built needs an exchange. Writes what the rank holds,
    and how many bytes of memory lay behind each tensor that was written into a parameter.
    """
    written: list[int] = []

    def spy(parameter: Tensor, rows: Tensor) -> None:
        written.append(rows.untyped_storage().nbytes())
        write_held_rows(parameter, rows)

    mimir_train.weights.build_model.write_held_rows = spy
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD_SIZE)
    place = Place(launcher="torchrun", rank=rank, world_size=WORLD_SIZE, local_rank=rank % 2, local_world_size=2)
    model = build_model(fitted, Parallel(place=place, device=CPU), filled_later=False).model
    held = {name: p.to_local().contiguous() for name, p in model.named_parameters()}  # type: ignore[operator]
    save_file(held, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(written))


def held_parts(fitted: FittedRun, folder: Path) -> tuple[list[dict[str, Tensor]], list[int]]:
    """What each of four ranks holds, and the bytes behind each tensor that was written."""
    folder.mkdir()
    forks = multiprocessing.get_context("fork")  # torch remembers meshes, and with them the rank it was before
    ranks = [forks.Process(target=build_part, args=(fitted, rank, folder)) for rank in range(WORLD_SIZE)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    parts = [load_file(folder / f"{rank}.safetensors") for rank in range(WORLD_SIZE)]
    written = [nbytes for rank in range(WORLD_SIZE) for nbytes in json.loads((folder / f"{rank}.json").read_text())]
    return parts, written


@pytest.mark.parametrize(("strategy", "cuts"), [("fsdp", 4), ("hsdp", 2)])
@pytest.mark.parametrize("from_folder", [True, False])
def test_ranks_fill_parts_that_make_the_model_bit_for_bit(
    small_cache: Path, tmp_path: Path, strategy: str, cuts: int, from_folder: bool
) -> None:
    cache = open_cache(str(small_cache))
    settings: dict[str, object] = {"parallel__strategy": strategy, "model__transformer__num_attention_heads": 4}
    fitted = fit(tiny_config(small_cache, tmp_path / "run", **settings), cache)
    if from_folder:
        save_transformer(fitted.initial.config, DiT(fitted.initial.config).state_dict(), tmp_path / "folder",
                         max_shard_bytes=50_000)  # fmt: skip
        settings |= {"model__init_from": str(tmp_path / "folder"), "model__fit_to_cache": False}
        fitted = fit(tiny_config(small_cache, tmp_path / "run", **settings), cache)

    alone = build_model(
        fit(tiny_config(small_cache, tmp_path / "run", **{**settings, "parallel__strategy": "ddp"}), cache),
        Parallel(place=Place(), device=CPU),
        filled_later=False,
    ).model
    parts, written = held_parts(fitted, tmp_path / "parts")
    whole = dict(alone.named_parameters())
    for name, parameter in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts[:cuts]]), parameter), name
    if strategy == "hsdp":  # the second machine holds the same once more
        assert all(torch.equal(parts[0][name], parts[2][name]) for name in whole)
    if from_folder:
        for name, parameter in load_transformer(tmp_path / "folder").named_parameters():
            assert torch.equal(whole[f"dit.{name}"], parameter), name
    total = sum(parameter.nbytes for parameter in whole.values())
    for part in parts:
        assert sum(tensor.nbytes for tensor in part.values()) <= total / cuts * 1.05  # but for rows left over
    if from_folder:
        largest = max(p.nbytes for name, p in whole.items() if name.startswith("dit."))
        from_file = sorted(written)[: len(written) // 2]
        assert max(from_file) <= largest / cuts


def test_auto_takes_ddp_while_the_states_fit_and_cuts_the_model_where_they_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)

    def settled(num_parameters: float, world_size: int, machine: int, config: ParallelConfig) -> tuple[str, int]:
        monkeypatch.setattr(Parallel, "gather", lambda self, values: [list(values)] * world_size)
        place = Place(launcher="slurm", world_size=world_size, local_world_size=machine)
        sharing = settle_sharing(
            config, Parallel(place=place, device=torch.device("cuda", 0)), int(16 * num_parameters)
        )
        return sharing.strategy, sharing.shard_size

    auto = ParallelConfig()
    assert settled(1.7e9, 8, 8, auto) == ("ddp", 1)
    assert settled(5.6e9, 8, 8, auto) == ("fsdp", 8)
    assert settled(5.6e9, 32, 8, auto) == ("hsdp", 8)
    assert settled(5.6e9, 12, 8, auto) == ("fsdp", 12)  # machines of unlike size cannot hold a copy each
    assert settled(5.6e9, 1, 1, auto) == ("none", 1)
    assert settled(5.6e9, 32, 8, ParallelConfig(strategy="hsdp", shard_size=16)) == ("hsdp", 16)
    with pytest.raises(InputError, match="--shard-size 5: the 32 ranks cannot be cut into groups of so many"):
        settled(5.6e9, 32, 8, ParallelConfig(strategy="hsdp", shard_size=5))
    with pytest.raises(InputError, match="--shard-size must be left out but with --parallel hsdp"):
        ParallelConfig(strategy="fsdp", shard_size=4)


def test_ranks_of_unlike_machines_settle_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = [8] * 8 + [4] * 8  # of each rank: the ranks of its machine
    memory_bytes = [192 * 10**9] * 8 + [80 * 10**9] * 8
    everyone = [[float(machine), float(memory)] for machine, memory in zip(machines, memory_bytes, strict=True)]
    monkeypatch.setattr(Parallel, "gather", lambda self, values: everyone)

    def settled(rank: int, num_parameters: float) -> Sharing:
        own = SimpleNamespace(total_memory=memory_bytes[rank])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: own)
        place = Place(launcher="slurm", rank=rank, world_size=16, local_world_size=machines[rank])
        parallel = Parallel(place=place, device=torch.device("cuda", 0))
        return settle_sharing(ParallelConfig(), parallel, int(16 * num_parameters))

    assert settled(0, 1.7e9) == settled(15, 1.7e9) == Sharing(strategy="ddp")
    assert settled(0, 5.6e9) == settled(15, 5.6e9) == Sharing(strategy="fsdp", shard_size=16)
