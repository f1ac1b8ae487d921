"""Fixtures that more than one folder of tests uses. Nothing here downloads, and heavy ones are made once."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Deadlines measure the machine, which other programs share, and not the code.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# two threads of one test wait for each other when a third program wants a core
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """Twelve real clips that lie beside some checkouts; a fresh clone has none."""
    folder = REPOSITORY.parent / "shared" / "clips"
    if not folder.is_dir():
        pytest.skip("no folder ../shared/clips beside this checkout")
    return folder


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/clips (8) and DIR/models, as `mimir-precompute toy DIR --clips 8` writes them."""
    from mimir_precompute.toy.write import write_toy

    directory = tmp_path_factory.mktemp("toy")
    write_toy(directory, 8, 0)
    return directory


@pytest.fixture(scope="session")
def toy_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 12 synthetic clips and metadata.jsonl; not to be changed (copy it first)."""
    from mimir_precompute.toy.clips import write_toy_clips

    directory = tmp_path_factory.mktemp("clips")
    write_toy_clips(directory, 12, 0)
    return directory / "clips"


@pytest.fixture(scope="session")
def moto_port() -> Iterator[int]:
    """Port of a service for buckets, on this machine and in memory."""
    from tests.buckets import moto_server

    with moto_server() as port:
        yield port


@pytest.fixture
def bucket(moto_port: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an empty bucket that the environment leads to."""
    from tests.buckets import environment, new_bucket

    for name, value in environment(f"http://127.0.0.1:{moto_port}").items():
        monkeypatch.setenv(name, value)
    return new_bucket(moto_port)
