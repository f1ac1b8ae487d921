"""A converted cache holds what the cache holds, is itself a cache, and goes on where it was stopped."""

import json
import shutil
from pathlib import Path

import pytest
import webdataset
from safetensors import deserialize

from mimir_precompute.cli.convert_command import run_convert, run_merge
from mimir_precompute.conversion.convert import ConvertOutcome, convert_cache
from mimir_precompute.conversion.merge import MergeOutcome
from mimir_precompute.inspection.diff import compare_caches
from mimir_precompute.inspection.verify import verify_cache
from mimir_precompute.workers.progress import Progress
from mimir_shared.errors import CacheError, InputError
from mimir_shared.feature_folder import find_features
from mimir_shared.manifest import CacheFormat
from mimir_shared.snapshot_reader import open_snapshot
from mimir_shared.storage.folder import LocalStorage
from tests.fake_encoders import FakeEncoders, tree
from tests.precompute.cli.test_cli import call
from tests.precompute.test_pipeline import captions_of, encode, write_captions

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def cache(toy_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips in three shards, one clip quarantined in two features."""
    root = tmp_path_factory.mktemp("convert") / "cache"
    poison = {sorted(captions_of(toy_clips))[4]: "nan"}
    encode(toy_clips, root, FakeEncoders(poison=poison), max_quarantined=1.0)
    return root


def convert(cache: Path, out: Path, data_format: CacheFormat = "zarr") -> ConvertOutcome:
    return run_convert(str(cache), str(out), data_format, QUIET)


def merge(cache: Path, out: Path) -> MergeOutcome:
    return run_merge(str(cache), str(out), (), QUIET)


def assert_same_samples(a: Path, b: Path) -> None:
    difference = compare_caches(LocalStorage(a), LocalStorage(b), {}, {})
    assert difference.is_equal
    assert not any(feature.fields for feature in difference.features.values())


def test_a_zarr_copy_verifies_and_holds_the_same_and_back_again_gives_the_first_cache(
    cache: Path, tmp_path: Path
) -> None:
    outcome = convert(cache, tmp_path / "zarr")
    assert (outcome.shards, outcome.shards_done_before, outcome.unfinished) == (12, 0, {})
    assert outcome.snapshot is not None
    assert outcome.snapshot.clips == 11
    assert verify_cache(LocalStorage(tmp_path / "zarr")).problems == []
    assert_same_samples(cache, tmp_path / "zarr")
    convert(tmp_path / "zarr", tmp_path / "back", "webdataset")
    assert tree(tmp_path / "back") == tree(cache)


def test_what_became_of_every_clip_is_kept_and_identities_too(cache: Path, tmp_path: Path) -> None:
    convert(cache, tmp_path)
    for before, after in zip(find_features(LocalStorage(cache)), find_features(LocalStorage(tmp_path)), strict=True):
        assert before.read_spec().model_dump(exclude={"format"}) == after.read_spec().model_dump(exclude={"format"})
        assert after.read_spec().format == "zarr"
        for shard in range(3):
            old, new = before.read_record(shard, 0), after.read_record(shard, 0)
            assert old.metadata.model_dump(exclude={"format", "files"}) == new.metadata.model_dump(
                exclude={"format", "files"}
            )
            for one, other in zip(old.samples, new.samples, strict=True):
                assert (one.status, one.reason, one.detail, one.attempt) == (
                    other.status, other.reason, other.detail, other.attempt,
                )  # fmt: skip


def test_a_second_call_writes_nothing(cache: Path, tmp_path: Path) -> None:
    convert(cache, tmp_path)
    before = tree(tmp_path, leave_out=())
    outcome = convert(cache, tmp_path)
    assert (outcome.shards, outcome.shards_done_before, outcome.nbytes) == (0, 12, 0)
    assert tree(tmp_path, leave_out=()) == before


def test_it_goes_on_where_it_was_stopped(cache: Path, tmp_path: Path) -> None:
    convert(cache, tmp_path / "whole")
    convert(cache, tmp_path / "stopped")
    for name in ("t5/*/manifests/000001.0.parquet", "llm/*/manifests/*", "llm/*/data/000002*/zarr.json", "snapshots/*"):
        for path in (tmp_path / "stopped").glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert convert(cache, tmp_path / "stopped").shards == 4
    assert tree(tmp_path / "stopped") == tree(tmp_path / "whole")


def test_what_the_source_has_encoded_since_is_taken_over(toy_clips: Path, tmp_path: Path) -> None:
    encode(toy_clips, tmp_path / "a", shards=(0, 2))
    outcome = convert(tmp_path / "a", tmp_path / "b")
    assert (outcome.shards, list(outcome.unfinished.values()), outcome.snapshot) == (8, [1, 1, 1, 1], None)
    encode(None, tmp_path / "a")
    outcome = convert(tmp_path / "a", tmp_path / "b")
    assert (outcome.shards, outcome.shards_done_before, outcome.unfinished) == (4, 8, {})
    assert outcome.snapshot is not None
    clips = Path(shutil.copytree(toy_clips, tmp_path / "clips"))
    write_captions(clips, {name: f"{text} !" for name, text in captions_of(clips).items()})
    encode(clips, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b")
    assert_same_samples(tmp_path / "a", tmp_path / "b")
    assert verify_cache(LocalStorage(tmp_path / "b")).problems == []


def test_a_newer_generation_of_the_source_becomes_one_of_the_copy(toy_clips: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from mimir_shared.manifest import write_record

    encode(toy_clips, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b")
    folder = next(folder for folder in find_features(LocalStorage(tmp_path / "a")) if folder.feature == "t5")
    record = folder.read_record(1, 0)
    lost = replace(record.samples[2], status="quarantined", stage="encode", reason="nonfinite", stored=None)
    samples = [*record.samples[:2], lost, *record.samples[3:]]
    metadata = record.metadata.model_copy(
        update={"generation": 1, "ok": record.metadata.ok - 1, "quarantined": 1}
    )  # fmt: skip
    folder.storage.create(folder.record_path(1, 1), write_record(metadata, samples))
    assert convert(tmp_path / "a", tmp_path / "b").shards == 1
    copy = next(folder for folder in find_features(LocalStorage(tmp_path / "b")) if folder.feature == "t5")
    assert copy.generations() == {0: 0, 1: 1, 2: 0}
    assert copy.read_record(1, 1).samples[2] == lost
    assert verify_cache(LocalStorage(tmp_path / "b")).problems == []


def test_a_damaged_sample_is_not_copied(cache: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(cache, tmp_path / "damaged"))
    path = next(damaged.glob("latents/*/data/000001-*.tar"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match=r"000001-.*tar: the tensors of sample .* do not match the hash"):
        convert(damaged, tmp_path / "out")
    assert not list((tmp_path / "out").glob("latents/*/manifests/000001*"))


def test_a_folder_that_holds_something_else_is_refused(cache: Path, toy_clips: Path, tmp_path: Path) -> None:
    convert(cache, tmp_path / "zarr")
    with pytest.raises(CacheError, match=r"begun in format 'zarr' → 'webdataset' now; go on with --format zarr"):
        convert(cache, tmp_path / "zarr", "webdataset")
    encode(toy_clips, tmp_path / "other", shard_size=4)
    with pytest.raises(CacheError, match=r"plan/0000.parquet: differs.*another cache: give an empty folder"):
        convert(cache, tmp_path / "other")
    with pytest.raises(InputError, match=r"--out .*: is the cache itself"):
        convert(cache, cache)
    with pytest.raises(InputError, match=r"no such folder"):
        convert_cache(LocalStorage(tmp_path / "none"), LocalStorage(tmp_path / "new"), "zarr", QUIET)


def test_a_merged_tar_has_all_features_of_a_clip_in_one_sample(cache: Path, tmp_path: Path) -> None:
    outcome = merge(cache, tmp_path)
    assert (outcome.tars, outcome.clips) == (3, 11)
    reader = open_snapshot(str(cache))
    tars = sorted(map(str, tmp_path.glob("*.tar")))
    found = []
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        document = json.loads(sample["json"])
        found.append(document["key"])
        names = [name for name in sample if name.endswith(".safetensors")]
        assert names == ["latents.safetensors", "t5.safetensors", "llm.safetensors"]
        stored = {name: bytes(entry["data"]) for part in names for name, entry in deserialize(sample[part])}
        assert stored == {name: t.array.tobytes() for name, t in reader.sample(document["key"]).items()}
        assert document["bucket"] == reader.clip(reader.number_of(document["key"])).bucket
        assert document["valid_rows"].keys() == {"t5_embeds"}
        assert document["answers"]["variants"] == reader.document(document["key"], "answers")["variants"]
    assert found == list(reader)


def test_merging_goes_on_where_it_was_stopped_and_refuses_another_snapshot(
    cache: Path, toy_clips: Path, tmp_path: Path
) -> None:
    merge(cache, tmp_path / "out")
    whole = tree(tmp_path / "out")
    next((tmp_path / "out").glob("000001-*.tar")).unlink()
    outcome = merge(cache, tmp_path / "out")
    assert (outcome.tars, outcome.tars_done_before) == (1, 2)
    assert tree(tmp_path / "out") == whole
    encode(toy_clips, tmp_path / "other")
    with pytest.raises(InputError, match=r"merged.json: another snapshot was merged here.*empty folder as --out"):
        merge(tmp_path / "other", tmp_path / "out")


def test_merging_a_zarr_cache_gives_the_same_tensors(cache: Path, tmp_path: Path) -> None:
    convert(cache, tmp_path / "zarr")
    merge(cache, tmp_path / "a")
    merge(tmp_path / "zarr", tmp_path / "b")
    tars = {name: data for name, data in tree(tmp_path / "a").items() if name.endswith(".tar")}
    assert tars == {name: data for name, data in tree(tmp_path / "b").items() if name.endswith(".tar")}


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ((), 2, "give --format webdataset or --format zarr for a cache, or --merge for an export"),
        (("--format", "zarr", "--merge"), 2, "give --format webdataset or --format zarr"),
        (("--format", "hdf5"), 2, "--format 'hdf5': expected one of webdataset, zarr"),
        (("--format", "zarr", "--feature", "t5=12"), 2, "--feature: goes with --merge"),
        (("--merge", "--feature", "t5"), 2, "--feature 't5': expected NAME=FINGERPRINT"),
        (("--format", "zarr"), 0, "12 shards written as zarr"),
        (("--merge",), 0, "3 tars written"),
    ],
)
def test_the_command_says_what_it_did_or_what_it_wants(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], options: tuple[str, ...], code: int, said: str
) -> None:
    found, out, err = call(capfd, "convert", cache, "--out", tmp_path / "out", *options)
    assert found == code, err
    assert said in (err if code else out)
