"""Clips in a bucket: listed by a metadata file, streamed clip by clip, encoded as those in a folder are."""

import json
import os
from pathlib import Path

import pytest

from mimir_precompute.clips.clip_list import read_clip_list
from mimir_precompute.clips.columns import LISTED, ClipList
from mimir_precompute.clips.fetch import ClipFetcher
from mimir_precompute.clips.rejection import ClipRejected
from mimir_shared.errors import InputError, MachineError
from mimir_shared.plan_file import read_plan
from mimir_shared.storage.bucket import ObjectStorage
from mimir_shared.storage.folder import LocalStorage
from tests.buckets import QUICK, SECRET, upload
from tests.fake_encoders import tree
from tests.precompute.test_pipeline import encode


@pytest.fixture
def clips_url(bucket: str, toy_clips: Path) -> str:
    url = f"s3://{bucket}/some/clips"
    upload(toy_clips, ObjectStorage(url, limits=QUICK))
    return url


def facts(clips: ClipList) -> list[object]:
    return [clips.column(name) for name in LISTED]


def test_clips_in_a_bucket_are_listed_as_those_in_a_folder(clips_url: str, toy_clips: Path) -> None:
    expected = read_clip_list(str(toy_clips))
    for location in (clips_url, f"{clips_url}/", f"{clips_url}/metadata.jsonl"):
        found = read_clip_list(location)
        assert facts(found) == facts(expected)
        assert found.root == clips_url


def test_a_list_on_this_machine_may_name_clips_in_buckets(clips_url: str, toy_clips: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (toy_clips / "metadata.jsonl").read_text().splitlines()]
    names = [row["file_name"] for row in rows]
    lines = [json.dumps(row | {"file_name": f"{clips_url}/{name}"}) for row, name in zip(rows, names, strict=True)]
    (tmp_path / "clips.jsonl").write_text("\n".join(lines))
    found = read_clip_list(str(tmp_path / "clips.jsonl"))
    assert found.column("source") == [f"{clips_url}/{name}" for name in names]
    assert found.column("source_bytes") == [(toy_clips / name).stat().st_size for name in names]


def test_latents_of_clips_in_a_bucket_have_the_bytes_of_those_in_a_folder(
    clips_url: str, toy_clips: Path, tmp_path: Path
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    encode(clips_url, tmp_path / "of_bucket", features=("latents",))
    encode(toy_clips, tmp_path / "of_folder", features=("latents",))
    made, expected = (
        {name: data for name, data in tree(tmp_path / cache).items() if "/data/" in name}
        for cache in ("of_bucket", "of_folder")
    )
    assert made == expected
    assert len(os.listdir("/proc/self/fd")) <= before + 8  # nothing of the clips is kept open
    assert read_plan(LocalStorage(tmp_path / "of_bucket")).settings.source_root == clips_url


def test_a_clip_that_is_gone_is_rejected_and_a_bucket_that_is_gone_stops_the_run(
    clips_url: str, tmp_path: Path, toy_clips: Path
) -> None:
    encode(clips_url, tmp_path / "cache", features=("t5",))
    clip = read_plan(LocalStorage(tmp_path / "cache")).shard_clips(0)[0]
    with ClipFetcher(clips_url).fetch(clip) as path:
        assert isinstance(path, Path)
        assert path.read_bytes() == (toy_clips / clip.source).read_bytes()
    ObjectStorage(clips_url, limits=QUICK).remove(clip.source)
    with pytest.raises(ClipRejected, match="no such object"), ClipFetcher(clips_url).fetch(clip):
        pass
    with pytest.raises(MachineError, match=r"s3://no-such-bucket/x/.*NoSuchBucket"):
        ClipFetcher("s3://no-such-bucket/x").fetch(clip).__enter__()


def test_a_prefix_without_a_list_and_an_address_with_a_secret_are_refused(clips_url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"0 metadata files below it, expected one of metadata\.jsonl"):
        read_clip_list(f"{clips_url}/deeper")
    with pytest.raises(InputError, match="no such object"):
        read_clip_list(f"{clips_url}/other.jsonl")
    row = {"file_name": f"s3://user:{SECRET}@bucket/a.mp4", "text": "x"}
    (tmp_path / "clips.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match="addresses are not read") as refused:
        read_clip_list(str(tmp_path / "clips.jsonl"))
    assert SECRET not in str(refused.value)
