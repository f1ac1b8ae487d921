"""`diff` says what is different between two caches, and nothing else."""

import shutil
from pathlib import Path

import pytest

from mimir_precompute.cli.messages import describe_difference
from mimir_precompute.inspection.diff import CacheDifference, compare_caches
from mimir_shared.errors import InputError
from mimir_shared.storage.folder import LocalStorage
from tests.fake_encoders import FakeEncoders
from tests.precompute.test_pipeline import captions_of, encode, write_captions


@pytest.fixture(scope="module")
def cache(toy_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diff") / "cache"
    encode(toy_clips, folder)
    return folder


def _compare(first: Path, second: Path, chosen: dict[str, str] | None = None) -> CacheDifference:
    return compare_caches(LocalStorage(first), LocalStorage(second), {}, chosen or {})


def test_a_cache_equals_itself_and_its_copy(cache: Path, tmp_path: Path) -> None:
    found = _compare(cache, Path(shutil.copytree(cache, tmp_path / "copy")))
    assert found.is_equal
    assert found.features["t5"].tensors["t5_embeds"].equal == found.features["t5"].clips == 12
    assert "bit for bit" in describe_difference(found)


def test_another_model_is_named_and_its_features_are_measured(cache: Path, toy_clips: Path, tmp_path: Path) -> None:
    encode(toy_clips, tmp_path, FakeEncoders(salt={"t5": "other"}))
    found = _compare(cache, tmp_path)
    assert not found.is_equal
    assert found.features["t5"].fields == [("model.salt", "", "other")]
    embeds = found.features["t5"].tensors["t5_embeds"]
    assert embeds.equal == 0
    assert embeds.rms_error == pytest.approx(2**0.5, rel=0.1)  # independent normal numbers
    assert found.features["t5"].tensors["t5_ids"].equal == 12
    assert all(found.features[name].is_equal for name in ("latents", "answers", "llm"))
    assert "model.salt: '' → 'other'" in describe_difference(found)


def test_missing_clips_captions_and_features_are_told(cache: Path, toy_clips: Path, tmp_path: Path) -> None:
    clips = Path(shutil.copytree(toy_clips, tmp_path / "clips"))
    captions = captions_of(clips)
    names = sorted(captions)
    del captions[names[0]]
    write_captions(clips, {**captions, names[1]: "Something else ."})
    encode(clips, tmp_path / "other", features=("latents", "t5"))
    found = _compare(cache, tmp_path / "other")
    assert (found.only_a, found.only_b, found.other_captions) == ([names[0]], [], 1)
    assert found.features["latents"].only_a == [names[0]]
    assert found.features["latents"].other_text == 1
    assert found.features["llm"].only == "A"
    text = describe_difference(found)
    assert "llm: only in A" in text
    assert f"planned in A alone: {names[0]}" in text


def test_a_feature_that_is_there_twice_must_be_chosen(cache: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(cache, tmp_path / "both"))
    encode(None, both, FakeEncoders(salt={"t5": "other"}), on_mismatch="new")
    with pytest.raises(InputError, match="2 t5 features"):
        _compare(cache, both)
    original = next((cache / "t5").iterdir()).name
    assert _compare(cache, both, {"t5": original}).is_equal
