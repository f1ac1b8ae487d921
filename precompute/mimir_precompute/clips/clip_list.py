"""The user's clips and captions, from every form in which they may come. Nothing is decoded here."""

import glob
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mimir_precompute.clips.columns import ClipList
from mimir_precompute.clips.fetch import ClipFetcher, is_in_bucket
from mimir_precompute.clips.metadata_file import ROWS
from mimir_precompute.clips.row import Problems, caption_problem, extra_problem, name_problem, seconds_of, text_problem
from mimir_shared.errors import InputError
from mimir_shared.plain_documents import parse_json
from mimir_shared.redaction import hide_address_secrets, holds_address_secret

VIDEO_ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".ts", ".gif")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_MAX_TEXT_BYTES = 2**24
"""Of a caption or a JSON document in a tar."""
_ROWS_AT_ONCE = 1024
_KEY_COLUMNS = ("key", "id")


def read_clip_list(
    location: str, *, video_key: str = "file_name", caption_key: str = "text", limit: int | None = None
) -> ClipList:
    """List the clips at `location`.

    Args:
        location: a JSONL, CSV or Parquet file; a folder with metadata.jsonl, .csv or .parquet, or with a
            .txt beside each video; WebDataset tars: one file, a folder of them, or a glob pattern. In a bucket
            (s3://, gs://, az://): a metadata file, or the prefix that it lies under.
        limit: take the first so many.
    Raises: InputError that lists duplicate keys, missing captions, bad encodings and unreadable lines.
    """
    if is_in_bucket(location):
        clips = _read_bucket_list(location.rstrip("/"), video_key, caption_key, limit)
        return _checked(clips, location)
    path = Path(location)
    tars = sorted(glob.glob(location)) if location.endswith(".tar") else []
    if path.is_dir():
        metadata = [path / name for name in METADATA_NAMES if (path / name).is_file()]
        if len(metadata) > 1:
            raise InputError(
                f"{path}: {len(metadata)} metadata files, expected one; name the file instead of the folder"
            )
        tars = [] if metadata else sorted(str(entry) for entry in path.glob("*.tar"))
        if metadata:
            clips = _read_table(metadata[0], video_key, caption_key, limit)
        elif tars:
            clips = _read_tars(tars, limit)
        else:
            clips = _read_folder(path, limit)
    elif tars:
        clips = _read_tars(tars, limit)
    elif path.is_file():
        clips = _read_table(path, video_key, caption_key, limit)
    else:
        raise InputError(f"{location}: no such file or folder; expected clips as a metadata file, a folder or tars")
    return _checked(clips, location)


def _read_bucket_list(location: str, video_key: str, caption_key: str, limit: int | None) -> ClipList:
    """A metadata file in a bucket, or below an address of it."""
    url, root = location, location.rpartition("/")[0]
    fetcher = ClipFetcher(root)
    if Path(location).suffix.lower() not in ROWS:
        found = [name for name in fetcher.names(location) if name in METADATA_NAMES]
        if len(found) != 1:
            raise InputError(
                f"{location}: {len(found)} metadata files below it, expected one of {', '.join(METADATA_NAMES)}: in a "
                f"bucket, clips are listed by such a file"
            )
        url, root = f"{location}/{found[0]}", location
    with tempfile.TemporaryDirectory(prefix="mimir-list-") as folder:
        return _read_table(fetcher.read_list(url, Path(folder)), video_key, caption_key, limit, root=root, where=url)


def _checked(clips: ClipList, location: str) -> ClipList:
    if not len(clips):
        raise InputError(f"{location}: no clip found; see `mimir-precompute plan --help` for the forms that are read")
    _check_keys(clips, location)
    if clips.num_missing == len(clips):
        raise InputError(
            f"{location}: none of the {len(clips)} files that it names exists below {clips.root}, for instance "
            f"{clips.tables()[0]['source'][0]}; paths are relative to the metadata file"
        )
    return clips


def _check_keys(clips: ClipList, where: str) -> None:
    """Raise InputError for keys that come twice: of all keys only hashes are held, and then those keys alone."""
    hashes = clips.hashes(seed=0)
    ordered = np.sort(np.concatenate(hashes))
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    seen: dict[str, int] = {}
    if len(twice):
        for table, of_table in zip(clips.tables(), hashes, strict=True):
            for key in table["key"].filter(pa.array(np.isin(of_table, twice))).to_pylist():
                seen[key] = seen.get(key, 0) + 1
    problems = Problems(where)
    for key, count in seen.items():
        if count > 1:
            problems.add(f"duplicate key {key!r} ({count} times)")
    problems.raise_if_any()


