"""Fixtures of stage two's tests: a small cache, made once, and one thread for what is computed on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.caches import build_cache


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small models run fastest on one thread, and the machine has other work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clips of one bucket in 3 shards, all features. Not to be written to."""
    return build_cache(tmp_path_factory.mktemp("small") / "cache")
