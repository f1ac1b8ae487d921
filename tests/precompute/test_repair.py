"""`verify --repair` encodes what is damaged again and leaves the rest as it is; afterwards `verify` finds nothing."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mimir_precompute.cli import commands_remake
from mimir_precompute.inspection.verify import verify_cache
from mimir_precompute.pipeline import EncodeJob
from mimir_precompute.provenance import RunLog
from mimir_precompute.remake import Remaking
from mimir_precompute.repair import RepairOutcome, repair_cache
from mimir_precompute.workers.progress import Progress
from mimir_shared.errors import CacheError, MachineError
from mimir_shared.features import FEATURES, FeatureName
from mimir_shared.plan_file import Plan
from mimir_shared.snapshot import list_snapshots, read_index
from mimir_shared.storage.folder import LocalStorage
from tests.fake_encoders import FakeEncoders, tree
from tests.precompute.cli.test_cli import call
from tests.precompute.test_pipeline import captions_of, encode
from tests.precompute.test_retry import contents, only, retry, samples_of


def repair(cache: Path, encoders: FakeEncoders | None = None, **options: Any) -> RepairOutcome:
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

    return repair_cache(storage, verify_cache(storage), make_job, Progress(quiet=True), RunLog(storage, "cpu"))


@pytest.fixture(scope="module", params=["webdataset", "zarr"])
def good(request: pytest.FixtureRequest, toy_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("repair") / "cache"
    encode(toy_clips, cache, data_format=request.param)
    return cache


@pytest.fixture
def cache(good: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(good, tmp_path / "cache"))


def data_files(cache: Path, feature: str = "*", shard: int | None = None) -> list[Path]:
    """Of a shard (one tar, or all files of a group)."""
    name = "*" if shard is None else f"{shard:06d}-*"
    found = list(cache.glob(f"{feature}/*/data/{name}"))
    return sorted(p for path in found for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


def flip(path: Path, position: int, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(bytes(data))


def all_contents(cache: Path) -> dict[str, Any]:
    return {feature: contents(only(cache, feature)) for feature in FEATURES}


def assert_whole(cache: Path, good: Path) -> None:
    report = verify_cache(LocalStorage(cache))
    assert report.problems == []
    assert all_contents(cache) == all_contents(good)


def test_a_flipped_bit_in_one_sample_makes_that_clip_again_and_copies_the_others(good: Path, cache: Path) -> None:
    folder = only(cache, "t5")
    record = folder.read_record(1, 0)
    stored = record.samples[2].stored
    assert stored is not None
    place = stored.tensors[0]
    flip(cache / folder.directory / record.metadata.files[place.file].path, place.offset + 5)
    encoders = FakeEncoders()
    outcome = repair(cache, encoders)
    assert encoders.encoded == [("t5", record.samples[2].key)]
    assert outcome.remaining == ()
    assert (outcome.shards_made, outcome.encoded, outcome.copied) == (1, 1, 4)
    assert folder.generations() == {0: 0, 1: 1, 2: 0}
    assert_whole(cache, good)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "padding"])
def test_a_damaged_data_file_is_made_again_and_serves_old_snapshots_too(good: Path, cache: Path, damage: str) -> None:
    before = list_snapshots(LocalStorage(cache))[0]
    (path, *_) = (p for p in data_files(cache, "latents", 2) if p.stat().st_size > 1000)
    harm: dict[str, Callable[[], object]] = {
        "missing": path.unlink,
        "empty": lambda: path.write_bytes(b""),
        "cut": lambda: path.write_bytes(path.read_bytes()[:-700]),
        "padding": lambda: path.write_bytes(path.read_bytes() + b"\0"),
    }
    harm[damage]()
    outcome = repair(cache)
    assert outcome.ok
    assert_whole(cache, good)
    assert outcome.snapshot is not None
    assert (outcome.snapshot.sequence, outcome.snapshot.clips) == (1, 12)
    # equal encoders give equal bytes under equal names, so what the old snapshot names is whole again as well
    data = {name: data for name, data in tree(good).items() if "/data/" in name}
    assert data.items() <= tree(cache).items()
    assert before in list_snapshots(LocalStorage(cache))


def test_a_damaged_record_has_the_whole_shard_made_again(good: Path, cache: Path) -> None:
    path = next(cache.glob("t5/*/manifests/000001.0.parquet"))
    path.write_bytes(path.read_bytes()[:-9])
    encoders = FakeEncoders()
    outcome = repair(cache, encoders)
    assert len(encoders.encoded) == 5
    assert (outcome.ok, outcome.copied) == (True, 0)
    assert only(cache, "t5").generations()[1] == 1
    assert_whole(cache, good)


def test_where_the_newest_record_is_damaged_the_one_before_it_vouches(toy_clips: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    keys = sorted(captions_of(toy_clips))
    encode(toy_clips, cache, FakeEncoders(poison={f"t5/{keys[0]}": "nan"}), shard_size=12, max_quarantined=1)
    retry(cache)
    encode(toy_clips, tmp_path / "good", shard_size=12)
    flip(next(cache.glob("t5/*/manifests/000000.1.parquet")), 100)
    encoders = FakeEncoders()
    assert repair(cache, encoders).ok
    assert encoders.encoded == [("t5", keys[0])], "what the lost generation had mended is mended again"
    assert only(cache, "t5").generations() == {0: 2}
    assert_whole(cache, tmp_path / "good")


def test_what_was_quarantined_stays_so_and_is_not_tried(toy_clips: Path, tmp_path: Path) -> None:
    keys = sorted(captions_of(toy_clips))
    poison = {f"t5/{keys[0]}": "nan"}
    encode(toy_clips, tmp_path, FakeEncoders(poison=poison), shard_size=12, max_quarantined=1)
    (path,) = data_files(tmp_path, "t5")
    path.unlink()
    encoders = FakeEncoders()
    assert repair(tmp_path, encoders, max_quarantined=1).ok
    assert len(encoders.encoded) == 11
    assert samples_of(only(tmp_path, "t5"))[keys[0]][1].attempt == 1


def test_damaged_empty_prompts_specs_and_snapshots_are_mended(good: Path, cache: Path) -> None:
    before = tree(cache)
    for name in ("t5/*/empty.safetensors", "answers/*/empty.json"):
        flip(next(cache.glob(name)), -3)
    next(cache.glob("llm/*/empty.safetensors")).unlink()
    spec = next(cache.glob("latents/*/spec.json"))
    spec.write_text(spec.read_text().replace('"fake"', '"other"'))
    next(cache.glob("t5/*/spec.json")).unlink()
    flip(next(cache.glob("snapshots/*/index.arrow")), 500)
    assert {p.kind for p in verify_cache(LocalStorage(cache)).problems} == {"spec", "empty", "snapshot"}
    outcome = repair(cache)
    assert outcome.ok
    assert outcome.lost_snapshots == ()
    assert tree(cache) == before, "nothing needed another generation"


def test_a_spec_that_names_the_other_format_is_mended_and_no_shard_made_again(good: Path, cache: Path) -> None:
    before = tree(cache)
    spec = next(cache.glob("t5/*/spec.json"))
    text = spec.read_text()
    other = text.replace('"webdataset"', '"zarr"') if '"webdataset"' in text else text.replace('"zarr"', '"webdataset"')
    spec.write_text(other)
    assert {problem.kind for problem in verify_cache(LocalStorage(cache)).problems} == {"spec"}
    outcome = repair(cache)
    assert (outcome.remaining, outcome.shards_made) == ((), 0)
    assert tree(cache) == before


def test_files_too_many_in_the_folder_of_a_shard_are_taken_away(cache: Path) -> None:
    before = tree(cache)
    folders = [path for path in cache.glob("t5/*/data/*") if path.is_dir()]
    for folder in folders:
        (folder / "more").mkdir()
        (folder / "more" / "zarr.json").write_text("{}")
        (folder / "stray").write_text("")
    assert len(verify_cache(LocalStorage(cache)).problems) == 2 * len(folders)
    outcome = repair(cache)
    assert (outcome.remaining, outcome.shards_made) == ((), 0)
    assert tree(cache) == before


def test_swapped_shards_are_mended(good: Path, cache: Path) -> None:
    first, second, _ = sorted(cache.glob("llm/*/data/*"))
    aside = cache / "aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    assert repair(cache).remaining == ()
    assert_whole(cache, good)


def test_a_snapshot_that_cannot_be_read_is_written_again(cache: Path) -> None:
    before = tree(cache)
    path = next(cache.glob("snapshots/*/snapshot.json"))
    path.write_text(path.read_text().replace('"clips": 12', '"clips": 13'))
    assert {p.kind for p in verify_cache(LocalStorage(cache)).problems} == {"snapshot"}
    outcome = repair(cache)
    assert (outcome.ok, len(outcome.lost_snapshots)) == (True, 1)
    assert tree(cache) == before


def test_hidden_states_follow_answers_that_came_out_differently(cache: Path) -> None:
    (path, *_) = (p for p in data_files(cache, "answers", 0) if p.stat().st_size > 300)
    path.unlink()

    class Moody(FakeEncoders):
        """Says other things than last time, as a GPU of another kind may."""

        def build(self, feature: FeatureName) -> Any:
            self.salt = {"answers": "other words "} if feature == "answers" else {}
            try:
                return super().build(feature)
            finally:
                self.salt = {"answers": "other words "}

        def identity(self, feature: FeatureName, dependencies: Any) -> dict[str, Any]:
            self.salt = {}
            return super().identity(feature, dependencies)

    encoders = Moody()
    assert repair(cache, encoders).ok
    again = {feature: {key for name, key in encoders.encoded if name == feature} for feature in FEATURES}
    assert again["answers"]
    assert again["llm"] == again["answers"]
    assert not again["latents"] | again["t5"]


def test_records_made_from_another_text_are_found_and_mended(good: Path, cache: Path, toy_clips: Path) -> None:
    from mimir_shared.manifest import write_record

    folder = only(cache, "llm")
    record = folder.read_record(0, 0)
    samples = list(record.samples)
    samples[1] = samples[1].__class__(**{**samples[1].__dict__, "source_xxh3": 5})
    (cache / folder.record_path(0, 0)).write_bytes(write_record(record.metadata, samples))
    found = [(p.kind, p.feature, p.shard, p.row) for p in verify_cache(LocalStorage(cache)).problems]
    assert found == [("outdated", "llm", 0, 1)]
    encoders = FakeEncoders()
    assert repair(cache, encoders).ok
    assert encoders.encoded == [("llm", samples[1].key)]
    assert_whole(cache, good)


def test_samples_out_of_order_are_found(cache: Path) -> None:
    from dataclasses import replace

    from mimir_shared.manifest import write_record

    folder = only(cache, "answers")
    record = folder.read_record(0, 0)
    samples = list(record.samples)
    samples[1], samples[2] = (
        replace(samples[1], stored=samples[2].stored),
        replace(samples[2], stored=samples[1].stored),
    )
    (cache / folder.record_path(0, 0)).write_bytes(write_record(record.metadata, samples))
    assert ("order", 2) in {(p.kind, p.row) for p in verify_cache(LocalStorage(cache)).problems}
    assert repair(cache).ok


def test_other_models_are_refused_and_nothing_is_written(cache: Path) -> None:
    for path in data_files(cache, "t5", 0):
        path.write_bytes(path.read_bytes()[:-1])
    before = tree(cache)
    with pytest.raises(CacheError, match=r"model\.salt: '' → 'other'"):
        repair(cache, FakeEncoders(salt={"t5": "other"}))
    assert tree(cache) == before


def test_a_shard_whose_clips_are_gone_by_now_is_not_given_up_in_silence(toy_clips: Path, tmp_path: Path) -> None:
    clips, cache = Path(shutil.copytree(toy_clips, tmp_path / "clips")), tmp_path / "cache"
    encode(clips, cache, shard_size=12, features=("latents",))
    (path,) = data_files(cache, "latents")
    path.unlink()
    for video in clips.glob("*.mp4"):
        video.unlink()
    before = tree(cache)
    with pytest.raises(MachineError, match=r"12 of 12 clips.*broken mount"):
        repair(cache)
    assert tree(cache) == before


def test_twenty_random_wounds_at_once_are_mended(good: Path, tmp_path: Path) -> None:
    for seed in range(3):
        cache = Path(shutil.copytree(good, tmp_path / f"{seed}"))
        choose = random.Random(seed)
        files = [path for path in cache.glob("*/*/*/*") if "snapshots" not in path.parts]
        files = sorted(p for path in files for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())
        for path in choose.sample(files, 10):
            size = path.stat().st_size
            wound = choose.randrange(4)
            if wound == 0:
                path.unlink()
            elif wound == 1:
                path.write_bytes(path.read_bytes()[: choose.randrange(size)])
            else:
                for _ in range(wound):
                    flip(path, choose.randrange(size), choose.randrange(8))
        assert repair(cache).remaining == ()
        assert_whole(cache, good)


def test_a_record_that_is_gone_is_damage_where_a_snapshot_names_it(good: Path, cache: Path) -> None:
    next(cache.glob("answers/*/manifests/000001.0.parquet")).unlink()
    (problem,) = verify_cache(LocalStorage(cache)).problems
    assert (problem.kind, problem.feature, problem.shard) == ("record", "answers", 1)
    assert repair(cache).remaining == ()
    assert_whole(cache, good)


def test_a_repair_that_is_killed_goes_on(good: Path, cache: Path) -> None:
    for shard in (0, 1):
        for path in data_files(cache, "t5", shard):
            path.write_bytes(b"")

    class DiesAtTheSecondShard(FakeEncoders):
        def batch_size(self, feature: FeatureName) -> int:
            if len(self.encoded) > 5:
                raise MachineError("the power went")
            return super().batch_size(feature)

    repair(cache, DiesAtTheSecondShard())
    assert_whole(cache, good)


def test_the_command_says_what_it_did(
    cache: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands_remake, "open_encoders", lambda plan, options, features: FakeEncoders())
    assert call(capfd, "verify", cache, "--repair")[0] == 0
    for path in data_files(cache, "t5", 0):
        path.unlink()
    assert call(capfd, "verify", cache)[0] == 4
    code, out, err = call(capfd, "verify", cache, "--repair", "--device", "cpu")
    assert code == 0
    assert "missing t5/0" in err
    assert "0 are left; 1 shards made again as their next generation, 5 clips encoded, 0 copied" in out
    assert "older snapshots still name the damaged generation" in out
    code, out, _ = call(capfd, "verify", cache, "--json")
    assert (code, json.loads(out)["ok"]) == (0, True)
    snapshot = list_snapshots(LocalStorage(cache))[-1]
    assert read_index(LocalStorage(cache), snapshot).num_rows == 12
