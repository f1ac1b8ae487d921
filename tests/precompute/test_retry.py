"""`retry` tries quarantined clips again; what was good stays as it is, byte for byte."""

import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mimir_precompute.cli import app as cli
from mimir_precompute.cli import commands_remake
from mimir_precompute.cli import remake as cli_remake
from mimir_precompute.inspection.verify import verify_cache
from mimir_precompute.pipeline import EncodeJob
from mimir_precompute.provenance import RunLog
from mimir_precompute.quarantine import read_ledger
from mimir_precompute.remake import Remaking
from mimir_precompute.retry import RetryChoice, RetryOutcome, parse_choice, retry_clips
from mimir_precompute.workers.progress import Progress
from mimir_shared.errors import CacheError, InputError, MachineError, TooManyQuarantinedError
from mimir_shared.feature_folder import FeatureFolder, find_features
from mimir_shared.features import FeatureName
from mimir_shared.plan_file import Plan
from mimir_shared.snapshot import list_snapshots, read_index
from mimir_shared.storage.folder import LocalStorage
from tests.fake_encoders import FakeEncoders, tree
from tests.precompute.cli.test_cli import call
from tests.precompute.test_pipeline import captions_of, encode, write_captions


def retry(
    cache: Path, encoders: FakeEncoders | None = None, choice: RetryChoice | None = None, **options: Any
) -> RetryOutcome:
    """As the command does, with fake models."""
    storage = LocalStorage(cache)

    def make_job(plan: Plan, features: tuple[FeatureName, ...], remaking: Remaking) -> EncodeJob:
        return EncodeJob(
            storage=storage,
            plan=plan,
            encoders=encoders or FakeEncoders(),
            shards=tuple(range(plan.num_shards)),
            features=features,
            remaking=remaking,
            **options,
        )

    allowed = options.get("max_quarantined", 0.01)
    log = RunLog(storage, "cpu")
    return retry_clips(storage, choice or RetryChoice(), make_job, Progress(quiet=True), log, max_quarantined=allowed)


@pytest.fixture
def own_clips(toy_clips: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_clips, tmp_path / "clips"))


def samples_of(folder: FeatureFolder) -> dict[str, tuple[int, Any]]:
    """key → (generation, what the record says of it), by the newest records."""
    found = {}
    for shard, generation in folder.generations().items():
        found.update({s.key: (generation, s) for s in folder.read_record(shard, generation).samples})
    return found


def contents(folder: FeatureFolder) -> dict[str, tuple[Any, Mapping[str, bytes], int | None, int]]:
    """key → text, tensor bytes and both hashes of every good sample."""
    found = {}
    for shard, generation in folder.generations().items():
        record = folder.read_record(shard, generation)
        for sample in record.samples:
            if sample.stored is not None:
                text, tensors = folder.read_sample(record, sample)
                raw = {name: tensor.array.tobytes() for name, tensor in tensors.items()}
                found[sample.key] = (text, raw, sample.stored.xxh3, sample.stored.json_xxh3)
    return found


def only(cache: Path, feature: str) -> FeatureFolder:
    (folder,) = (folder for folder in find_features(LocalStorage(cache)) if folder.feature == feature)
    return folder


