"""`verify --repair` with the real encoders gives back the very bytes that were lost."""

import shutil
from pathlib import Path

from tests.programs import run


def test_a_lost_shard_of_real_features_is_made_again_byte_for_byte(
    toy_cache: Path, toy_world: Path, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(toy_cache, tmp_path / "cache"))
    lost = sorted(cache.glob("t5/*/data/*"))[1]
    before = lost.read_bytes()
    lost.unlink()
    assert run("mimir-precompute", "verify", cache).code == 4
    done = run("mimir-precompute", "verify", cache, "--repair", "--models", toy_world / "models", "--device", "cpu")
    assert done.code == 0, done.err
    assert "1 shards made again as their next generation, 3 clips encoded, 0 copied" in done.out
    assert lost.read_bytes() == before
    assert run("mimir-precompute", "verify", cache).code == 0
    nothing = run("mimir-precompute", "retry", cache, "--models", toy_world / "models", "--device", "cpu")
    assert (nothing.code, "no quarantined clip to try again" in nothing.out) == (0, True)
