"""A disk that remembers what it was told to do, and can say what is left of it after a power cut.

What was not fsynced may be lost, kept, or kept in part, in any order: bytes of a file by sectors of 512, names by
each single change of a folder. What was fsynced is there. Leases and logs do not pass here: they are simply lost.
"""

import io
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from mimir_shared.storage.disk import Disk

_SECTOR = 512


@dataclass(eq=False)
class File:
    """The bytes of a file as last fsynced, and the writes since then as (offset, bytes)."""

    synced: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def content(self) -> bytes:
        data = bytearray(self.synced)
        for offset, piece in self.pending:
            _put(data, offset, piece)
        return bytes(data)

    def after_cut(self, choose: random.Random, kept: float) -> bytes:
        data = bytearray(self.synced)
        for offset, piece in self.pending:
            for begin in range(0, len(piece), _SECTOR):
                if choose.random() < kept:
                    _put(data, offset + begin, piece[begin : begin + _SECTOR])
        return bytes(data)


@dataclass(eq=False)
class Folder:
    """The names of a folder as last fsynced, and the changes since: (name, what it is then; None: gone)."""

    synced: dict[str, "File | Folder"] = field(default_factory=dict)
    pending: list[tuple[str, "File | Folder | None"]] = field(default_factory=list)

    def names(self) -> dict[str, "File | Folder"]:
        return _apply(self.synced, self.pending)

    def after_cut(self, choose: random.Random, kept: float) -> dict[str, "File | Folder"]:
        return _apply(self.synced, [change for change in self.pending if choose.random() < kept])


@dataclass(frozen=True)
class Operation:
    kind: Literal["create", "write", "sync", "link", "rename", "remove", "make", "remove_folder", "sync_folder"]
    path: str
    target: str = ""
    offset: int = 0
    data: bytes = b""


