"""The plan: shards that follow from keys alone, and changes that are appended."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimir_precompute.clips import columns as clip_columns
from mimir_precompute.clips.columns import ClipList
from mimir_precompute.config import Bucket
from mimir_precompute.planning import hash_order
from mimir_precompute.planning.plan import PlanReport, PlanRequest, update_plan
from mimir_shared import plan_file
from mimir_shared.errors import CacheError, InputError
from mimir_shared.plan_file import Plan, read_plan
from mimir_shared.storage.folder import LocalStorage

REQUEST = PlanRequest(preset="tiny", shard_size=4)


def _clips(captions: dict[str, str], root: str = "/clips", further: dict[str, list[object]] | None = None) -> ClipList:
    clips = ClipList(Path(root))
    for number, (key, caption) in enumerate(captions.items()):
        own = {name: values[number] for name, values in (further or {}).items()}
        clips.add(key=key, source=f"{key}.mp4", caption=caption, source_bytes=10, further=own)
    return clips


def _plan(storage: LocalStorage, captions: dict[str, str], request: PlanRequest = REQUEST) -> tuple[Plan, PlanReport]:
    existing = read_plan(storage) if storage.list("plan") else None
    plan, report = update_plan(storage, existing, _clips(captions), request)
    assert plan is not None
    return plan, report


def _rows(plan: Plan) -> dict[str, tuple[int, int]]:
    return {c.key: (c.shard, c.row) for shard in range(plan.num_shards) for c in plan.shard_clips(shard)}


@given(
    keys=st.sets(st.text(min_size=1, max_size=8), min_size=1, max_size=40),
    seed=st.integers(0, 2**32),
    shard_size=st.integers(1, 9),
)
def test_every_clip_stands_in_one_row_whatever_the_order_of_the_list(
    keys: set[str], seed: int, shard_size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    request = PlanRequest(preset="tiny", shard_size=shard_size, seed=seed)
    shuffled = sorted(keys)
    plans = []
    for _ in range(2):
        random.Random(seed).shuffle(shuffled)
        storage = LocalStorage(tmp_path_factory.mktemp("plan"))
        plan, _ = _plan(storage, {key: f"about {key}" for key in shuffled}, request)
        plans.append(storage.read("plan/0000.parquet"))
    assert plans[0] == plans[1]
    rows = _rows(plan)
    assert set(rows) == keys
    expected = [(n // shard_size, n % shard_size) for n in range(len(keys))]
    assert sorted(rows.values()) == expected


def test_shards_are_a_shuffle_of_the_list_that_follows_from_the_seed(tmp_path: Path) -> None:
    keys = {f"{n:04d}": "x" for n in range(1000)}
    first, _ = _plan(LocalStorage(tmp_path / "0"), keys, PlanRequest(preset="tiny", shard_size=100, seed=0))
    other, _ = _plan(LocalStorage(tmp_path / "1"), keys, PlanRequest(preset="tiny", shard_size=100, seed=1))
    shard = [int(clip.key) for clip in first.shard_clips(0)]
    assert [int(clip.key) for clip in other.shard_clips(0)] != shard
    assert sum(number < 500 for number in shard) in range(30, 71)


def test_planning_the_same_list_again_writes_nothing(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    _plan(storage, {"a": "1", "b": "2"})
    plan, report = _plan(storage, {"b": "2", "a": "1"})
    assert (report.new, report.changed, report.removed, report.unchanged, report.written) == (0, 0, 0, 2, False)
    assert len(plan.files) == 1


def test_new_changed_and_removed_clips_are_appended_and_the_newest_row_wins(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    before, _ = _plan(storage, {key: key for key in "abcdefg"})
    plan, report = _plan(storage, {**{key: key for key in "abcdf"}, "e": "changed", "h": "new"})
    assert (report.new, report.changed, report.removed, report.unchanged) == (1, 1, 1, 5)
    assert (report.new_shards, report.shards) == (1, 3)
    newest = plan.newest_rows()
    assert set(newest) == set("abcdefh")
    assert {key: newest[key] for key in "abcdf"} == {key: _rows(before)[key] for key in "abcdf"}
    assert newest["e"][0] == newest["h"][0] == 2
    superseded = {c.key for s in range(2) for c in plan.shard_clips(s) if plan.is_superseded(c)}
    assert superseded == {"e", "g"}
    (clip,) = [clip for clip in plan.shard_clips(2) if clip.key == "e"]
    assert [(older.caption, older.shard) for older in plan.older_rows(clip)] == [("e", _rows(before)["e"][0])]


def test_a_removed_clip_that_comes_back_gets_a_new_row(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for captions in ({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "2"}, {"a": "1", "b": "2", "c": "3"}):
        plan, report = _plan(storage, captions)
    assert report.new == 1
    assert plan.newest_rows()["c"][0] == 1


def test_clips_that_moved_as_a_whole_are_planned_without_a_new_row(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    _plan(storage, {"a": "1"})
    plan, report = update_plan(storage, read_plan(storage), _clips({"a": "1"}, "/elsewhere"), REQUEST)
    assert plan is not None
    assert report.written
    assert (report.new, report.changed, plan.num_shards) == (0, 0, 1)
    assert read_plan(storage).settings.source_root == "/elsewhere"


def test_the_list_of_another_data_set_is_not_taken_for_removals(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    _plan(storage, {key: key for key in "abcd"})
    with pytest.raises(InputError, match=r"3 of its 4 planned clips.*--accept-removals"):
        _plan(storage, {"a": "a", "z": "z"})
    _, report = _plan(storage, {"a": "a"}, PlanRequest(preset="tiny", accept_removals=True))
    assert report.removed == 3


def test_settings_that_contradict_the_plan_are_refused_by_name(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    _plan(storage, {"a": "1"})
    for request, message in (
        (PlanRequest(preset="cogvideox-5b"), "buckets.*49x480x720"),
        (PlanRequest(buckets=(Bucket.parse("17x64x96"),)), "17x64x96"),
        (PlanRequest(shard_size=5), "shard_size: 4 → 5"),
        (PlanRequest(seed=1), "seed: 0 → 1"),
        (PlanRequest(fps=16.0), "fps: 8.0 → 16.0"),
    ):
        with pytest.raises(CacheError, match=message):
            _plan(storage, {"a": "1"}, request)
    assert not _plan(storage, {"a": "1"}, PlanRequest())[1].written


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "cache")
    plan, report = update_plan(storage, None, _clips({"a": "1"}), REQUEST, dry_run=True)
    assert plan is None
    assert (report.new, report.shards, report.written) == (1, 1, False)
    assert not (tmp_path / "cache").exists()


def test_a_first_plan_needs_a_geometry(tmp_path: Path) -> None:
    for request, message in (
        (PlanRequest(), "--preset"),
        (PlanRequest(buckets=(Bucket.parse("9x64x96"),)), "--fps"),
        (PlanRequest(preset="huge"), "tiny, cogvideox-2b, cogvideox-5b"),
    ):
        with pytest.raises(InputError, match=message):
            _plan(LocalStorage(tmp_path), {"a": "1"}, request)


@pytest.mark.parametrize("text", ["10x64x96", "9x60x96", "9x64", "axbxc", "0x64x96", "9x-64x96"])
def test_buckets_that_the_models_cannot_take_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--bucket"):
        Bucket.parse(text)


def test_plan_files_of_two_caches_cannot_be_mixed(tmp_path: Path) -> None:
    one, two = LocalStorage(tmp_path / "1"), LocalStorage(tmp_path / "2")
    for storage in (one, two):
        _plan(storage, {"a": "1", "b": storage.root.name})
    _plan(one, {"a": "1", "b": "1", "c": "3"})
    two.create("plan/0001.parquet", one.read("plan/0001.parquet"))
    with pytest.raises(CacheError, match="mixed"):
        read_plan(two)
    one.path("plan/0000.parquet").unlink()
    with pytest.raises(CacheError, match="missing"):
        read_plan(one)


def test_the_users_columns_are_kept(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    clips = _clips({"a": "1", "b": "2"}, further={"score": [0.5, None], "mixed": [1, "x"], "row": [7, 8]})
    plan, _ = update_plan(storage, None, clips, REQUEST)
    assert plan is not None
    by_key = {row["key"]: row for row in plan.files[0].table.to_pylist()}
    assert (by_key["a"]["score"], by_key["b"]["score"]) == (0.5, None)
    assert (by_key["a"]["mixed"], by_key["b"]["mixed"]) == ("1", '"x"')
    assert by_key["a"]["user_row"] == 7


def test_pieces_of_any_size_give_the_same_plan_and_the_same_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {f"{n:03d}": f"about {n}" for n in range(200)}
    after = {key: caption + (" changed" if key < "020" else "") for key, caption in before.items() if key < "180"}
    further: dict[str, list[object]] = {
        "number": [n if n < 100 else n / 2 for n in range(200)],
        "mixed": [n if n < 150 else "x" for n in range(200)],
        "late": [None if n < 150 else {"b": n} if n % 2 else {"a": "x"} for n in range(200)],
    }
    plans = {}
    for pieces in ("small", "whole"):
        with monkeypatch.context() as patch:
            if pieces == "small":
                patch.setattr(clip_columns, "CHUNK_CLIPS", 7)
                patch.setattr(hash_order, "PART_CLIPS", 11)
            storage = LocalStorage(tmp_path / pieces)
            update_plan(storage, None, _clips(before, further=further), REQUEST)
            plan, report = update_plan(storage, read_plan(storage), _clips({**after, "new": "n"}), REQUEST)
        assert plan is not None
        assert (report.new, report.changed, report.removed, report.unchanged) == (1, 20, 20, 160)
        plans[pieces] = [storage.read(f"plan/{number:04d}.parquet") for number in range(2)]
    assert plans["small"] == plans["whole"]
    columns = plan.files[0].table.to_pydict()
    by_key = dict(
        zip(columns["key"], zip(columns["number"], columns["mixed"], columns["late"], strict=True), strict=True)
    )
    assert by_key["001"] == (1.0, "1", None)
    assert by_key["151"] == (75.5, '"x"', {"a": None, "b": 151})


def test_a_plan_of_many_groups_is_read_by_the_rows_that_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_file, "GROUP_ROWS", 10)
    monkeypatch.setattr(plan_file, "_MAPPED_BYTES", 1)
    captions = {f"{n:03d}": f"about {n}" for n in range(105)}
    storage = LocalStorage(tmp_path)
    _plan(storage, captions)
    plan = read_plan(storage)
    assert plan.files[0]._file.num_row_groups == 11
    # shards of 4 cross the borders of groups of 10
    assert sorted(clip.key for shard in reversed(range(27)) for clip in plan.shard_clips(shard)) == sorted(captions)
    assert [plan.file_of(shard).num_clips(shard) for shard in (0, 25, 26)] == [4, 4, 1]
    plan, _ = _plan(storage, {**captions, "007": "changed"})
    assert plan.num_current == len(plan.newest_rows()) == 105
    (changed,) = plan.shard_clips(27)
    assert [older.caption for older in plan.older_rows(changed)] == ["about 7"]
    assert plan.files[0].find("nobody") is None
