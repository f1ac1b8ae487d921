"""Checkpoints: whole or not there, and no changed byte is believed."""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from mimir_shared.errors import CacheError, InputError, MachineError
from mimir_shared.sealed import write_sealed_json
from mimir_train.checkpoint.folder import (
    MANIFEST,
    check_checkpoint,
    find_checkpoint,
    list_checkpoints,
)
from mimir_train.checkpoint.opened import open_checkpoint
from mimir_train.loop import train
from tests.train.caches import T5_ROWS, VIDEO, flipped_byte, resumed_config, tiny_config
from tests.train.checkpoints import tensors_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints after 2 and after 4 steps. Not to be written to."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train(tiny_config(small_cache, run, run__max_train_steps=4, run__checkpointing_steps=2))
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_has_the_agreed_layout_and_nothing_pickled(trained: Path) -> None:
    folder = trained / "checkpoints/step-00000004"
    names = [path.relative_to(folder).as_posix() for path in files_of(folder)]
    assert names == [
        "checkpoint.json",
        "model/00000.safetensors",
        "optimizer/00000.safetensors",
        "random/00000.safetensors",
    ]
    document = json.loads((folder / MANIFEST).read_text())
    assert document["version"] == 2
    assert document["step"] == 4
    assert document["files"].keys() == {*names} - {"checkpoint.json"}
    assert document["data"]["buckets"] == [VIDEO]
    assert document["data"]["features"].keys() == {"latents", "t5", "answers", "llm"}
    assert document["text"] == {"t5_rows": T5_ROWS, "text_align": "index", "empty_text": "zeros"}
    assert document["objective"] == {"snr_shift_scale": 3.0}
    assert list((trained / "checkpoints").glob(".*")) == []


def test_models_come_back_from_a_checkpoint_in_float32(trained: Path) -> None:
    opened = open_checkpoint(trained, print)
    dit, fuser = opened.load_transformer(), opened.load_fuser()
    assert {parameter.dtype for parameter in [*dit.parameters(), *fuser.parameters()]} == {torch.float32}
    saved = tensors_of(opened.folder, "model")
    loaded = {f"model.dit.{name}": tensor for name, tensor in dit.state_dict().items()}
    loaded |= {f"model.fuser.{name}": tensor for name, tensor in fuser.state_dict().items()}
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.items())
    halved = opened.load_transformer(torch.bfloat16)
    assert torch.equal(halved.proj_out.weight, saved["model.dit.proj_out.weight"].bfloat16())
    assert opened.info.step == 4
    assert {name.rpartition(".")[2] for name in tensors_of(opened.folder, "optimizer")} == {
        "exp_avg", "exp_avg_sq", "step"
    }  # fmt: skip


def test_the_newest_good_checkpoint_is_found_from_run_or_step(trained: Path) -> None:
    folders = list_checkpoints(trained)
    assert [folder.name for folder in folders] == ["step-00000002", "step-00000004"]
    assert find_checkpoint(trained) == folders[1]
    assert find_checkpoint(folders[0]) == folders[0]


def test_no_checkpoint_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint here"):
        find_checkpoint(tmp_path)


def passed_over(run: Path) -> str:
    """What is said of the newest checkpoint, in whose place the one before is found."""
    said: list[str] = []
    assert find_checkpoint(run, say=said.append).name == "step-00000002"
    assert len(said) == 1
    return said[0]


def test_a_hundred_flipped_bits_are_refused_and_the_last_good_one_found(run: Path) -> None:
    folder = run / "checkpoints/step-00000004"
    generator = random.Random(0)
    for path in files_of(folder):
        size = path.stat().st_size
        for offset in {0, size - 1, *generator.sample(range(1, size - 1), 23)}:
            with flipped_byte(path, offset):
                assert path.name in passed_over(run), f"{path} at {offset}"
    assert len(files_of(folder)) * 25 == 100
    assert find_checkpoint(run) == folder


