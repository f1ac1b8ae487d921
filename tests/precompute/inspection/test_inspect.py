"""Everything that `inspect` says of one clip, and what it says of a key that it does not know."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import xxhash

from mimir_precompute.cli.messages import describe_inspection
from mimir_precompute.inspection.clip_facts import describe_clip
from mimir_shared.errors import InputError
from mimir_shared.features import FEATURES
from mimir_shared.storage.folder import LocalStorage
from tests.fake_encoders import T5_ROWS
from tests.precompute.cli.test_cli import call
from tests.precompute.test_pipeline import captions_of, encode, write_captions

KEY = "000001.mp4"


@pytest.fixture(scope="module")
def clips(toy_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(toy_clips, tmp_path_factory.mktemp("inspect") / "clips"))
    (folder / "empty.mp4").write_bytes(b"")
    rows = [{"file_name": name, "text": text, "rating": 4} for name, text in captions_of(folder).items()]
    rows.append({"file_name": "empty.mp4", "text": "Nothing.", "rating": 1})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def good(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache") / "cache"
    encode(clips, cache, max_quarantined=0.5)
    return cache


@pytest.fixture
def cache(good: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(good, tmp_path / "cache"))


def features_of(described: dict[str, Any]) -> dict[str, Any]:
    return {name.partition("/")[0]: facts for name, facts in described["features"].items()}


def test_plan_row_features_bytes_and_values_of_a_clip_are_told(good: Path, clips: Path) -> None:
    described = describe_clip(LocalStorage(good), KEY)
    assert (described["key"], described["state"], described["plan"]) == (KEY, "planned", 0)
    assert described["caption"] == captions_of(clips)[KEY]
    assert described["source_bytes"] == (clips / KEY).stat().st_size
    assert described["columns"] == {"rating": 4}
    assert described["history"] == []
    xxh3 = f"{xxhash.xxh3_64_intdigest((clips / KEY).read_bytes()):016x}"
    assert described["source_now"] == {"xxh3": xxh3}
    features = features_of(described)
    assert list(features) == list(FEATURES)
    assert all(facts["matches"] and facts["status"] == "ok" for facts in features.values())
    assert features["latents"]["source_xxh3"] == xxh3
    (moments,) = features["latents"]["tensors"]
    assert (moments["name"], moments["dtype"], moments["shape"]) == ("vae_moments", "bf16", [8, 3, 16, 24])
    assert moments["min"] <= moments["mean"] <= moments["max"]
    stored = (good / moments["file"]).read_bytes()[moments["offset"] : moments["offset"] + moments["nbytes"]]
    assert f"{xxhash.xxh3_64_intdigest(stored):016x}" == features["latents"]["tensors_xxh3"]
    embeds = next(tensor for tensor in features["t5"]["tensors"] if tensor["name"] == "t5_embeds")
    assert embeds["valid_rows"] == min(T5_ROWS, len(described["caption"].split()))
    assert features["answers"]["document"]["variants"][0]["answer"]["text"] == described["caption"] + "!"
    json.dumps(described)


def test_the_text_for_people_has_what_the_json_has(good: Path) -> None:
    described = describe_clip(LocalStorage(good), KEY)
    text = describe_inspection(described)
    assert text.startswith(f"{KEY}\n  caption: {described['caption']}\n")
    assert "rating: 4" in text
    assert text.count("ok, its bytes match their hashes") == 4
    assert "vae_moments: bf16 8x3x16x24 mean" in text
    assert f"answer 0: {described['caption'] + '!'!r}" in text
    assert features_of(described)["llm"]["record"] in text


def test_a_quarantined_clip_says_where_why_and_how_often_it_was_tried(good: Path) -> None:
    described = describe_clip(LocalStorage(good), "empty")
    latents = features_of(described)["latents"]
    why = {name: latents[name] for name in ("status", "stage", "reason", "attempt")}
    assert why == {"status": "quarantined", "stage": "fetch", "reason": "empty_file", "attempt": 1}
    assert described["source_now"] == {"fault": "empty_file: the file has no bytes"}
    assert "  reason: empty_file" in describe_inspection(described)


@pytest.mark.parametrize(("what", "feature"), [("tensors", "t5"), ("text", "answers")])
def test_damaged_bytes_are_told_with_all_the_rest_and_exit_code_4(
    cache: Path, capfd: pytest.CaptureFixture[str], what: str, feature: str
) -> None:
    facts = features_of(describe_clip(LocalStorage(cache), KEY))[feature]
    place = facts["text"] if what == "text" else facts["tensors"][0]
    path = cache / facts["file"]
    data = bytearray(path.read_bytes())
    data[place["offset"] + 3] ^= 1
    path.write_bytes(bytes(data))
    code, out, _ = call(capfd, "inspect", cache, KEY, "--json")
    assert code == 4
    damaged = features_of(json.loads(out))
    assert [name for name, one in damaged.items() if not one["matches"]] == [feature]
    assert f"the {what} of sample '{KEY}'" in damaged[feature]["fault"]
    assert [t["shape"] for t in damaged[feature]["tensors"]] == [t["shape"] for t in facts["tensors"]]
    code, out, _ = call(capfd, "inspect", cache, KEY)
    assert code == 4
    assert ": ok, DAMAGED" in out


def test_a_clip_that_was_planned_again_or_removed_shows_its_history(toy_clips: Path, tmp_path: Path) -> None:
    clips = Path(shutil.copytree(toy_clips, tmp_path / "clips"))
    storage = LocalStorage(tmp_path / "cache")
    encode(clips, tmp_path / "cache")
    captions = captions_of(clips)
    old = captions[KEY]
    write_captions(clips, {**captions, KEY: "Another caption."})
    encode(clips, tmp_path / "cache")
    described = describe_clip(storage, KEY)
    assert (described["state"], described["plan"], described["caption"]) == ("planned", 1, "Another caption.")
    assert [(row["plan"], row["change"], row["caption"]) for row in described["history"]] == [
        (0, "planned", old),
        (1, "planned", "Another caption."),
    ]
    write_captions(clips, {name: text for name, text in captions.items() if name != KEY})
    encode(clips, tmp_path / "cache")
    removed = describe_clip(storage, "000001")
    assert (removed["state"], removed["caption"]) == ("removed", "Another caption.")
    assert [row["change"] for row in removed["history"]] == ["planned", "planned", "removed"]
    assert all(facts["matches"] for facts in removed["features"].values())
    text = describe_inspection(removed)
    assert "a later plan removed it" in text
    assert "history: removed by plan 2" in text


def test_a_source_that_changed_since_is_told(clips: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(clips, tmp_path / "clips"))
    encode(own, tmp_path / "cache", features=("latents", "t5"), max_quarantined=0.5)
    (own / KEY).write_bytes((own / "000002.mp4").read_bytes())
    text = describe_inspection(describe_clip(LocalStorage(tmp_path / "cache"), KEY))
    assert text.count("but the source has changed since") == 1
    (own / KEY).unlink()
    assert "missing: no such file" in describe_inspection(describe_clip(LocalStorage(tmp_path / "cache"), KEY))


def test_shards_that_are_not_encoded_yet_are_told(clips: Path, tmp_path: Path) -> None:
    encode(clips, tmp_path, features=("t5",), shards=(1,), max_quarantined=0.5)
    storage = LocalStorage(tmp_path)
    told = {describe_clip(storage, key)["features"].popitem()[1]["status"] for key in captions_of(clips)}
    assert told == {"ok", "not encoded yet"}


@pytest.mark.parametrize(
    ("key", "near"),
    [("00001", "000001.mp4, 000010.mp4"), ("000O01.mp4", "000001.mp4"), ("0000", "000000.mp4"), ("Empty", "empty.mp4")],
)
def test_an_unknown_key_gets_keys_that_are_like_it(good: Path, key: str, near: str) -> None:
    with pytest.raises(InputError, match="not in the plan of 13 clips; did you mean") as told:
        describe_clip(LocalStorage(good), key)
    for one in near.split(", "):
        assert one in str(told.value)


@pytest.mark.parametrize("key", ["", "something quite different"])
def test_a_key_like_no_other_gets_no_hint(good: Path, key: str) -> None:
    with pytest.raises(InputError, match=r"not in the plan of 13 clips$"):
        describe_clip(LocalStorage(good), key)