class RecordingDisk(Disk):
    """Does everything for real and writes it down. Safe between threads.

    Args:
        forgets: what this disk takes for done though it never reaches it: fsyncs of files, or of folders.
        then: called behind every new name, of a file or a folder: it is there for others, and not yet durable.
    """

    def __init__(
        self, root: Path, *, forgets: tuple[str, ...] = (), then: Callable[[str], None] = lambda _: None
    ) -> None:
        self._root = root
        self._forgets = forgets
        self._then = then
        self._lock = threading.Lock()
        self.before = load(root)
        self.operations: list[Operation] = []

    def note(self, operation: Operation) -> None:
        # nobody relies on either, and logs are written past the disk
        unneeded = any(name.startswith(("leases/", "logs/")) for name in (operation.path, operation.target))
        if operation.kind not in self._forgets and not unneeded:
            self.operations.append(operation)

    def create(self, path: Path) -> BinaryIO:
        with self._lock:
            raw = _RecordingFile(self, path, self._name(path))
            self.note(Operation("create", self._name(path)))
        return io.BufferedWriter(raw)  # type: ignore[return-value]  # a binary file, as far as writing needs one

    def sync_file(self, file: BinaryIO) -> None:
        file.flush()
        with self._lock:
            self.note(Operation("sync", file.raw.name_in_cache))  # type: ignore[attr-defined]  # one of ours

    def link(self, source: Path, target: Path) -> None:
        with self._lock:
            super().link(source, target)
            self.note(Operation("link", self._name(source), self._name(target)))
        self._then(self._name(target))

    def rename(self, source: Path, target: Path) -> None:
        with self._lock:
            super().rename(source, target)
            self.note(Operation("rename", self._name(source), self._name(target)))

    def remove(self, path: Path) -> None:
        with self._lock:
            super().remove(path)
            self.note(Operation("remove", self._name(path)))

    def make_directory(self, path: Path) -> None:
        with self._lock:
            super().make_directory(path)
            self.note(Operation("make", self._name(path)))
        self._then(self._name(path))

    def remove_directory(self, path: Path) -> None:
        with self._lock:
            super().remove_directory(path)
            self.note(Operation("remove_folder", self._name(path)))

    def sync_directory(self, path: Path) -> None:
        if path == self._root or self._root in path.parents:
            with self._lock:
                self.note(Operation("sync_folder", self._name(path)))

    def _name(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    def cut_power(self, choose: random.Random, into: Path) -> int:
        """Write what is left after a cut behind a random operation into a new folder; the number of that operation."""
        last = choose.randint(1, len(self.operations))
        materialize(self._replayed(last), into, choose, choose.choice((0.0, 0.2, 0.5, 0.8, 1.0)))
        return last

    def keep_what_is_durable(self, into: Path) -> None:
        """Write what a cut at this moment leaves if nothing is kept but what was fsynced."""
        materialize(self._replayed(len(self.operations)), into, random.Random(0), 0.0)

    def _replayed(self, last: int) -> Folder:
        root = copy(self.before)
        files: dict[str, File] = {}
        for operation in self.operations[:last]:
            _replay(root, files, operation)
        return root


class _RecordingFile(io.FileIO):
    def __init__(self, disk: RecordingDisk, path: Path, name: str) -> None:
        super().__init__(path, "xb")
        self._disk = disk
        self.name_in_cache = name

    def write(self, data: bytes) -> int:  # type: ignore[override]  # any buffer there
        written = super().write(data)
        assert written is not None
        offset = self.tell() - written
        self._disk.note(Operation("write", self.name_in_cache, offset=offset, data=bytes(data)[:written]))
        return written


def _put(data: bytearray, offset: int, piece: bytes) -> None:
    data.extend(bytes(max(0, offset - len(data))))
    data[offset : offset + len(piece)] = piece


def _apply(
    names: dict[str, "File | Folder"], changes: list[tuple[str, "File | Folder | None"]]
) -> dict[str, "File | Folder"]:
    result = dict(names)
    for name, what in changes:
        if what is None:
            result.pop(name, None)
        else:
            result[name] = what
    return result


def _find(root: Folder, path: str) -> tuple[Folder, str]:
    *above, name = PurePosixPath(path).parts
    folder = root
    for part in above:
        below = folder.names()[part]
        assert isinstance(below, Folder)
        folder = below
    return folder, name


def _replay(root: Folder, open_files: dict[str, File], operation: Operation) -> None:
    if operation.path in ("", "."):
        if operation.kind == "sync_folder":
            root.synced, root.pending = root.names(), []
        return
    folder, name = _find(root, operation.path) if operation.kind not in ("write", "sync") else (root, "")
    match operation.kind:
        case "create":
            open_files[operation.path] = File()
            folder.pending.append((name, open_files[operation.path]))
        case "write":
            open_files[operation.path].pending.append((operation.offset, operation.data))
        case "sync":
            file = open_files[operation.path]
            file.synced, file.pending = file.content(), []
        case "link" | "rename":
            to, new_name = _find(root, operation.target)
            to.pending.append((new_name, folder.names()[name]))
            if operation.kind == "rename":
                folder.pending.append((name, None))
        case "remove" | "remove_folder":
            folder.pending.append((name, None))
        case "make":
            folder.pending.append((name, Folder()))
        case "sync_folder":
            below = folder.names()[name]
            assert isinstance(below, Folder)
            below.synced, below.pending = below.names(), []


def load(path: Path) -> Folder:
    """A folder as it lies on disk, all of it durable."""
    names: dict[str, File | Folder] = {}
    for entry in sorted(path.iterdir()) if path.is_dir() else ():
        names[entry.name] = load(entry) if entry.is_dir() else File(synced=entry.read_bytes())
    return Folder(synced=names)


def copy(folder: Folder) -> Folder:
    """A durable folder that may be changed."""
    return Folder(
        synced={
            name: copy(what) if isinstance(what, Folder) else File(synced=what.synced)
            for name, what in folder.synced.items()
        }
    )


def materialize(folder: Folder, path: Path, choose: random.Random, kept: float) -> None:
    """Write what a power cut leaves of a folder."""
    path.mkdir()
    for name, what in folder.after_cut(choose, kept).items():
        if isinstance(what, Folder):
            materialize(what, path / name, choose, kept)
        else:
            (path / name).write_bytes(what.after_cut(choose, kept))
