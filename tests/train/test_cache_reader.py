"""Reading a cache: what was stored comes back, and whatever is wrong is said with clip, shard and row."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from mimir_shared.errors import CacheError, InputError
from mimir_shared.feature_folder import find_features
from mimir_shared.plan_file import read_plan
from mimir_shared.snapshot import list_snapshots, write_snapshot
from mimir_shared.snapshot_reader import open_snapshot
from mimir_shared.storage.folder import LocalStorage
from mimir_shared.storage.open_files import OpenFiles
from mimir_train.cache_reader import Cache, newer_plan, open_cache
from tests.train.caches import IMAGE, VIDEO, build_cache, flipped_byte, make_feature


@pytest.fixture
def cache_copy(small_cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_cache, tmp_path / "copy"))


def data_file(cache: Cache, feature: str, shard: int) -> Path:
    return cache.storage.root / cache.snapshot.features[feature].files[shard]  # type: ignore[index]


def test_every_tensor_of_every_clip_comes_back_bit_for_bit(small_cache: Path) -> None:
    cache = open_cache(str(small_cache))
    assert len(cache) == 24
    assert cache.num_shards == 3
    for number in range(len(cache)):
        clip = cache.clip(number)
        for feature in ("latents", "t5", "llm"):
            stored = make_feature(feature, clip.key, clip.bucket).tensors  # type: ignore[arg-type]
            read = cache.read(number, feature)  # type: ignore[arg-type]
            assert read.keys() == stored.keys()
            for name, tensor in stored.items():
                assert read[name].dtype == tensor.dtype
                assert np.array_equal(read[name].array, tensor.array)


def test_clips_of_a_bucket_are_found_by_shard_and_place(tmp_path: Path) -> None:
    cache = open_cache(str(build_cache(tmp_path / "c", {VIDEO: 10, IMAGE: 7}, shard_size=4)))
    buckets = {bucket.name: bucket for bucket in cache.buckets()}
    assert {name: bucket.num_clips for name, bucket in buckets.items()} == {VIDEO: 10, IMAGE: 7}
    for bucket in buckets.values():
        numbers = cache.clip_numbers(bucket)
        assert len(set(numbers)) == bucket.num_clips
        clips = [cache.clip(number) for number in numbers]
        assert {clip.bucket for clip in clips} == {bucket.name}
        assert [(clip.shard, clip.row) for clip in clips] == sorted((clip.shard, clip.row) for clip in clips)


def test_held_out_shards_give_no_clip(small_cache: Path) -> None:
    cache = open_cache(str(small_cache))
    (bucket,) = cache.buckets(held_out=(2,))
    assert bucket.shards == (0, 1)
    assert {cache.clip(number).shard for number in cache.clip_numbers(bucket)} == {0, 1}


def test_a_flipped_byte_is_refused_naming_clip_shard_and_row(cache_copy: Path) -> None:
    cache = open_cache(str(cache_copy))
    clip = cache.clip(9)
    path = data_file(cache, "latents", clip.shard)
    offset = int(cache._index["latents"][9].as_py()["tensors"]["vae_moments"]["offset"]) + 100
    with flipped_byte(path, offset):
        with pytest.raises(
            CacheError, match=rf"{path}.*{clip.key}.*shard {clip.shard}, row {clip.row}.*hash"
        ) as caught:
            cache.read(9, "latents")
        assert caught.value.exit_code == 4
        cache.read(9, "latents", verify=False)  # only who asks for no check gets what lies there
        cache.read(8, "latents")  # the neighbour is whole


def test_a_missing_shard_is_refused_naming_clip_shard_and_row(cache_copy: Path) -> None:
    cache = open_cache(str(cache_copy))
    clip = cache.clip(0)
    data_file(cache, "t5", clip.shard).unlink()
    with pytest.raises(CacheError, match=rf"`t5`.*{clip.key}.*shard {clip.shard}, row {clip.row}.*missing.*verify"):
        cache.read(0, "t5")


def test_a_shard_that_was_cut_short_is_refused(cache_copy: Path) -> None:
    cache = open_cache(str(cache_copy))
    path = data_file(cache, "llm", 2)
    path.write_bytes(path.read_bytes()[:4000])
    last = len(cache) - 1
    with pytest.raises(CacheError, match=r"ends after .* bytes"):
        cache.read(last, "llm", verify=False)


def test_a_damaged_index_is_refused(cache_copy: Path) -> None:
    (index,) = cache_copy.glob("snapshots/*/index.arrow")
    with flipped_byte(index, 2000), pytest.raises(CacheError, match=r"index.arrow: its sha256"):
        open_cache(str(cache_copy))


def test_an_unfinished_cache_names_the_command_to_run(tmp_path: Path) -> None:
    root = build_cache(tmp_path / "c", leave_out_shards=1)
    with pytest.raises(
        InputError, match=r"not finished \(llm: 1 of 3 shards missing\).*mimir-precompute encode --cache"
    ):
        open_cache(str(root))


def test_a_finished_cache_without_snapshot_names_finalize(tmp_path: Path) -> None:
    root = build_cache(tmp_path / "c", snapshot=False)
    with pytest.raises(InputError, match=f"no snapshot yet.*mimir-precompute finalize {root}"):
        open_cache(str(root))


def test_a_cache_without_latents_cannot_be_trained_on(tmp_path: Path) -> None:
    root = build_cache(tmp_path / "c", features=("t5",))
    with pytest.raises(InputError, match=r"not finished: no latents yet.*encode"):
        open_cache(str(root))


def test_no_cache_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        open_cache(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no plan"):
        open_cache(str(tmp_path / "empty"))


def test_the_newest_snapshot_is_taken_and_an_older_one_by_its_digest(cache_copy: Path) -> None:
    storage = LocalStorage(cache_copy)
    (first,) = list_snapshots(storage)
    folders = {folder.feature: folder for folder in find_features(storage) if folder.feature in ("latents", "t5")}
    second = write_snapshot(storage, read_plan(storage), folders)
    assert open_cache(str(cache_copy)).snapshot == second
    assert open_cache(str(cache_copy), snapshot=first.digest).snapshot == first
    # whoever asks for a feature gets a snapshot that has it
    assert open_cache(str(cache_copy), {"llm": first.features["llm"].fingerprint[:6]}).snapshot == first
    with pytest.raises(CacheError, match=r"snapshot 0123456789ab is not here; the cache has"):
        open_cache(str(cache_copy), snapshot="0123456789abcdef")


def test_a_fingerprint_that_the_cache_does_not_have_lists_those_it_has(small_cache: Path) -> None:
    with pytest.raises(InputError, match=r"--feature llm=0000: .* has [0-9a-f]{12}"):
        open_cache(str(small_cache), {"llm": "0000"})
    with pytest.raises(InputError, match=r"--feature colour=1: .* has no such feature"):
        open_cache(str(small_cache), {"colour": "1"})


def test_a_feature_that_the_snapshot_lacks_is_named(tmp_path: Path) -> None:
    cache = open_cache(str(build_cache(tmp_path / "c", features=("latents", "t5"))))
    with pytest.raises(InputError, match="has no feature `llm`, only latents, t5"):
        cache.read(0, "llm")


def test_clips_planned_later_are_pointed_out(cache_copy: Path) -> None:
    assert newer_plan(open_cache(str(cache_copy))) is None
    shutil.copy(cache_copy / "plan/0000.parquet", cache_copy / "plan/0001.parquet")
    assert "1 plan file came after" in str(newer_plan(open_cache(str(cache_copy))))


def test_many_more_shards_than_open_files_can_be_read(tmp_path: Path) -> None:
    cache = open_cache(str(build_cache(tmp_path / "c", {VIDEO: 12}, shard_size=2)))
    cache.storage._open_files = OpenFiles(limit=2)
    for number in [*range(12), *reversed(range(12))]:
        key = cache.clip(number).key
        stored = make_feature("t5", key, VIDEO).tensors["t5_embeds"].array
        assert np.array_equal(cache.read(number, "t5")["t5_embeds"].array, stored)


def test_the_empty_prompt_is_read_and_checked(cache_copy: Path) -> None:
    cache = open_cache(str(cache_copy))
    stored = make_feature("t5", "", "").tensors["t5_embeds"].array
    assert np.array_equal(cache.read_empty("t5")["t5_embeds"].array, stored)
    (path,) = cache_copy.glob("t5/*/empty.safetensors")
    with flipped_byte(path, path.stat().st_size - 3), pytest.raises(CacheError, match=r"empty\.safetensors"):
        cache.read_empty("t5")
    path.unlink()
    with pytest.raises(CacheError, match="--empty-text zeros"):
        cache.read_empty("t5")


def test_both_formats_are_read_alike(small_cache: Path, tmp_path: Path) -> None:
    tar = open_cache(str(small_cache))
    group = open_cache(str(build_cache(tmp_path / "zarr", data_format="zarr")))
    assert len(group) == len(tar)
    for number in range(len(tar)):
        for feature in tar.features:
            one, other = tar.read(number, feature), group.read(number, feature)
            assert list(one) == list(other)
            for name, tensor in one.items():
                assert (tensor.dtype, tensor.array.shape) == (other[name].dtype, other[name].array.shape)
                assert tensor.array.tobytes() == other[name].array.tobytes()


def test_a_cache_with_a_feature_at_two_fingerprints_asks_which(cache_copy: Path) -> None:
    storage = LocalStorage(cache_copy)
    (first,) = list_snapshots(storage)
    old = first.features["latents"].fingerprint
    build_cache(cache_copy, features=("latents",), vae_name="other", snapshot=False)
    folders = {found.feature: found for found in find_features(storage) if not old.startswith(found.fingerprint)}
    second = write_snapshot(storage, read_plan(storage), folders)
    new = second.features["latents"].fingerprint
    assert new != old
    with pytest.raises(InputError) as caught:
        open_cache(str(cache_copy))
    assert caught.value.exit_code == 2
    told = str(caught.value)
    assert f"latents: {old[:12]} (snapshot {first.digest[:12]}), {new[:12]} (snapshot {second.digest[:12]})" in told
    assert "t5:" not in told
    assert f"--feature NAME=FINGERPRINT, for the newest: --feature latents={new[:12]}" in told
    with pytest.raises(InputError, match="made in several ways"):
        open_snapshot(str(cache_copy), {"llm": first.features["llm"].fingerprint})  # says nothing of the latents
    assert open_cache(str(cache_copy), {"latents": old[:12]}).snapshot == first
    assert open_cache(str(cache_copy), {"latents": new[:12]}).snapshot == second
    assert open_cache(str(cache_copy), snapshot=first.digest).snapshot == first  # as a run that goes on


def test_a_cache_says_what_it_is(small_cache: Path) -> None:
    cache = open_cache(str(small_cache))
    digest = cache.snapshot.digest[:12]
    assert repr(cache) == f"Cache('{small_cache}': 24 clips of latents, t5, answers, llm; snapshot {digest})"
