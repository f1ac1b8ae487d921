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


def test_ranks_that_find_different_checkpoints_do_not_train(small_cache: Path, tmp_path: Path) -> None:
    whole, late = tmp_path / "whole", tmp_path / "late"
    train(tiny_config(small_cache, whole, run__checkpointing_steps=2, run__stop_at_step=4))
    shutil.copytree(whole, late)
    shutil.rmtree(late / "checkpoints/step-00000004")  # as a file system shows it that has not heard of it yet
    files = [tmp_path / f"{run.name}.yaml" for run in (whole, late)]
    for run, file in zip((whole, late), files, strict=True):
        file.write_text(write_document(resumed_config(run)))
    ranks = start_ranks(2, "-c", EACH_ITS_OWN, "latest", *map(str, files))
    told = [rank.communicate(timeout=120)[1] for rank in ranks]
    for rank, step in ((0, 4), (1, 2)):
        expected = f"MachineError: rank {rank}: the checkpoint to go on from is step-0000000{step} ("
        assert expected in told[rank], told[rank]
        assert "rank 0 has found another than rank 1: they would train different things" in told[rank]
    assert all(rank.returncode for rank in ranks)
