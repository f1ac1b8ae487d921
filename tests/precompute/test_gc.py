"""What gc removes, and what it must not touch."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mimir_precompute.gc import collect_garbage
from mimir_precompute.inspection.verify import verify_cache
from mimir_precompute.workers.lease import Leases
from mimir_shared import failpoints
from mimir_shared.errors import CacheError
from mimir_shared.feature_folder import FeatureFolder, find_features
from mimir_shared.features import FeatureName
from mimir_shared.layout import lease_name, second_lease_name
from mimir_shared.manifest import write_record
from mimir_shared.storage.bucket import ObjectStorage
from mimir_shared.storage.folder import LocalStorage
from mimir_shared.storage.protocol import Storage
from tests.buckets import QUICK, backdate, upload
from tests.conftest import REPOSITORY
from tests.programs import run

LONG_AGO_S = 10_000


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """The example cache, two shards and a snapshot, of long ago."""
    example = REPOSITORY / "manifests" / "tiny"
    storage: Storage = LocalStorage(Path(shutil.copytree(example, tmp_path / "cache")))
    if request.param == "bucket":
        storage = ObjectStorage(f"s3://{request.getfixturevalue('bucket')}/cache", limits=QUICK)
        upload(example, storage)
    make_old(storage)
    return storage


def make_old(storage: Storage) -> None:
    for file in storage.files(""):
        if isinstance(storage, ObjectStorage):
            backdate(storage, file.name, LONG_AGO_S)
        elif isinstance(storage, LocalStorage):
            os.utime(storage.path(file.name), (file.modified_s - LONG_AGO_S, file.modified_s - LONG_AGO_S))


def contents(storage: Storage) -> dict[str, bytes]:
    return {file.name: storage.read(file.name) for file in storage.files("")}


def removed(storage: Storage, **options: Any) -> list[str]:
    return [f"{garbage.kind} {garbage.name}" for garbage in collect_garbage(storage, **options).removed]


def supersede(folder: FeatureFolder, shard: int) -> None:
    """Commit generation 1 of a shard, with a data file of its own."""
    record = folder.read_record(shard, 0)
    files = []
    for file in record.metadata.files:
        path = file.path.replace(".tar", "-again.tar")
        folder.storage.create(f"{folder.directory}/{path}", folder.storage.read(f"{folder.directory}/{file.path}"))
        files.append(file.model_copy(update={"path": path}))
    metadata = record.metadata.model_copy(update={"generation": 1, "files": tuple(files)})
    folder.storage.create(folder.record_path(shard, 1), write_record(metadata, record.samples))


def test_a_cache_without_garbage_stays_as_it_is(storage: Storage) -> None:
    before = contents(storage)
    assert removed(storage, grace_s=0) == []
    assert contents(storage) == before


def test_records_are_looked_at_one_by_one_no_oftener_for_more_garbage(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = find_features(storage)[1]
    looked: list[str] = []
    files = type(storage).files
    monkeypatch.setattr(type(storage), "files", lambda self, where: looked.append(where) or files(self, where))
    counts = []
    for orphans in (1, 4):
        for number in range(orphans):
            storage.create(f"{folder.directory}/data/000001-{number:08x}.tar", b"of a worker that was killed")
        looked.clear()
        assert len(collect_garbage(storage, grace_s=-60).removed) == orphans
        counts.append(looked.count(f"{folder.directory}/manifests"))
    assert counts == [1, 1]


def test_data_that_no_record_names_go_when_they_are_old(storage: Storage) -> None:
    before = contents(storage)
    folder = find_features(storage)[1]
    orphans = [f"{folder.directory}/data/000001-{8 * 'a'}.tar", f"{folder.directory}/data/000000-{8 * 'b'}.zarr/q/c/0"]
    for name in orphans:
        storage.create(name, b"of a worker that was killed")
    assert removed(storage) == []
    make_old(storage)
    assert removed(storage, dry_run=True) == [f"data {name}" for name in sorted(orphans)]
    assert len(contents(storage)) == len(before) + 2
    report = collect_garbage(storage)
    assert report.bytes == 2 * len(b"of a worker that was killed")
    assert contents(storage) == before
    assert f"000000-{8 * 'b'}.zarr" not in storage.list(f"{folder.directory}/data")


def test_a_file_that_is_not_named_as_data_are_is_left_alone(storage: Storage) -> None:
    name = f"{find_features(storage)[0].directory}/data/notes.txt"
    storage.create(name, b"mine")
    make_old(storage)
    assert removed(storage) == []


@pytest.mark.parametrize("storage", ["folder"], indirect=True)
def test_data_whose_temporary_file_is_still_there_stay_however_old(storage: Storage) -> None:
    name = f"{find_features(storage)[1].directory}/data/000001-{8 * 'a'}.tar"
    with storage.temporary() as temporary:
        temporary.file.write(b"committing")
        storage.publish_content(temporary, name, "")
        make_old(storage)
        assert removed(storage) == []
    make_old(storage)
    assert removed(storage) == [f"data {name}"]


@pytest.mark.parametrize("named", [lease_name, second_lease_name])
def test_data_of_a_shard_that_a_living_worker_has_leased_stay(
    storage: Storage, named: Callable[[FeatureName, str, int], str]
) -> None:
    folder = find_features(storage)[1]
    name = f"{folder.directory}/data/000001-{8 * 'a'}.tar"
    storage.create(name, b"to be named soon")
    make_old(storage)
    with Leases(storage.lease_store()) as leases:
        assert leases.take(named(folder.feature, folder.fingerprint, 1))
        assert removed(storage) == []
    assert removed(storage) == [f"data {name}"]


def test_data_that_are_named_while_gc_is_at_work_are_put_back(storage: Storage) -> None:
    storage.remove_tree("snapshots")
    before = contents(storage)
    folder = find_features(storage)[1]
    record = folder.record_path(1, 0)
    data = storage.read(record)
    storage.remove(record)

    def commit(point: str) -> None:
        if point == "gc.set_aside":
            failpoints.arm(None)
            storage.create(record, data)

    failpoints.arm(commit)
    try:
        assert removed(storage, grace_s=0) == []
    finally:
        failpoints.arm(None)
    assert contents(storage) == before


def test_a_superseded_generation_that_no_snapshot_names_goes_with_its_data(storage: Storage) -> None:
    folder = find_features(storage)[1]
    (old,) = folder.read_record(1, 0).metadata.files
    supersede(folder, 1)
    make_old(storage)
    assert removed(storage) == []  # the snapshot names it
    storage.remove_tree("snapshots")
    expected = [f"record {folder.record_path(1, 0)}", f"data {folder.directory}/{old.path}"]
    assert removed(storage) == expected
    assert folder.generations() == {0: 0, 1: 1}
    assert verify_cache(storage).problems == []


def test_a_generation_whose_successor_is_young_damaged_or_lacks_its_data_stays(storage: Storage) -> None:
    folder = find_features(storage)[1]
    supersede(folder, 1)
    storage.remove_tree("snapshots")
    assert removed(storage) == []
    make_old(storage)
    record = folder.record_path(1, 1)
    whole = storage.read(record)
    storage.overwrite(record, whole[:-1])
    make_old(storage)
    assert removed(storage) == []
    storage.overwrite(record, whole)
    make_old(storage)
    (data,) = folder.read_record(1, 1).metadata.files
    storage.remove(f"{folder.directory}/{data.path}")
    assert removed(storage) == []


def test_where_a_snapshot_is_damaged_nothing_is_removed(storage: Storage) -> None:
    name = f"{find_features(storage)[1].directory}/data/000001-{8 * 'a'}.tar"
    storage.create(name, b"orphan")
    make_old(storage)
    (snapshot,) = (file.name for file in storage.files("snapshots") if file.name.endswith("/snapshot.json"))
    storage.overwrite(snapshot, storage.read(snapshot)[:-10])
    with pytest.raises(CacheError, match=r"snapshot\.json"):
        collect_garbage(storage)
    assert storage.exists(name)


def test_stale_leases_abandoned_temporaries_and_unfinished_snapshots_go(storage: Storage) -> None:
    before = contents(storage)
    storage.create("leases/t5/0123456789ab/000007", json.dumps({"host": "x", "domain": "y", "pid": 1}).encode())
    storage.create(f"snapshots/{12 * '0'}/index.arrow", b"no snapshot.json came after it")
    storage.overwrite("tmp/otherhost-77-abc", b"half")
    assert removed(storage) == []
    make_old(storage)
    assert [line.split()[0] for line in removed(storage)] == ["lease", "temporary", "snapshot"]
    assert contents(storage) == before


def test_the_command_prints_what_and_bytes_and_refuses_what_is_no_cache(storage: Storage, tmp_path: Path) -> None:
    name = f"{find_features(storage)[1].directory}/data/000001-{8 * 'a'}.tar"
    storage.create(name, b"12345")
    make_old(storage)
    shown = run("mimir-precompute", "gc", storage.root, "--dry-run", "--json")
    assert json.loads(shown.out) == {
        "dry_run": True,
        "bytes": 5,
        "removed": [{"kind": "data", "name": name, "bytes": 5}],
    }
    done = run("mimir-precompute", "gc", storage.root)
    assert (done.code, "removed 1 files, 5 bytes" in done.out) == (0, True), done
    assert not storage.exists(name)
    assert run("mimir-precompute", "gc", tmp_path).code == 2