def test_damage_is_told_by_size_or_by_sha256(run: Path) -> None:
    folder = run / "checkpoints/step-00000004"
    path = folder / "optimizer/00000.safetensors"
    size = path.stat().st_size
    with flipped_byte(path, size // 2):
        told = check_checkpoint(folder)
        assert told == f"{path}: its {size} bytes are not those that were written (their sha256 is another)"
    path.write_bytes(path.read_bytes()[:-1])
    assert check_checkpoint(folder) == f"{path}: its {size - 1} bytes are not those that were written ({size} bytes)"


def test_fifty_cuts_are_refused_and_the_last_good_one_found(run: Path) -> None:
    folder = run / "checkpoints/step-00000004"
    generator = random.Random(1)
    num_cuts = 0
    for path in files_of(folder):
        whole = path.read_bytes()
        for length in {0, len(whole) - 1, *generator.sample(range(1, len(whole) - 1), 11)}:
            path.write_bytes(whole[:length])
            assert path.name in passed_over(run), f"{path} cut to {length}"
            num_cuts += 1
        path.unlink()
        assert path.name in passed_over(run), f"{path} removed"
        path.write_bytes(whole)
    assert num_cuts >= 50
    assert find_checkpoint(run) == folder


def test_a_damaged_checkpoint_is_passed_over_aloud_and_the_last_good_one_taken(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints/step-00000004/optimizer/00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    said: list[str] = []
    assert find_checkpoint(run, say=said.append).name == "step-00000002"
    assert "checkpoint step-00000004 is damaged and passed over" in said[0]
    assert "optimizer/00000.safetensors" in said[0]
    # who samples does not read the optimizer's state, and may use it
    assert find_checkpoint(run, parts=("model",)).name == "step-00000004"
    outcome = train(resumed_config(run), "latest")
    assert "step-00000004 is damaged and passed over" in capfd.readouterr().err
    assert outcome.steps_done == 4
    assert check_checkpoint(run / "checkpoints/step-00000004") is None  # made again
    assert [line["step"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())] == [0, 1, 2, 3]


def test_a_named_checkpoint_that_is_damaged_is_refused(run: Path) -> None:
    path = run / "checkpoints/step-00000004/random/00000.safetensors"
    path.write_bytes(path.read_bytes() + b"0")
    with pytest.raises(
        CacheError, match=r"random/00000.safetensors: its .* bytes are not those that were written.*latest"
    ) as caught:
        train(resumed_config(run, "4"), "4")
    assert caught.value.exit_code == 4
    with pytest.raises(CacheError, match="no good checkpoint"):
        find_checkpoint(run / "checkpoints/step-00000004")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(run: Path) -> None:
    for folder in list_checkpoints(run):
        (folder / MANIFEST).unlink()
    with pytest.raises(CacheError, match="no good checkpoint"):
        train(resumed_config(run), "latest")


def test_a_config_that_was_edited_is_refused(run: Path) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("seed: 42", "seed: 43"))
    with pytest.raises(InputError, match="order of the clips was"):
        train(resumed_config(run), "latest")
    path.write_text(path.read_text().replace("seed: 43", "seed: 42").replace("clip_norm: 1.0", "clip_norm: 2.0"))
    with pytest.raises(InputError, match=r"made with other settings than config.yaml beside it says"):
        train(resumed_config(run, run__max_train_steps=6), "latest")


@pytest.mark.parametrize("after", [0, 1, 3, 6, 7])
def test_a_save_that_fails_at_any_file_leaves_the_earlier_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """The disk is full after so many files were made durable."""
    sync, left = os.fsync, [after]

    def failing(descriptor: int) -> None:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        sync(descriptor)

    monkeypatch.setattr("os.fsync", failing)
    with pytest.raises(MachineError, match=r"step-00000006: saving the checkpoint: No space left.*ENOSPC"):
        train(resumed_config(run, run__max_train_steps=6), "latest")
    monkeypatch.undo()
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []
    assert find_checkpoint(run).name == "step-00000004"
    assert train(resumed_config(run, run__max_train_steps=6), "latest").steps_done == 6


def test_a_checkpoint_half_written_by_a_kill_is_not_seen_and_is_cleared_away(run: Path) -> None:
    half = run / "checkpoints/.step-00000006-0123"
    shutil.copytree(run / "checkpoints/step-00000004", half)
    (half / MANIFEST).unlink()
    assert find_checkpoint(run).name == "step-00000004"
    train(resumed_config(run, run__max_train_steps=6), "latest")
    assert not half.exists()


def test_only_the_newest_checkpoints_are_kept(small_cache: Path, tmp_path: Path) -> None:
    config = tiny_config(
        small_cache,
        tmp_path / "run",
        run__max_train_steps=5,
        run__checkpointing_steps=1,
        run__checkpoints_total_limit=2,
    )
    train(config)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000004", "step-00000005"]


def test_a_checkpoint_of_the_earlier_layout_is_refused_by_its_version(run: Path) -> None:
    for folder in list_checkpoints(run):
        document = {**json.loads((folder / MANIFEST).read_text()), "version": 1}
        del document["seal"]
        (folder / MANIFEST).write_bytes(write_sealed_json(document))
    with pytest.raises(CacheError, match=r"a checkpoint of version 1, and this program reads version 2; go on"):
        train(resumed_config(run), "latest")