def test_a_mended_clip_joins_and_every_good_sample_keeps_its_bytes(own_clips: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    names = sorted(captions_of(own_clips))
    whole = (own_clips / names[0]).read_bytes()
    (own_clips / names[0]).write_bytes(b"this is no video")
    (own_clips / names[1]).unlink()
    before_snapshot = encode(own_clips, cache, max_quarantined=1).snapshot
    before, files = contents(only(cache, "latents")), tree(cache)
    (own_clips / names[0]).write_bytes(whole)
    encoders = FakeEncoders()
    outcome = retry(cache, encoders, max_quarantined=1)
    assert (outcome.tried, [line.key for line in outcome.failed_again]) == (2, [names[1]])
    assert encoders.encoded == [("latents", names[0])]
    assert encoders.built == ["latents"]
    after = contents(only(cache, "latents"))
    assert after.keys() == before.keys() | {names[0]}
    assert all(after[key] == before[key] for key in before)
    assert all(tree(cache)[name] == data for name, data in files.items()), "what was there stays"
    assert samples_of(only(cache, "latents"))[names[1]][1].attempt == 2
    assert before_snapshot is not None
    assert outcome.snapshot is not None
    assert (before_snapshot.clips, outcome.snapshot.clips, outcome.snapshot.sequence) == (10, 11, 1)
    assert verify_cache(LocalStorage(cache)).ok


def test_a_retried_cache_holds_what_a_cache_without_the_fault_holds(own_clips: Path, tmp_path: Path) -> None:
    keys = sorted(captions_of(own_clips))
    poison = {f"answers/{keys[2]}": "surplus", f"t5/{keys[3]}": "nan", f"latents/{keys[4]}": "shape"}
    encode(own_clips, tmp_path / "cache", FakeEncoders(poison=poison), max_quarantined=1)
    encode(own_clips, tmp_path / "good")
    retry(tmp_path / "cache")
    for feature in ("latents", "t5", "answers", "llm"):
        assert contents(only(tmp_path / "cache", feature)) == contents(only(tmp_path / "good", feature))
        data = {path.name: path.read_bytes() for path in (tmp_path / "cache").glob(f"{feature}/*/data/*")}
        good = {path.name: path.read_bytes() for path in (tmp_path / "good").glob(f"{feature}/*/data/*")}
        assert good.items() <= data.items(), "equal content has equal names and bytes"


def test_only_the_chosen_reason_stage_or_key_is_tried(own_clips: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    keys = sorted(captions_of(own_clips))
    (own_clips / keys[0]).unlink()
    poison = {f"latents/{keys[1]}": "nan", f"t5/{keys[2]}": "nan", f"t5/{keys[3]}": "shape"}
    encode(own_clips, cache, FakeEncoders(poison=poison), max_quarantined=1)
    still = FakeEncoders(poison=poison)
    for choice, tried in (
        (RetryChoice(reasons=frozenset(["missing"])), {keys[0]}),
        (RetryChoice(stages=frozenset(["encode"]), features=("latents",)), {keys[1]}),
        (RetryChoice(keys=frozenset([keys[3]])), {keys[3]}),
        (RetryChoice(reasons=frozenset(["nonfinite"]), keys=frozenset([keys[3]])), set()),
    ):
        assert {line.key for line in retry(cache, still, choice, max_quarantined=1).failed_again} == tried
    attempts = {line.key: line.attempt for line in read_ledger(LocalStorage(cache))}
    assert attempts == {keys[0]: 2, keys[1]: 2, keys[2]: 1, keys[3]: 2}


def test_where_nothing_is_chosen_nothing_is_written_and_no_model_is_named(toy_clips: Path, tmp_path: Path) -> None:
    encode(toy_clips, tmp_path)
    before = tree(tmp_path, leave_out=())
    encoders = FakeEncoders()
    assert retry(tmp_path, encoders).tried == 0
    assert encoders.built == []
    assert tree(tmp_path, leave_out=()) == before


def test_hidden_states_follow_the_answers(own_clips: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    key = sorted(captions_of(own_clips))[5]
    encode(own_clips, cache, FakeEncoders(poison={f"answers/{key}": "surplus"}), max_quarantined=1)
    lost = samples_of(only(cache, "llm"))[key][1]
    assert (lost.stage, lost.reason, lost.attempt) == ("answers", "wrong_shape", None)
    encoders = FakeEncoders()
    retry(cache, encoders)
    assert encoders.encoded == [("answers", key), ("llm", key)]
    generations = {feature: sorted(only(cache, feature).generations().values()) for feature in ("t5", "answers", "llm")}
    assert generations == {"t5": [0, 0, 0], "answers": [0, 0, 1], "llm": [0, 0, 1]}
    assert read_ledger(LocalStorage(cache)) == []


def test_hidden_states_are_made_again_after_a_retry_that_ended_before_them(own_clips: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    key = sorted(captions_of(own_clips))[5]
    encode(own_clips, cache, FakeEncoders(poison={f"answers/{key}": "surplus"}), max_quarantined=1)

    class DiesBeforeLlm(FakeEncoders):
        def build(self, feature: FeatureName) -> Any:
            if feature == "llm":
                raise MachineError("the power went")
            return super().build(feature)

    with pytest.raises(MachineError):
        retry(cache, DiesBeforeLlm())
    encoders = FakeEncoders()
    outcome = retry(cache, encoders)
    assert encoders.encoded == [("llm", key)]
    assert outcome.snapshot is not None
    assert outcome.snapshot.clips == 12


def test_a_superseded_row_is_never_tried(own_clips: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    captions = captions_of(own_clips)
    lost, gone = sorted(captions)[:2]
    (own_clips / lost).unlink()
    encode(own_clips, cache, features=("latents",), max_quarantined=1)
    del captions[lost]
    write_captions(own_clips, captions)
    encode(own_clips, cache, features=("latents",))
    assert retry(cache).tried == 0
    del captions[gone]
    write_captions(own_clips, captions)
    encode(own_clips, cache, features=("t5",))  # rows that were superseded before they were made
    assert retry(cache).tried == 0


def test_other_models_are_refused_field_by_field(own_clips: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    key = sorted(captions_of(own_clips))[0]
    encode(own_clips, cache, FakeEncoders(poison={f"t5/{key}": "nan"}), max_quarantined=1)
    before = tree(cache)
    with pytest.raises(CacheError, match=r"model\.salt: '' → 'other'"):
        retry(cache, FakeEncoders(salt={"t5": "other"}))
    assert tree(cache) == before


def test_clips_that_fail_again_are_no_mass_loss_but_new_losses_are(own_clips: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    keys = sorted(captions_of(own_clips))
    poison = {f"t5/{key}": "nan" for key in keys[:9]}
    encode(own_clips, cache, FakeEncoders(poison=poison), shard_size=12, max_quarantined=1, accept_quarantine=True)
    outcome = retry(cache, FakeEncoders(poison=poison), max_quarantined=1)
    assert {line.attempt for line in outcome.failed_again} == {2}
    with pytest.raises(TooManyQuarantinedError):
        retry(cache, FakeEncoders(poison=poison))


def test_what_still_fails_is_copied_with_its_line_by_a_retry_of_another_clip(own_clips: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    keys = sorted(captions_of(own_clips))
    encode(own_clips, cache, FakeEncoders(poison=dict.fromkeys(keys[:2], "nan")), shard_size=12, max_quarantined=1)
    before = samples_of(only(cache, "t5"))[keys[1]][1]
    retry(cache, choice=RetryChoice(keys=frozenset(keys[:1])), max_quarantined=1)
    assert samples_of(only(cache, "t5"))[keys[1]] == (1, before)
    assert samples_of(only(cache, "t5"))[keys[0]][1].status == "ok"


def test_of_two_llms_the_new_snapshot_has_the_one_that_the_newest_had(own_clips: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    bad = {f"t5/{sorted(captions_of(own_clips))[0]}": "nan"}
    salt: dict[FeatureName, str] = {"answers": "other", "llm": "other"}
    encode(own_clips, cache, FakeEncoders(poison=bad), max_quarantined=1)
    newest = encode(None, cache, FakeEncoders(salt=salt, poison=bad), on_mismatch="new", max_quarantined=1).snapshot
    outcome = retry(cache)
    assert newest is not None
    assert outcome.snapshot is not None
    assert outcome.snapshot.clips == newest.clips + 1
    for feature in ("latents", "answers", "llm"):
        assert outcome.snapshot.features[feature] == newest.features[feature]


def test_a_retried_clip_is_in_the_index(own_clips: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    key = sorted(captions_of(own_clips))[0]
    encode(own_clips, cache, FakeEncoders(poison={key: "nan"}), max_quarantined=1)
    outcome = retry(cache)
    assert outcome.snapshot is not None
    assert key in read_index(LocalStorage(cache), outcome.snapshot)["key"].to_pylist()


def test_reasons_and_stages_that_do_not_exist_are_refused_with_those_that_do() -> None:
    with pytest.raises(InputError, match=r"--reason 'timeuot': expected some of missing.*timeout"):
        parse_choice("timeuot", None, [], "latents")
    with pytest.raises(InputError, match="--reason 'superseded'"):
        parse_choice("superseded", None, [], "latents")
    with pytest.raises(InputError, match="--stage 'answers': expected some of fetch, decode, geometry, encode"):
        parse_choice(None, "answers", [], "latents")
    choice = parse_choice("timeout, missing", "fetch", ["a"], "t5,latents")
    assert choice.reasons == {"timeout", "missing"}
    assert (choice.stages, choice.keys, choice.features) == ({"fetch"}, {"a"}, ("latents", "t5"))


def test_the_command_tells_what_became_of_each_clip(
    own_clips: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    keys = sorted(captions_of(own_clips))
    (own_clips / keys[1]).unlink()
    encode(own_clips, cache, FakeEncoders(poison={f"t5/{keys[0]}": "nan"}), max_quarantined=1)
    monkeypatch.setattr(commands_remake, "open_encoders", lambda plan, options, features: FakeEncoders())
    capfd.readouterr()
    code, out, _ = call(capfd, "retry", cache, "--max-quarantined", 1, "--device", "cpu")
    assert code == 0
    assert "2 tried again: 1 are good now, 1 failed again" in out
    assert f"{keys[1]}: latents fetch: missing: no such file (tried 2 times)" in out
    code, _, error = call(capfd, "retry", cache, "--reason", "missing", "--device", "cpu")
    assert (code, "1 of 12 clips are quarantined" in error) == (3, True)
    assert call(capfd, "retry", cache, "--reason", "no_such_reason", "--device", "cpu")[0] == 2
    code, out, _ = call(capfd, "retry", cache, "--reason", "timeout", "--device", "cpu")
    assert (code, "no quarantined clip to try again" in out) == (0, True)


@pytest.mark.parametrize("command", [cli_remake.retry, cli_remake.verify])
def test_what_encodes_again_takes_every_option_about_models_and_decoding_that_encode_takes(
    command: Callable[..., None],
) -> None:
    theirs = inspect.signature(cli.encode).parameters
    elsewhere = {"cache", "clips", "shards", "features", "preset", "bucket", "fps", "shard_size", "seed", "limit"}
    elsewhere |= {"video_key", "caption_key", "accept_removals", "output_format", "on_mismatch"}
    # one process makes again what is to be made again
    elsewhere |= {"workers", "place", "only_own_shards", "executor", "ray_address", "decode_workers"}
    ours = inspect.signature(command).parameters
    for name in theirs.keys() - elsewhere:
        assert name in ours, name
        assert (ours[name].default, ours[name].annotation) == (theirs[name].default, theirs[name].annotation)


def test_no_snapshot_leaves_out_more_clips_than_allowed_whichever_command_writes_it(
    own_clips: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache, storage = tmp_path / "cache", LocalStorage(tmp_path / "cache")
    encode(own_clips, cache)
    first = sorted(captions_of(own_clips))[0]
    with (own_clips / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "gone.mp4", "text": "a clip that is not there"}) + "\n")
    with pytest.raises(TooManyQuarantinedError, match=r"no snapshot was written.*mimir-precompute retry"):
        encode(own_clips, cache)
    assert len(list_snapshots(storage)) == 1
    assert retry(cache, choice=RetryChoice(keys=frozenset([first]))).snapshot is None
    code, _, err = call(capfd, "finalize", cache)
    assert code == 3
    assert "1 of 13 clips are quarantined" in err
    assert len(list_snapshots(storage)) == 1
    code, out, _ = call(capfd, "finalize", cache, "--max-quarantined", 0.1)
    assert code == 0
    assert "left out: 1 at latents:missing" in out
    assert len(list_snapshots(storage)) == 2