def _read_table(
    path: Path, video_key: str, caption_key: str, limit: int | None, *, root: str | None = None, where: str = ""
) -> ClipList:
    """A metadata file; `root` and `where` say of a copy where the file itself lies."""
    if path.suffix.lower() not in ROWS:
        raise InputError(f"{path}: cannot be read as a list of clips; expected .jsonl, .csv or .parquet, or tars")
    problems = Problems(where or str(path))
    clips = ClipList(root=Path(os.path.abspath(path.parent)) if root is None else root)
    sizes = _Sizes(clips.root)
    rows = islice(ROWS[path.suffix.lower()](path, problems), limit)
    while batch := list(islice(rows, _ROWS_AT_ONCE)):
        sizes.look_ahead(row.get(video_key) for _, row in batch)
        for line, row in batch:
            _add_row(clips, row, line, video_key, caption_key, sizes, problems)
    problems.raise_if_any()
    return clips


class _Sizes:
    """How large the sources of a list are; those in buckets are found by listing their folders, several at a time."""

    def __init__(self, root: Path | str) -> None:
        self._root = root
        self._fetcher = ClipFetcher(str(root))
        self._of_folder: dict[str, dict[str, int]] = {}

    def look_ahead(self, sources: Iterable[object]) -> None:
        """List the folders of the sources that will be asked for next."""
        urls = [self._url_of(source) for source in sources if isinstance(source, str)]
        folders = {url.rpartition("/")[0] for url in urls if url is not None} - self._of_folder.keys()
        self._of_folder |= self._fetcher.sizes(folders)

    def size(self, source: str) -> int | None:
        """Bytes of a source; None where there is none."""
        url = self._url_of(source)
        if url is None:
            return _file_bytes(os.path.join(self._root, source))
        folder, _, name = url.rpartition("/")
        return self._of_folder[folder].get(name)

    def _url_of(self, source: str) -> str | None:
        # what no list may name is not asked for: it is told with all else that is wrong
        return None if _address_problem(source) else self._fetcher.url_of(source)


def _address_problem(source: str) -> str | None:
    if "://" not in source or (is_in_bucket(source) and not holds_address_secret(source)):
        return None
    return f"{hide_address_secrets(source)!r}: addresses are not read, only files and s3://, gs://, az:// objects"


def _columns_of(row: dict[str, Any]) -> str:
    return f"has {', '.join(sorted(map(str, row))) or 'nothing'}"


def _add_row(
    clips: ClipList,
    row: dict[str, Any],
    where: str,
    video_key: str,
    caption_key: str,
    sizes: _Sizes,
    problems: Problems,
) -> None:
    source = row.get(video_key)
    caption = row.get(caption_key)
    wrong = caption_problem(caption)
    if not isinstance(source, str) or not source:
        wrong = f"no {video_key!r} ({_columns_of(row)}; see --video-key)"
    elif problem := name_problem(source):
        wrong = f"{video_key!r} {problem}"
    elif problem := _address_problem(source):
        wrong = problem
    elif caption is None and caption_key not in row:
        wrong = f"no {caption_key!r} ({_columns_of(row)}; see --caption-key)"
    try:
        start_s, end_s = seconds_of(row.get("start_s"), "start_s"), seconds_of(row.get("end_s"), "end_s")
        if end_s is not None and end_s <= (start_s or 0.0):
            wrong = wrong or f"end_s {end_s} is not after start_s {start_s or 0.0}"
    except ValueError as fault:
        start_s = end_s = None
        wrong = wrong or str(fault)
    key_column = next((name for name in _KEY_COLUMNS if row.get(name) not in (None, "")), None)
    if key_column is not None and (problem := text_problem(str(row[key_column]))):
        wrong = wrong or f"{key_column!r} {problem}"
    if key_column is not None and holds_address_secret(str(row[key_column])):
        wrong = wrong or f"its {key_column!r} has a password or signature of an address in it, and keys are kept"
    own = {video_key, caption_key, "start_s", "end_s", key_column}
    extra = {name: value for name, value in row.items() if name not in own}
    wrong = wrong or extra_problem(extra)
    if wrong is not None:
        problems.add(f"{where}: {wrong}")
        return
    assert isinstance(source, str), where
    assert isinstance(caption, str), where
    clips.add(
        key=source + _trim_name(start_s, end_s) if key_column is None else str(row[key_column]),
        source=source,
        caption=caption,
        source_bytes=sizes.size(source),
        start_s=start_s,
        end_s=end_s,
        further={name: _without_secrets(value) for name, value in extra.items()},
    )


def _trim_name(start_s: float | None, end_s: float | None) -> str:
    """Tells the parts of one video apart: "#2.5-4", "#2.5-", or nothing for the whole."""
    if start_s is None and end_s is None:
        return ""
    return f"#{start_s or 0:g}-{'' if end_s is None else format(end_s, 'g')}"


def _without_secrets(value: Any) -> Any:
    """A user's value without passwords and signatures of addresses: a plan is kept, copied and shared."""
    if isinstance(value, str):
        return hide_address_secrets(value)
    if isinstance(value, dict):
        return {name: _without_secrets(item) for name, item in value.items()}
    return [_without_secrets(item) for item in value] if isinstance(value, list) else value


