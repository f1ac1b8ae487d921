"""Reading a snapshot with numpy alone: by key, whole, and only while the cache is the one it was made of."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mimir_shared.errors import CacheError, InputError
from mimir_shared.snapshot import Snapshot
from mimir_shared.snapshot_reader import SnapshotReader, open_snapshot
from tests.train.caches import IMAGE, T5_ROWS, T5_WIDTH, VIDEO, build_cache, flipped_byte, make_feature


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("shared") / "cache", {VIDEO: 5, IMAGE: 4}, shard_size=4)


@pytest.fixture
def cache_copy(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "copy"))


def test_every_key_gives_all_its_tensors(cache: Path) -> None:
    reader = open_snapshot(str(cache))
    keys = list(reader)
    assert len(reader) == len(keys) == len(set(keys)) == 9
    assert reader.features == ("latents", "t5", "answers", "llm")
    for key in keys:
        assert key in reader
        bucket = reader.clip(reader.number_of(key)).bucket
        stored = {
            name: t for feature in reader.features for name, t in make_feature(feature, key, bucket).tensors.items()
        }
        found = reader.sample(key)
        assert found.keys() == stored.keys()
        for name, tensor in stored.items():
            assert np.array_equal(found[name].array, tensor.array)
        assert reader.document(key, "answers")["key"] == key
    assert reader.sample(keys[0], ["t5"]).keys() == {"t5_embeds", "t5_ids", "t5_offsets"}


def test_samples_are_the_callers_own(cache: Path) -> None:
    reader = open_snapshot(str(cache))
    key = next(iter(reader))
    reader.sample(key)["t5_embeds"].array[:] = 0
    assert reader.sample(key)["t5_embeds"].array.any()


def test_an_unknown_key_points_at_inspect(cache: Path) -> None:
    reader = open_snapshot(str(cache))
    assert "nobody" not in reader
    with pytest.raises(InputError, match=r"no clip 'nobody' among its 9; `mimir-precompute inspect .* nobody`"):
        reader.sample("nobody")


def test_a_record_that_the_snapshot_does_not_pin_is_refused_when_its_shard_is_read(
    cache_copy: Path, tmp_path: Path
) -> None:
    other = build_cache(
        tmp_path / "other", {VIDEO: 5, IMAGE: 4}, shard_size=4,
        replace={(f"{VIDEO}-000", "t5"): make_feature("t5", "somebody else", VIDEO)},
    )  # fmt: skip
    (record,) = cache_copy.glob("t5/*/manifests/000000.0.parquet")
    (changed,) = other.glob("t5/*/manifests/000000.0.parquet")
    shutil.copy(changed, record)
    reader = open_snapshot(str(cache_copy))
    with pytest.raises(CacheError, match=rf"{record}: its seal is .* but snapshot .* finalize {cache_copy}") as caught:
        reader.read(0, "t5")
    assert caught.value.exit_code == 4
    reader.read(0, "t5", verify=False)  # the index alone tells where bytes lie
    reader.read(len(reader) - 1, "t5")  # of another shard


def test_a_record_that_is_damaged_or_gone_is_refused(cache_copy: Path) -> None:
    (record,) = cache_copy.glob("llm/*/manifests/000001.0.parquet")
    number = len(open_snapshot(str(cache_copy))) - 3
    with flipped_byte(record, 700), pytest.raises(CacheError, match=rf"{record}.*damaged or cut short"):
        open_snapshot(str(cache_copy)).read(number, "llm")
    record.unlink()
    with pytest.raises(CacheError, match=rf"{record}: missing"):
        open_snapshot(str(cache_copy)).read(number, "llm")


def test_a_cache_with_the_plan_of_another_is_refused(cache_copy: Path, tmp_path: Path) -> None:
    other = build_cache(tmp_path / "other", {VIDEO: 3})
    shutil.copy(other / "plan/0000.parquet", cache_copy / "plan/0000.parquet")
    with pytest.raises(CacheError, match=r"plan/0000.parquet: is the plan \w{12}, but snapshot \w{12} was made of"):
        open_snapshot(str(cache_copy))
    (cache_copy / "plan/0000.parquet").unlink()
    with pytest.raises(CacheError, match=r"plan/0000.parquet: missing, but snapshot"):
        open_snapshot(str(cache_copy))


def test_an_index_that_departs_from_the_spec_is_refused(cache: Path) -> None:
    reader = open_snapshot(str(cache))
    document = reader.snapshot.model_dump()
    document["features"]["t5"]["identity"]["tensors"][0]["sizes"] = [T5_ROWS, T5_WIDTH + 1]
    other = SnapshotReader(reader.storage, Snapshot.model_validate(document), reader._index)
    with pytest.raises(CacheError, match=r"'t5_embeds' of clip number 1 has dims \(8, 16\) .* index and spec disagree"):
        other.read(0, "t5")
    del document["features"]["t5"]["identity"]["tensors"][0]
    other = SnapshotReader(reader.storage, Snapshot.model_validate(document), reader._index)
    with pytest.raises(CacheError, match=r"tensors \['t5_embeds', 't5_ids', 't5_offsets'\] of `t5`, spec.json"):
        other.read(0, "t5")


def test_a_text_with_a_flipped_byte_is_refused(cache_copy: Path) -> None:
    reader = open_snapshot(str(cache_copy))
    (path,) = cache_copy.glob("answers/*/data/000000-*.tar")
    with flipped_byte(path, 515), pytest.raises(CacheError, match=r"its text does not match the hash"):
        reader.document(reader.clip(0).key, "answers")


def test_reading_with_numpy_imports_no_torch(cache: Path) -> None:
    code = (
        "import sys\nfrom mimir_shared.snapshot_reader import open_snapshot\n"
        f"reader = open_snapshot({str(cache)!r})\n"
        "tensors = reader.sample(next(iter(reader)))\n"
        "print(tensors['t5_embeds'].to_float32().shape, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(8, 16) False\n"
