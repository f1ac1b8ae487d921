"""One small world for all batteries: a list of clips, and the cache that an undisturbed worker makes of it."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from mimir_precompute.inspection.verify import verify_cache
from mimir_shared.storage.folder import LocalStorage
from tests.faults.workers import compared, encode, make_clips


@dataclass(frozen=True, kw_only=True)
class World:
    clips: Path
    whole: Path
    """A cache that nobody disturbed."""
    uninterrupted: Mapping[str, bytes]
    """Its files."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # last: the threads and libraries of a client and a server are nothing for those who fork
    items.sort(key=lambda item: "test_bucket" in item.path.name)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    clips = make_clips(folder / "clips")
    # in this process: what it imports and caches, its forks have
    encode(folder / "whole", clips)
    report = verify_cache(LocalStorage(folder / "whole"))
    assert (report.problems, report.unfinished) == ([], {})
    return World(clips=clips, whole=folder / "whole", uninterrupted=compared(folder / "whole"))


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: killing a process loses nothing that was written, on no disk."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="mimir-faults-") as folder:
        yield Path(folder)