def _file_bytes(path: str | Path) -> int | None:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return None  # whatever is wrong with it is found out, and told, when it is read


def _decode_text(data: bytes, where: str, problems: Problems) -> str | None:
    try:
        caption = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as fault:
        problems.add(f"{where}: not UTF-8 (byte 0x{data[fault.start]:02x} at {fault.start})")
        return None
    wrong = caption_problem(caption)
    if wrong is not None:
        problems.add(f"{where}: {wrong}")
        return None
    return caption


def _read_folder(path: Path, limit: int | None) -> ClipList:
    """Videos and images, each with a .txt of the same name beside it."""
    problems = Problems(str(path))
    clips = ClipList(root=Path(os.path.abspath(path)))
    endings = VIDEO_ENDINGS + IMAGE_ENDINGS
    for file in sorted(entry for entry in path.rglob("*") if entry.suffix.lower() in endings):
        if limit is not None and len(clips) >= limit:
            break
        source = file.relative_to(path).as_posix()
        text = file.with_suffix(".txt")
        if not text.is_file():
            problems.add(f"{source}: no caption beside it (expected {text.name}), nor a metadata file in the folder")
            continue
        caption = _decode_text(text.read_bytes(), text.name, problems)
        if caption is not None:
            clips.add(key=source, source=source, caption=caption, source_bytes=_file_bytes(file))
    problems.raise_if_any()
    return clips


def _read_tars(paths: Iterable[str], limit: int | None) -> ClipList:
    """WebDataset samples: a video or image member, and its caption as .txt or as `text`/`caption` in .json."""
    names = [Path(path) for path in paths]
    root = Path(os.path.abspath(names[0].parent))
    clips = ClipList(root=root)
    problems = Problems(", ".join(path.name for path in names[:3]) + (", …" if len(names) > 3 else ""))
    for path in names:
        try:
            with tarfile.open(path, "r:") as tar:
                for stem, members in _tar_samples(tar):
                    if limit is not None and len(clips) >= limit:
                        return clips
                    _add_tar_sample(clips, tar, path.name, stem, members, problems)
        except (tarfile.TarError, OSError, EOFError) as fault:
            problems.add(f"{path.name}: not a readable, uncompressed tar ({fault})")
    problems.raise_if_any()
    return clips


def _tar_samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Members grouped as webdataset does: by the name up to the first dot of its last part, when adjacent."""
    stem, members = "", dict[str, tarfile.TarInfo]()
    for entry in tar:
        if entry.size < 0:
            raise tarfile.ReadError(f"{entry.name!r} has {entry.size} bytes")  # the library would go round in circles
        # links, devices and folders are passed over; a sparse file does not lie in the tar as it is
        if not entry.isfile() or entry.issparse():
            continue
        folder, _, base = entry.name.rpartition("/")
        first, _, ending = base.partition(".")
        name = f"{folder}/{first}" if folder else first
        if name != stem and members:
            yield stem, members
            members = {}
        stem = name
        members["." + ending.lower()] = entry
    if members:
        yield stem, members


def _add_tar_sample(
    clips: ClipList,
    tar: tarfile.TarFile,
    tar_name: str,
    stem: str,
    members: dict[str, tarfile.TarInfo],
    problems: Problems,
) -> None:
    where = f"{tar_name}::{stem}"
    for ending in (".txt", ".json"):
        if ending in members and members[ending].size > _MAX_TEXT_BYTES:
            problems.add(f"{where}{ending}: {members[ending].size} bytes; the limit is {_MAX_TEXT_BYTES}")
            return
    media = [entry for ending, entry in members.items() if ending.endswith(VIDEO_ENDINGS + IMAGE_ENDINGS)]
    if len(media) != 1:
        problems.add(f"{where}: {len(media)} videos or images, expected one (has {', '.join(sorted(members))})")
        return
    caption = None
    if ".txt" in members:
        caption = _decode_text(_member_bytes(tar, members[".txt"]), f"{where}.txt", problems)
    elif ".json" in members:
        try:
            document = parse_json(_member_bytes(tar, members[".json"]))
            text = document.get("text", document.get("caption"))
        except (ValueError, AttributeError) as fault:
            problems.add(f"{where}.json: not a JSON object ({fault})")
            return
        wrong = caption_problem(text)
        if wrong is None:
            caption = text
        else:
            problems.add(f"{where}.json: {wrong}")
    else:
        problems.add(f"{where}: no caption (expected .txt, or .json with text or caption)")
    if caption is not None:
        source = f"{tar_name}::{media[0].name}"
        size, offset = media[0].size, media[0].offset_data
        clips.add(key=stem, source=source, caption=caption, source_bytes=size, source_offset=offset)


def _member_bytes(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(entry)
    assert file is not None, f"{entry.name} is a plain file"
    return file.read()
