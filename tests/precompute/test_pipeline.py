"""The main path of stage one with fake encoders: what is made, what is made again, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mimir_precompute.cli.messages import describe_status
from mimir_precompute.clips.clip_list import read_clip_list
from mimir_precompute.inspection.status import read_status
from mimir_precompute.inspection.verify import verify_cache
from mimir_precompute.pipeline import EncodeJob, EncodeOutcome, encode_cache
from mimir_precompute.planning.plan import PlanRequest, update_plan
from mimir_precompute.provenance import RunLog
from mimir_precompute.workers.progress import Progress
from mimir_shared.errors import CacheError, InputError, MachineError, TooManyQuarantinedError
from mimir_shared.feature_folder import FeatureFolder, find_features
from mimir_shared.features import FEATURES, FeatureName
from mimir_shared.plan_file import read_plan
from mimir_shared.snapshot import list_snapshots, read_index
from mimir_shared.storage.folder import LocalStorage
from tests.fake_encoders import FakeEncoders, _FakeEncoder, encode_fake, tree


def encode(
    clips: Path | str | None, cache: Path, encoders: FakeEncoders | None = None, *, shard_size: int = 5, **options: Any
) -> EncodeOutcome:
    """Plan where clips are given, and encode with fake models, as the command does."""
    storage = LocalStorage(cache)
    if clips is not None:
        existing = read_plan(storage) if storage.list("plan") else None
        request = PlanRequest(preset="tiny", shard_size=None if existing else shard_size)
        update_plan(storage, existing, read_clip_list(str(clips)), request)
    plan = read_plan(storage)
    job = EncodeJob(
        storage=storage,
        plan=plan,
        encoders=encoders or FakeEncoders(),
        **{"shards": tuple(range(plan.num_shards)), **options},
    )
    return encode_cache(job, Progress(quiet=True), RunLog(storage, "cpu"))


def captions_of(clips: Path) -> dict[str, str]:
    lines = (clips / "metadata.jsonl").read_text().splitlines()
    return {row["file_name"]: row["text"] for row in map(json.loads, lines)}


def write_captions(clips: Path, captions: dict[str, str]) -> None:
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    (clips / "metadata.jsonl").write_text("\n".join(rows) + "\n")


@pytest.fixture
def own_clips(toy_clips: Path, tmp_path: Path) -> Path:
    """The toy clips in a folder that the test may change."""
    return Path(shutil.copytree(toy_clips, tmp_path / "clips"))


def test_every_clip_is_ok_in_every_feature_exactly_once(toy_clips: Path, tmp_path: Path) -> None:
    outcome = encode(toy_clips, tmp_path)
    assert outcome.snapshot is not None
    assert outcome.snapshot.clips == 12
    storage = LocalStorage(tmp_path)
    plan = read_plan(storage)
    planned = [(c.shard, c.row, c.key) for shard in range(3) for c in plan.shard_clips(shard)]
    for folder in find_features(storage):
        records = [folder.read_record(shard, 0) for shard in range(3)]
        rows = [(r.metadata.shard, s.row, s.key) for r in records for s in r.samples if s.status == "ok"]
        assert rows == planned
    assert verify_cache(storage).to_json()["ok"]
    status = read_status(storage).to_json()
    assert (status["clips"], status["shards"], status["complete"]) == (12, 3, True)


def test_the_cache_holds_what_the_encoders_gave(toy_clips: Path, tmp_path: Path) -> None:
    encode(toy_clips, tmp_path)
    captions = captions_of(toy_clips)
    from mimir_precompute.encoders.base import EncoderInput

    for folder in find_features(LocalStorage(tmp_path)):
        if folder.feature not in ("t5", "answers"):
            continue
        record = folder.read_record(1, 0)
        files = folder.open_shard(record)
        for sample in record.samples:
            document = files.read_document(sample)
            expected = encode_fake(folder.feature, EncoderInput(key=sample.key, caption=captions[sample.key]))
            assert document.items() >= {"key": sample.key, "caption": captions[sample.key]}.items()
            assert document.items() >= dict(expected.document).items()
            for name, tensor in files.read_tensors(sample).items():
                assert tensor.array.tobytes() == expected.tensors[name].array.tobytes()


def test_a_second_call_makes_nothing_and_builds_no_encoder(toy_clips: Path, tmp_path: Path) -> None:
    encode(toy_clips, tmp_path)
    before = tree(tmp_path, leave_out=())
    encoders = FakeEncoders()
    assert encode(toy_clips, tmp_path, encoders).nothing_to_do
    assert encoders.built == []
    assert tree(tmp_path, leave_out=()) == before


def test_shards_made_in_any_order_and_number_of_calls_give_the_same_cache(toy_clips: Path, tmp_path: Path) -> None:
    encode(toy_clips, tmp_path / "at once")
    pieces = tmp_path / "pieces"
    assert encode(toy_clips, pieces, shards=(2,), features=("t5",)).snapshot is None
    encode(None, pieces, shards=(1,))
    encode(None, pieces, shards=(2, 0), features=("latents", "answers", "llm"))
    encode(None, pieces)
    ours = tree(pieces)
    for name, data in tree(tmp_path / "at once").items():
        if not name.startswith("snapshots"):
            assert ours.pop(name) == data, name
    snapshots = {snapshot.digest for snapshot in list_snapshots(LocalStorage(pieces))}
    assert {s.digest for s in list_snapshots(LocalStorage(tmp_path / "at once"))} <= snapshots


def test_a_changed_caption_is_encoded_again_and_its_latents_are_copied(own_clips: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    encode(own_clips, cache)
    before = tree(cache)
    captions = captions_of(own_clips)
    changed = next(iter(captions))
    write_captions(own_clips, {**captions, changed: "An entirely new caption ."})
    encoders = FakeEncoders()
    outcome = encode(own_clips, cache, encoders)
    assert encoders.encoded == [(feature, changed) for feature in ("t5", "answers", "llm")]
    latents = outcome.features[0]
    assert (latents.feature, latents.encoded, latents.copied) == ("latents", 0, 1)
    after = tree(cache)
    assert all(after[name] == data for name, data in before.items())
    assert outcome.snapshot is not None
    assert outcome.snapshot.clips == 12
    index = read_index(LocalStorage(cache), outcome.snapshot).to_pylist()
    assert {row["key"]: row["caption"] for row in index}[changed] == "An entirely new caption ."
    assert verify_cache(LocalStorage(cache)).ok


def test_changed_video_bytes_make_its_latents_again_and_copy_its_text(own_clips: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    encode(own_clips, cache)
    names = sorted(captions_of(own_clips))
    other = next(
        name for name in names[1:] if (own_clips / name).stat().st_size != (own_clips / names[0]).stat().st_size
    )
    shutil.copy(own_clips / other, own_clips / names[0])
    encoders = FakeEncoders()
    outcome = encode(own_clips, cache, encoders)
    assert encoders.encoded == [("latents", names[0])]
    assert [feature.copied for feature in outcome.features] == [0, 1, 1, 1]


def test_a_new_clip_makes_one_clip_of_every_feature(own_clips: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    captions = captions_of(own_clips)
    newest = sorted(captions)[-1]
    write_captions(own_clips, {name: text for name, text in captions.items() if name != newest})
    encode(own_clips, cache)
    write_captions(own_clips, captions)
    encoders = FakeEncoders()
    outcome = encode(own_clips, cache, encoders)
    assert encoders.encoded == [(feature, newest) for feature in FEATURES]
    assert outcome.snapshot is not None
    assert outcome.snapshot.clips == 12


def test_a_removed_clip_makes_nothing_and_leaves_the_training_set(own_clips: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    encode(own_clips, cache)
    captions = captions_of(own_clips)
    removed = captions.popitem()[0]
    write_captions(own_clips, captions)
    encoders = FakeEncoders()
    outcome = encode(own_clips, cache, encoders)
    assert encoders.encoded == []
    assert outcome.snapshot is not None
    assert outcome.snapshot.left_out == {"plan:superseded": 1}
    assert removed not in read_index(LocalStorage(cache), outcome.snapshot)["key"].to_pylist()
    status = read_status(LocalStorage(cache))
    assert (status.clips, status.superseded, status.features["latents"][0].ok) == (11, 1, 12)
    assert "11 clips in 3 shards (1 row more, which later plans replaced or removed), complete" in describe_status(
        "cache", status
    )


def test_status_says_where_all_is_made_and_nothing_can_be_trained_on(own_clips: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    encode(own_clips, cache)
    storage = LocalStorage(cache)
    with_snapshot = read_status(storage)
    assert with_snapshot.to_json()["snapshots"] == with_snapshot.snapshots != []
    assert "no snapshot" not in describe_status("cache", with_snapshot)
    shutil.rmtree(cache / "snapshots")
    assert "no snapshot to train on yet: `mimir-precompute finalize cache`" in describe_status(
        "cache", read_status(storage)
    )


def test_a_clip_removed_before_it_was_encoded_is_not_encoded(own_clips: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    encode(own_clips, cache, features=("t5",))
    captions = captions_of(own_clips)
    removed = captions.popitem()[0]
    write_captions(own_clips, captions)
    encoders = FakeEncoders()
    encode(own_clips, cache, encoders, features=("answers",))
    assert removed not in {key for _, key in encoders.encoded}
    assert len(encoders.encoded) == 11


def test_a_changed_llm_is_refused_by_field_and_with_new_makes_answers_and_llm_alone(
    toy_clips: Path, tmp_path: Path
) -> None:
    encode(toy_clips, tmp_path)
    before = tree(tmp_path)
    salt: dict[FeatureName, str] = {"answers": "other", "llm": "other"}
    with pytest.raises(CacheError, match=r"`answers`.*model\.salt: '' → 'other'.*--on-mismatch new") as caught:
        encode(None, tmp_path, FakeEncoders(salt=salt))
    assert caught.value.exit_code == 4
    assert tree(tmp_path) == before
    encoders = FakeEncoders(salt=salt)
    outcome = encode(None, tmp_path, encoders, on_mismatch="new")
    assert {feature for feature, _ in encoders.encoded} == {"answers", "llm"}
    assert encoders.built == ["answers", "llm"]
    after = tree(tmp_path)
    assert all(after[name] == data for name, data in before.items())
    assert outcome.snapshot is not None
    assert outcome.snapshot.sequence == 1
    assert len([folder for folder in find_features(LocalStorage(tmp_path)) if folder.feature == "llm"]) == 2


def test_llm_without_answers_says_what_to_run(toy_clips: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="--features answers,llm"):
        encode(toy_clips, tmp_path, features=("llm",))
    encode(None, tmp_path, features=("answers",), shards=(0,))
    with pytest.raises(InputError, match="shard 1 has no `answers` yet"):
        encode(None, tmp_path, features=("llm",))


def test_a_clip_that_cannot_be_used_is_quarantined_and_the_run_goes_on(own_clips: Path, tmp_path: Path) -> None:
    names = sorted(captions_of(own_clips))
    (own_clips / names[0]).write_bytes(b"this is no video")
    (own_clips / names[1]).unlink()
    cache = tmp_path / "cache"
    with pytest.raises(TooManyQuarantinedError, match=r"2 of 12.*--max-quarantined 0\.01") as caught:
        encode(own_clips, cache)
    assert caught.value.exit_code == 3
    assert list_snapshots(LocalStorage(cache)) == []
    outcome = encode(None, cache, max_quarantined=0.2)
    assert outcome.nothing_to_do
    assert outcome.quarantined == {names[0]: "decode: unsupported_format", names[1]: "fetch: missing"}
    assert outcome.snapshot is not None
    assert outcome.snapshot.clips == 10
    assert outcome.snapshot.left_out == {"latents:missing": 1, "latents:unsupported_format": 1}
    assert verify_cache(LocalStorage(cache)).ok


@pytest.mark.parametrize(("how", "reason"), [("nan", "nonfinite"), ("shape", "wrong_shape")])
def test_what_an_encoder_gets_wrong_is_never_stored(toy_clips: Path, tmp_path: Path, how: str, reason: str) -> None:
    key = sorted(captions_of(toy_clips))[3]
    outcome = encode(toy_clips, tmp_path, FakeEncoders(poison={key: how}), max_quarantined=1.0)
    assert outcome.quarantined == {key: f"encode: {reason}"}
    folder = next(folder for folder in find_features(LocalStorage(tmp_path)) if folder.feature == "t5")
    samples = [sample for shard in range(3) for sample in folder.read_record(shard, 0).samples if sample.key == key]
    assert [(sample.status, sample.stored) for sample in samples] == [("quarantined", None)]
    assert "'t5_embeds'" in (samples[0].detail or "")


def test_a_clip_without_answers_has_no_hidden_states_either(toy_clips: Path, tmp_path: Path) -> None:
    key = sorted(captions_of(toy_clips))[0]
    encode(toy_clips, tmp_path, features=("answers",))
    folder = FeatureFolder(LocalStorage(tmp_path), "answers", find_features(LocalStorage(tmp_path))[0].fingerprint)
    shard, row = read_plan(folder.storage).newest_rows()[key]
    # an answers record in which this clip is quarantined, as an engine that fails on it leaves one
    from dataclasses import replace

    from mimir_shared.manifest import write_record

    record = folder.read_record(shard, 0)
    samples = list(record.samples)
    samples[row] = replace(samples[row], status="quarantined", stage="encode", reason="nonfinite", stored=None)
    metadata = record.metadata.model_copy(update={"ok": record.metadata.ok - 1, "quarantined": 1, "generation": 1})
    folder.storage.create(folder.record_path(shard, 1), write_record(metadata, samples))
    outcome = encode(None, tmp_path, features=("llm",), max_quarantined=1.0)
    assert outcome.quarantined == {key: "answers: nonfinite"}


def test_the_empty_prompt_is_stored_for_every_text_feature(toy_clips: Path, tmp_path: Path) -> None:
    encode(toy_clips, tmp_path)
    stored = {path.parent.parent.name for path in tmp_path.glob("*/*/empty.*")}
    assert stored == {"t5", "answers", "llm"}


def test_logs_say_what_made_each_shard_and_nothing_else_does(toy_clips: Path, tmp_path: Path) -> None:
    encode(toy_clips, tmp_path)
    (log,) = (tmp_path / "logs").iterdir()
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event["result"] for event in events if event["event"] == "shard"] == ["committed"] * 12
    assert all("host" in event for event in events if event["event"] == "feature")
    for name, data in tree(tmp_path).items():
        if not name.startswith("plan"):
            assert str(toy_clips).encode() not in data, name


@pytest.mark.parametrize("where", ["build", "encode"])
def test_a_device_that_fails_ends_the_run_as_a_fault_of_the_machine(
    toy_clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(FakeEncoders if where == "build" else _FakeEncoder, where, fail)
    with pytest.raises(MachineError, match=r"/cache: encoding: the device failed \(CUDA error: unspecified launch"):
        encode(toy_clips, tmp_path / "cache")
