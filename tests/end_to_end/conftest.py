"""Caches that several end-to-end tests look at; none may be changed by them."""

from pathlib import Path

import pytest

from tests.programs import run


@pytest.fixture(scope="session")
def toy_cache(toy_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight toy clips in three shards."""
    cache = tmp_path_factory.mktemp("toy-cache") / "cache"
    arguments = ("--preset", "tiny", "--models", toy_world / "models", "--shard-size", 3)
    done = run("mimir-precompute", "encode", toy_world / "clips", "--cache", cache, *arguments)
    assert done.code == 0, done.err
    return cache


@pytest.fixture(scope="session")
def real_cache(real_clips: Path, toy_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real clips, one of them damaged, encoded with the toy models."""
    cache = tmp_path_factory.mktemp("real") / "cache"
    done = run(
        "mimir-precompute", "encode", real_clips, "--cache", cache, "--models", toy_world / "models",
        "--preset", "tiny", "--shards", "all", "--max-quarantined", 0.2,
    )  # fmt: skip
    assert done.code == 0, done.err
    return cache
