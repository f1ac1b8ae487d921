"""A feature is written in one format from its first shard to its last, and both formats hold the same."""

from pathlib import Path

import pytest

from mimir_precompute.inspection.diff import compare_caches
from mimir_precompute.inspection.verify import verify_cache
from mimir_shared.errors import CacheError
from mimir_shared.feature_folder import find_features
from mimir_shared.storage.folder import LocalStorage
from tests.fake_encoders import FakeEncoders, tree
from tests.precompute.test_pipeline import encode


def formats(cache: Path) -> dict[str, str]:
    return {folder.feature: folder.read_spec().format for folder in find_features(LocalStorage(cache))}


def test_a_zarr_cache_verifies_and_holds_what_a_webdataset_cache_holds(toy_clips: Path, tmp_path: Path) -> None:
    outcome = encode(toy_clips, tmp_path / "zarr", data_format="zarr")
    encode(toy_clips, tmp_path / "tar")
    assert outcome.snapshot is not None
    assert outcome.snapshot.clips == 12
    assert set(formats(tmp_path / "zarr").values()) == {"zarr"}
    report = verify_cache(LocalStorage(tmp_path / "zarr"))
    assert report.problems == []
    assert report.bytes == sum(path.stat().st_size for path in tmp_path.glob("zarr/*/*/data/**/*") if path.is_file())
    difference = compare_caches(LocalStorage(tmp_path / "zarr"), LocalStorage(tmp_path / "tar"), {}, {})
    assert difference.is_equal
    assert not any(feature.fields for feature in difference.features.values())


def test_equal_runs_give_equal_zarr_caches(toy_clips: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        encode(toy_clips, tmp_path / name, data_format="zarr")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_without_a_format_encode_goes_on_in_the_caches_own(toy_clips: Path, tmp_path: Path) -> None:
    encode(toy_clips, tmp_path, shards=(0,), features=("t5",), data_format="zarr")
    encode(None, tmp_path, features=("t5", "answers"))
    assert formats(tmp_path) == {"t5": "zarr", "answers": "zarr"}
    assert verify_cache(LocalStorage(tmp_path)).problems == []


def test_a_new_cache_is_of_format_webdataset(toy_clips: Path, tmp_path: Path) -> None:
    encode(toy_clips, tmp_path, features=("t5",))
    assert formats(tmp_path) == {"t5": "webdataset"}


def test_another_format_than_the_features_own_is_refused_with_the_ways_out(toy_clips: Path, tmp_path: Path) -> None:
    encode(toy_clips, tmp_path, shards=(0,), features=("t5",))
    encoders = FakeEncoders()
    with pytest.raises(
        CacheError,
        match=r"`t5` is written in another format.*'webdataset' → 'zarr'.*without --format.*convert .* --out",
    ):
        encode(None, tmp_path, encoders, features=("t5",), data_format="zarr")
    assert encoders.built == []


def test_features_of_one_cache_may_have_different_formats(toy_clips: Path, tmp_path: Path) -> None:
    encode(toy_clips, tmp_path, features=("latents", "t5"))
    outcome = encode(None, tmp_path, features=("answers", "llm"), data_format="zarr")
    assert formats(tmp_path) == {"latents": "webdataset", "t5": "webdataset", "answers": "zarr", "llm": "zarr"}
    assert outcome.snapshot is not None
    assert verify_cache(LocalStorage(tmp_path)).problems == []


def test_a_shard_that_was_damaged_before_its_commit_is_mended_by_the_next_run(toy_clips: Path, tmp_path: Path) -> None:
    encode(toy_clips, tmp_path, data_format="zarr")
    whole = tree(tmp_path)
    for name in ("t5", "latents"):
        record = next(tmp_path.glob(f"{name}/*/manifests/000001.0.parquet"))
        record.unlink()
    (damaged,) = tmp_path.glob("t5/*/data/000001-*/t5_embeds/c.*")
    damaged.write_bytes(damaged.read_bytes()[:-3])
    (gone,) = tmp_path.glob("latents/*/data/000001-*/zarr.json")
    gone.unlink()
    encode(None, tmp_path)
    assert tree(tmp_path) == whole
