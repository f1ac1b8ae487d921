"""The bytes of one clip: opened safely, hashed, and recognised by their first bytes, before any decoder sees them."""

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

import xxhash

from mimir_precompute.clips.rejection import ClipRejected, RejectionReason
from mimir_shared.errors import MachineError

_CHUNK_BYTES = 2**20

# What open() says of this one file. Everything else that it or read() can raise (EIO, ESTALE, ENOTCONN, ENOMEM, EMFILE,
# …) is the machine's fault. Where a whole mount fails in these ways (no longer there, all denied), the folder is looked
# at when a clip is missing (refuse_vanished_root), and a shard that loses half of its clips stops the run.
_CLIP_FAULTS: dict[int, tuple[RejectionReason, str]] = {
    errno.ENOENT: ("missing", "no such file"),
    errno.ENOTDIR: ("missing", "no such file: a part of its path is not a folder"),
    errno.EACCES: ("unreadable", "permission denied"),
    errno.EPERM: ("unreadable", "permission denied"),
    errno.ELOOP: ("unreadable", "its links form a loop"),
    errno.ENAMETOOLONG: ("unreadable", "its name is too long"),
    errno.ENXIO: ("unreadable", "not a regular file"),
}

SourceFormat = Literal["png", "jpeg", "webp", "mov", "matroska", "avi"]
IMAGE_FORMATS: frozenset[SourceFormat] = frozenset(("png", "jpeg", "webp"))


class SourceFile(io.RawIOBase):
    """Reads of one file that remember an error of the machine.

    Demuxers may take a failed read for the end of the file; the memory of it keeps a broken disk from passing for
    a short clip. It has no name: FFmpeg guesses formats by name, and messages would quote it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.fault: OSError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            self.fault = error
            raise

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def fileno(self) -> int:
        """Of the open file; raises OSError where the bytes lie in memory."""
        return self._file.fileno()


@contextmanager
def open_source(source: bytes | Path) -> Iterator[SourceFile]:
    """A seekable file over the bytes of a clip.

    Raises: ClipRejected (stage fetch) for a fault of this one file, MachineError for one of the disk, mount or host,
    met at any time until the file is closed.
    """
    with _open_regular_file(source) as file:
        watched = SourceFile(file)
        try:
            if not watched.read(1):
                raise ClipRejected("fetch", "empty_file", "the file has no bytes")
            watched.seek(0)
            yield watched
        finally:
            if watched.fault is not None:
                raise reading_failed(source, watched.fault.strerror) from watched.fault


def source_name(source: bytes | Path) -> str:
    """For messages to people; never part of a record."""
    return str(source) if isinstance(source, Path) else "a clip in a tar"


def reading_failed(source: bytes | Path, why: str | None) -> MachineError:
    """The error of a disk or mount that fails while a clip is read."""
    return MachineError(
        f"{source_name(source)}: reading failed: {why}; the clip is not to blame: "
        "mend the disk or mount and run the same command again"
    )


@contextmanager
def _open_regular_file(source: bytes | Path) -> Iterator[BinaryIO]:
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    try:
        # non-blocking: to open a pipe would otherwise wait for a writer for ever
        descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _CLIP_FAULTS:
            raise MachineError(
                f"{source}: cannot be opened: {error.strerror}; the clip is not to blame: "
                "mend the disk, mount or limit and run the same command again"
            ) from error
        reason, detail = _CLIP_FAULTS[error.errno]
        raise ClipRejected("fetch", reason, detail) from error
    except ValueError as error:
        raise ClipRejected("fetch", "missing", "no file can have this name") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise ClipRejected("fetch", "unreadable", "a folder" if stat.S_ISDIR(mode) else "not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def refuse_vanished_root(root: Path) -> None:
    """Raise MachineError where a clip is missing because the folder of all clips is: no such folder, or empty."""
    try:
        with os.scandir(root) as entries:
            if any(True for _ in entries):
                return
        why = "it is empty"
    except OSError as fault:
        why = str(fault.strerror)
    raise MachineError(
        f"{root}: the clips cannot be read from there any more ({why}); no clip is to blame: mount or restore the "
        "folder and run the same command again"
    )


def hash_source(source: bytes | Path) -> int:
    """xxh3-64 of a clip's bytes, unsigned: the `source_xxh3` of the commit record. Raises as open_source does."""
    with open_source(source) as file:
        return hash_file(file)


