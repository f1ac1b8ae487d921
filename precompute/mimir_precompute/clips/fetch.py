"""Where the bytes of a planned clip come from: a file, a member of a tar, or an object of a bucket.

An object is streamed to a file on this machine's disk that has no name and goes with its last reader, so that as many
clips lie there as are decoded at a time, and none when a worker is killed.
"""

import contextlib
import tempfile
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from mimir_precompute.clips.rejection import ClipRejected
from mimir_precompute.clips.source import refuse_vanished_root
from mimir_shared.errors import InputError, MachineError
from mimir_shared.plan_file import PlannedClip
from mimir_shared.storage.open import BUCKET_SCHEMES

if TYPE_CHECKING:
    from mimir_shared.storage.bucket_objects import BucketObjects

_AT_ONCE: Final = 32
"""Folders of a bucket that are listed at a time."""


def is_in_bucket(source: str) -> bool:
    """Whether a clip or a list of clips is named by s3://, gs:// or az://."""
    scheme, separator, _ = source.partition("://")
    return bool(separator) and scheme in BUCKET_SCHEMES


class ClipFetcher:
    """Gets clips of one plan. Safe between threads."""

    def __init__(self, root: str) -> None:
        """Nothing is requested yet.

        Args:
            root: `source_root` of the plan: a folder, or a bucket with the beginning of the names in it.
        """
        self._root = root
        self._lock = threading.Lock()
        self._buckets: dict[str, BucketObjects] = {}

    def url_of(self, source: str) -> str | None:
        """The address of a source that lies in a bucket; None of one that is a file."""
        if is_in_bucket(source):
            return source
        return f"{self._root}/{source}" if is_in_bucket(self._root) else None

    @contextlib.contextmanager
    def fetch(self, clip: PlannedClip) -> Iterator[Path | bytes]:
        """The file of a planned clip, or its bytes where it is a member of a tar.

        Raises: ClipRejected where it is missing or cut, MachineError where it cannot be read.
        """
        url = self.url_of(clip.source)
        if url is not None:
            with self._downloaded(url) as path:
                yield path
        elif clip.source_offset is not None:
            yield _member_of_tar(Path(self._root), clip)
        else:
            yield Path(self._root) / clip.source

    def refuse_vanished_root(self, clip: PlannedClip) -> None:
        """Raise MachineError where a clip is missing because the folder of all clips is."""
        if self.url_of(clip.source) is None:
            refuse_vanished_root(Path(self._root))

    def sizes(self, folders: Collection[str]) -> dict[str, dict[str, int]]:
        """Folder → name → bytes of each object that lies directly in it, for addresses of folders."""

        def list_folder(folder: str) -> dict[str, int]:
            objects, name = self._place(f"{folder}/")
            return objects.sizes(name.rstrip("/"))

        if not folders:
            return {}
        with ThreadPoolExecutor(_AT_ONCE, "list-clips") as pool:
            return dict(zip(folders, pool.map(list_folder, folders), strict=True))

    def read_list(self, url: str, folder: Path) -> Path:
        """Copy a list of clips into a folder. Raises: InputError where there is none, MachineError."""
        copy = folder / url.rpartition("/")[2]
        try:
            with open(copy, "wb") as file:
                self._stream(url, file)
        except FileNotFoundError as missing:
            raise InputError(f"{url}: no such object; expected a list of clips") from missing
        return copy

    def names(self, url: str) -> list[str]:
        """What lies directly below an address."""
        objects, name = self._place(f"{url}/")
        return objects.names(name.rstrip("/"))

    @contextlib.contextmanager
    def _downloaded(self, url: str) -> Iterator[Path]:
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(tempfile.TemporaryFile(prefix="mimir-clip-"))
                self._stream(url, file)
                file.flush()
            except FileNotFoundError as missing:
                raise ClipRejected("fetch", "missing", "no such object") from missing
            except OSError as fault:
                raise MachineError(
                    f"{url}: cannot be kept in {tempfile.gettempdir()} while it is decoded: {fault.strerror}; no clip "
                    f"is to blame: set TMPDIR to a folder with more room and run the same command again"
                ) from fault
            yield Path(f"/proc/self/fd/{file.fileno()}")

    def _stream(self, url: str, file: BinaryIO) -> None:
        """Copy an object part by part. Raises FileNotFoundError where there is none, MachineError."""
        objects, name = self._place(url)
        size, done = None, 0
        while size is None or done < size:
            part, whole = objects.get_range("reading a clip", name, done, objects.limits.part_bytes)
            if size not in (None, whole):
                raise MachineError(f"{url}: had {size} bytes, then {whole}: it changes while it is read; run it again")
            size = whole
            file.write(part)
            done += len(part)

    def _place(self, url: str) -> "tuple[BucketObjects, str]":
        # only those who have clips in a bucket wait for these
        from mimir_shared.storage.bucket_objects import BucketObjects
        from mimir_shared.storage.bucket_requests import RequestLimits

        scheme, _, rest = url.partition("://")
        bucket, _, name = rest.partition("/")
        location = f"{scheme}://{bucket}"
        with self._lock:
            if location not in self._buckets:
                self._buckets[location] = BucketObjects(location, RequestLimits())
            return self._buckets[location], name


def _member_of_tar(root: Path, clip: PlannedClip) -> bytes:
    tar_name, _, _ = clip.source.partition("::")
    assert clip.source_offset is not None, f"{clip.source} is a file of its own"
    assert clip.source_bytes is not None, f"{clip.source} is a member of a tar without a length"
    try:
        with open(root / tar_name, "rb") as tar:
            tar.seek(clip.source_offset)
            data = tar.read(clip.source_bytes)
    except FileNotFoundError as fault:
        raise ClipRejected("fetch", "missing", "the tar that holds it is missing") from fault
    except OSError as fault:
        raise MachineError(f"{root / tar_name}: cannot be read: {fault.strerror}; run it again") from fault
    if len(data) != clip.source_bytes:
        raise ClipRejected("fetch", "truncated", f"{len(data)} of {clip.source_bytes} bytes are left in its tar")
    return data
