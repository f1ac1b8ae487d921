"""A checkpoint is hashed by all ranks together, each its share, and all come to one verdict."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from mimir_shared.errors import MachineError
from mimir_shared.sealed import write_sealed_json
from mimir_train.checkpoint import folder as folder_module
from mimir_train.checkpoint.folder import (
    MANIFEST,
    FileDigest,
    Share,
    check_checkpoint,
    digest_file,
    find_checkpoint,
)
from mimir_train.loop import train
from mimir_train.run_folder import open_run
from tests.train.caches import flipped_byte, resumed_config, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


T = TypeVar("T")


class Round:
    """Exchanges values between threads that stand for ranks."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, timeout=30)
        self._values: dict[int, list[float]] = {}

    def share(self, number: int) -> Share:
        def tell(values: Sequence[float]) -> list[list[float]]:
            self._values[number] = list(values)
            self._barrier.wait()
            told = [self._values[each] for each in range(self._barrier.parties)]
            self._barrier.wait()
            return told

        return Share(number=number, count=self._barrier.parties, tell=tell)


def on_ranks(count: int, work: Callable[[Share], T]) -> list[T]:
    """What each of some ranks comes to."""
    exchange = Round(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda number: work(exchange.share(number)), range(count)))


@pytest.fixture(scope="module")
def trained(small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints after 2 and after 4 steps, the latter of seven files."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train(tiny_config(small_cache, run, run__max_train_steps=4, run__checkpointing_steps=2))
    newest = run / "checkpoints/step-00000004"
    info = folder_module.read_checkpoint_info(newest)
    files = dict(info.files)
    for number in range(4):
        (newest / f"model/{number + 1:05d}.safetensors").write_bytes(bytes([number]) * 1000)
        files[f"model/{number + 1:05d}.safetensors"] = digest_file(newest / f"model/{number + 1:05d}.safetensors")
    document = info.model_copy(update={"files": files}).model_dump(mode="json", exclude={"seal"})
    (newest / MANIFEST).unlink()
    (newest / MANIFEST).write_bytes(write_sealed_json(document))
    return run


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_every_file_is_hashed_by_one_rank(trained: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    hashed: Counter[str] = Counter()

    def counting(path: Path) -> FileDigest:
        hashed[path.name if path.parent.name == "model" else path.parent.name] += 1
        return digest_file(path)

    monkeypatch.setattr(folder_module, "digest_file", counting)
    newest = trained / "checkpoints/step-00000004"
    assert on_ranks(count, lambda share: check_checkpoint(newest, share=share)) == [None] * count
    assert len(hashed) == 7
    assert set(hashed.values()) == {1}


@pytest.mark.parametrize("count", [2, 3])
def test_what_one_rank_finds_all_ranks_know(trained: Path, count: int) -> None:
    newest = trained / "checkpoints/step-00000004"
    for path in sorted(path for path in newest.rglob("*") if path.is_file()):
        with flipped_byte(path, path.stat().st_size // 2):
            said: list[list[str]] = [[] for _ in range(count)]
            found = on_ranks(
                count, lambda share, said=said: find_checkpoint(trained, say=said[share.number].append, share=share)
            )
            assert [folder.name for folder in found] == ["step-00000002"] * count
            for lines in said:
                (line,) = lines
                assert path.name in line
    found = on_ranks(count, lambda share: find_checkpoint(trained, share=share))
    assert [folder.name for folder in found] == ["step-00000004"] * count


def test_ranks_that_see_different_checkpoints_do_not_begin(trained: Path, tmp_path: Path) -> None:
    config = resumed_config(trained)
    configs = [config, replace(config, run=replace(config.run, output_dir=str(tmp_path)))]

    def begin(share: Share) -> str:
        with pytest.raises(MachineError) as caught:
            open_run(configs[share.number], "latest", lambda line: None, share)
        return str(caught.value)

    for message in on_ranks(2, begin):
        assert "ranks see different checkpoints (rank 0: step-00000004, rank 1: none)" in message