def hash_file(file: SourceFile) -> int:
    """xxh3-64 of the whole file; leaves it at its start."""
    hasher = xxhash.xxh3_64()
    file.seek(0)
    while chunk := file.read(_CHUNK_BYTES):
        hasher.update(chunk)
    file.seek(0)
    return hasher.intdigest()


def recognise(file: SourceFile) -> SourceFormat:
    """The format that the first bytes announce; the file's name is not asked. Leaves the file at its start.

    Raises: ClipRejected for all that we do not read: no decoder is ever given an unknown file to guess at.
    """
    file.seek(0)
    source_format = _sniff(file.read(16))
    file.seek(0)
    if source_format is None:
        detail = "it begins neither as a mp4/mov, matroska/webm or AVI video nor as a PNG, JPEG or WebP image"
        raise ClipRejected("decode", "unsupported_format", detail)
    return source_format


def _sniff(head: bytes) -> SourceFormat | None:
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if head[4:8] in _MOV_BOXES:
        return "mov"
    return None


def missing_bytes(file: SourceFile, source_format: SourceFormat) -> int:
    """How many bytes the container's outermost frame announces beyond the end of the file; 0 if none or unknown.

    A cut file often decodes without an error up to the cut, so this is asked before decoding. A matroska stream of
    undeclared length, and a fragmented mp4 cut exactly between two fragments, cannot be told from a whole one.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    try:
        if source_format == "mov":
            return max(0, _mov_end(file, num_bytes) - num_bytes)
        if source_format == "matroska":
            return max(0, _matroska_end(file) - num_bytes)
        if source_format == "avi":
            file.seek(4)
            return max(0, int.from_bytes(file.read(4), "little") + 8 - num_bytes)
        return 0
    finally:
        file.seek(0)


_MOV_BOXES = frozenset(
    (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"pnot", b"styp", b"sidx", b"uuid", b"mfra")
)


def _mov_end(file: SourceFile, num_bytes: int) -> int:
    """Where the last known top-level box ends; boxes of unknown type end the walk, for junk may follow a good file."""
    position = 0
    has_index = False
    while position + 8 <= num_bytes:
        file.seek(position)
        header = file.read(16)
        size, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if size == 1:
            size = int.from_bytes(header[8:16], "big")
        elif size == 0:
            return num_bytes
        if kind not in _MOV_BOXES or size < 8:
            return num_bytes
        has_index = has_index or kind in (b"moov", b"moof")
        position += size
    # fewer than eight bytes are left over: the header of the index, cut, unless the index came before
    if position < num_bytes and not has_index:
        return position + 8
    return position


def _matroska_end(file: SourceFile) -> int:
    """Where the segment ends by its own header; 0 if that says nothing."""
    file.seek(0)
    head = file.read(4096)
    header_size, start = _read_vint(head, 4)
    if header_size is None:
        return 0
    segment = start + header_size
    if head[segment : segment + 4] != b"\x18\x53\x80\x67":
        return 0
    segment_size, start = _read_vint(head, segment + 4)
    return 0 if segment_size is None else start + segment_size


def _read_vint(data: bytes, position: int) -> tuple[int | None, int]:
    """An EBML length and the position after it; None for "unknown", which is all ones, and for a bad one."""
    if position >= len(data) or data[position] == 0:
        return None, position
    length = 9 - data[position].bit_length()
    if position + length > len(data):
        return None, position
    mask = (1 << (7 * length)) - 1
    value = int.from_bytes(data[position : position + length], "big") & mask
    return (None if value == mask else value), position + length
