"""Ranks that were shown different files do not train together."""

import shutil
from pathlib import Path

import pytest

from mimir_train.config_document import write_document
from mimir_train.loop import train
from tests.train.caches import resumed_config, tiny_config
from tests.train.ranks import start_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

EACH_ITS_OWN = (
    "import os, sys; from tests.train.ranks import main; sys.argv[2:] = [sys.argv[2 + int(os.environ['RANK'])]]; main()"
)
"""As tests.train.ranks, but that the config of number n is that of rank n alone."""


def told_by_ranks(*arguments: str) -> list[str]:
    """What two ranks say that are given a config each, and that end by it."""
    ranks = start_ranks(2, "-c", EACH_ITS_OWN, *arguments)
    told = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert all(rank.returncode for rank in ranks)
    return told


def test_ranks_that_find_different_checkpoints_do_not_train(small_cache: Path, tmp_path: Path) -> None:
    whole, late = tmp_path / "whole", tmp_path / "late"
    train(tiny_config(small_cache, whole, run__checkpointing_steps=2, run__stop_at_step=4))
    shutil.copytree(whole, late)
    shutil.rmtree(late / "checkpoints/step-00000004")  # as a file system shows it that has not heard of it yet
    files = [tmp_path / f"{run.name}.yaml" for run in (whole, late)]
    for run, file in zip((whole, late), files, strict=True):
        file.write_text(write_document(resumed_config(run)))
    for told in told_by_ranks("latest", *map(str, files)):
        assert "ranks see different checkpoints (rank 0: step-00000004, rank 1: step-00000002)" in told


def test_ranks_that_were_given_different_settings_do_not_train(small_cache: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{rank}.yaml" for rank in range(2)]
    for rank, file in enumerate(files):
        file.write_text(write_document(tiny_config(small_cache, tmp_path / "run", optimizer__clip_norm=1.0 + rank)))
    for rank, told in enumerate(told_by_ranks("", *map(str, files))):
        assert f"MachineError: rank {rank}: the digest of the settings is " in told
        assert "rank 0 has found another than rank 1: they would train different things" in told
