"""Lists of clips in every form, and one clear error for a list that cannot be used."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mimir_precompute.clips.clip_list import read_clip_list
from mimir_shared.errors import InputError


def _videos(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def _jsonl(folder: Path, *lines: object) -> Path:
    path = folder / "metadata.jsonl"
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def test_jsonl_csv_and_parquet_give_the_same_clips(tmp_path: Path) -> None:
    _videos(tmp_path, "a.mp4", "sub/b.mp4")
    rows = [{"file_name": "a.mp4", "text": "A é", "score": 1}, {"file_name": "sub/b.mp4", "text": 'B, "b"', "score": 2}]
    _jsonl(tmp_path, *rows)
    (tmp_path / "list.csv").write_text('file_name,text,score\na.mp4,A é,1\nsub/b.mp4,"B, ""b""",2\n', encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
    for name in ("metadata.jsonl", "list.csv", "list.parquet"):
        clips = read_clip_list(str(tmp_path / name))
        assert clips.column("key") == clips.column("source") == ["a.mp4", "sub/b.mp4"]
        assert clips.column("caption") == ["A é", 'B, "b"']
        assert clips.column("source_bytes") == [5, 9]
        assert [int(score) for score in clips.column("score")] == [1, 2]


def test_a_folder_takes_its_metadata_or_a_text_beside_each_video(tmp_path: Path) -> None:
    _videos(tmp_path, "a.mp4", "deep/b.mov", "c.png")
    for name in ("a", "deep/b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"{name} caption\n")
    beside = read_clip_list(str(tmp_path))
    assert beside.column("source") == ["a.mp4", "c.png", "deep/b.mov"]
    assert beside.column("caption") == ["a caption", "c caption", "deep/b caption"]
    _jsonl(tmp_path, {"file_name": "a.mp4", "text": "from the list"})
    assert read_clip_list(str(tmp_path)).column("caption") == ["from the list"]


def test_tars_of_webdataset_give_members_with_their_places(tmp_path: Path) -> None:
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for name, data in ((f"k{number}.mp4", b"video%d" % number), (f"k{number}.json", b'{"caption": "c"}')):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    for location in (str(tmp_path), str(tmp_path / "*.tar")):
        clips = read_clip_list(location)
        assert clips.column("key") == ["k0", "k1"]
        assert clips.column("source") == ["0.tar::k0.mp4", "1.tar::k1.mp4"]
        offset, size = clips.column("source_offset")[1], clips.column("source_bytes")[1]
        assert offset is not None
        assert size is not None
        assert (tmp_path / "1.tar").read_bytes()[offset : offset + size] == b"video1"


def test_parts_of_one_video_are_clips_of_their_own(tmp_path: Path) -> None:
    _videos(tmp_path, "a.mp4")
    _jsonl(
        tmp_path,
        {"file_name": "a.mp4", "text": "x", "start_s": 0, "end_s": 2.5},
        {"file_name": "a.mp4", "text": "y", "start_s": 2.5},
    )
    clips = read_clip_list(str(tmp_path))
    assert clips.column("key") == ["a.mp4#0-2.5", "a.mp4#2.5-"]
    assert clips.column("start_s") == [0.0, 2.5]


def test_a_key_column_names_the_clips_and_other_columns_are_found_by_name(tmp_path: Path) -> None:
    _videos(tmp_path, "a.mp4")
    _jsonl(tmp_path, {"id": 17, "video": "a.mp4", "prompt": "x"})
    clips = read_clip_list(str(tmp_path), video_key="video", caption_key="prompt")
    assert clips.column("key") == ["17"]


def test_limit_takes_the_first_clips(tmp_path: Path) -> None:
    _videos(tmp_path, *(f"{n}.mp4" for n in range(5)))
    _jsonl(tmp_path, *({"file_name": f"{n}.mp4", "text": "x"} for n in range(5)))
    assert read_clip_list(str(tmp_path), limit=2).column("key") == ["0.mp4", "1.mp4"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"file_name": "a.mp4"}, "line 2: no 'text' .has file_name; see --caption-key"),
        ({"file_name": "a.mp4", "text": None}, "line 2: no caption"),
        ({"file_name": "a.mp4", "text": " \t"}, "line 2: empty caption"),
        ({"file_name": "a.mp4", "text": 5}, "line 2: the caption is int"),
        ({"text": "x"}, "line 2: no 'file_name'"),
        (b'{"file_name": "a.mp4", "text": "caf\xe9"}', "line 2: not UTF-8 .byte 0xe9"),
        (b'{"file_name": "a.mp4", "text": "\\ud800"}', "line 2: caption not UTF-8"),
        (b"{", "line 2: not JSON"),
        (b"[1]", "line 2: list, expected an object"),
        ({"file_name": "a.mp4", "text": "x", "start_s": "soon"}, "line 2: could not convert"),
        ({"file_name": "a.mp4", "text": "x", "start_s": -1}, "line 2: start_s is -1"),
        ({"file_name": "a.mp4", "text": "x", "start_s": 2, "end_s": 1}, "line 2: end_s 1.0 is not after"),
        ({"file_name": "a.mp4", "text": "x", "start_s": [1]}, "line 2: start_s is .1., expected seconds"),
        ({"file_name": "http://host/a.mp4", "text": "x"}, "line 2: .*addresses are not read"),
        ({"file_name": "first.mp4", "text": "x"}, "duplicate key 'first.mp4' .2 times"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: object, message: str) -> None:
    _videos(tmp_path, "a.mp4", "first.mp4")
    _jsonl(tmp_path, {"file_name": "first.mp4", "text": "fine"}, line)
    with pytest.raises(InputError, match=message) as caught:
        read_clip_list(str(tmp_path))
    assert "1 problem" in str(caught.value)


def test_all_problems_are_told_at_once_up_to_ten(tmp_path: Path) -> None:
    _videos(tmp_path, "a.mp4")
    _jsonl(tmp_path, *({"file_name": "a.mp4", "text": ""} for _ in range(13)))
    with pytest.raises(InputError, match=r"13 problems.*line 10:.*and 3 more"):
        read_clip_list(str(tmp_path))


def test_captions_in_other_encodings_are_told_for_csv_and_text_files(tmp_path: Path) -> None:
    _videos(tmp_path, "a.mp4")
    (tmp_path / "list.csv").write_bytes(b"file_name,text\na.mp4,caf\xe9\n")
    with pytest.raises(InputError, match="line 2: not UTF-8"):
        read_clip_list(str(tmp_path / "list.csv"))
    (tmp_path / "list.csv").unlink()
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"a\.txt: not UTF-8"):
        read_clip_list(str(tmp_path))


def test_places_without_clips_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        read_clip_list(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no clip found"):
        read_clip_list(str(tmp_path))
    (tmp_path / "list.xlsx").write_text("x")
    with pytest.raises(InputError, match=r"expected \.jsonl, \.csv or \.parquet"):
        read_clip_list(str(tmp_path / "list.xlsx"))
    _videos(tmp_path, "lonely.mp4")
    with pytest.raises(InputError, match=r"lonely\.mp4: no caption beside it"):
        read_clip_list(str(tmp_path))


def test_a_list_of_which_no_file_exists_is_taken_for_a_wrong_folder(tmp_path: Path) -> None:
    _jsonl(tmp_path, {"file_name": "a.mp4", "text": "x"}, {"file_name": "b.mp4", "text": "x"})
    with pytest.raises(InputError, match="none of the 2 files"):
        read_clip_list(str(tmp_path))
    _videos(tmp_path, "a.mp4")
    assert read_clip_list(str(tmp_path)).column("source_bytes") == [5, None]
