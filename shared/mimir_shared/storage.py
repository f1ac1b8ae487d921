"""The folder of a cache, and the two ways in which a file may appear in it: whole, or not at all.

Protocol: write under a unique temporary name, fsync, then `link` to the final name, which fails where
that name exists (rename would overwrite). The directory is fsynced last, so that the name outlives a
power cut as surely as the bytes. Names are relative to the cache and use "/".
"""

import contextlib
import errno
import hashlib
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from mimir_shared.errors import InputError, MachineError
from mimir_shared.open_files import OpenFiles

_TEMPORARY = "tmp"
_LINK_UNSUPPORTED = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


def _process_domain() -> str:
    """Name the set of processes in which a pid means something: one boot of one pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return f"unknown{uuid.uuid4().hex[:12]}"
    return f"{boot[:8]}{namespace}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create_in(directory: Path, path: Path) -> BinaryIO:
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            return open(path, "xb")
        except FileNotFoundError:
            continue  # another process has just removed the empty folder


@contextlib.contextmanager
def machine_faults(action: str) -> Iterator[None]:
    """Turn a fault of the disk into a MachineError that names what was being done."""
    try:
        yield
    except OSError as fault:
        raise MachineError(
            f"{action}: {fault.strerror or fault} ({errno.errorcode.get(fault.errno or 0, '?')}); nothing that was "
            f"committed is lost: mend it and run the same command again"
        ) from fault


class LocalStorage:
    """A cache in a folder of a local or network file system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open_files = OpenFiles()

    def path(self, name: str) -> Path:
        return self.root / name

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def read(self, name: str) -> bytes:
        """The whole file. Raises FileNotFoundError where there is none."""
        try:
            return self.path(name).read_bytes()
        except FileNotFoundError:
            raise
        except OSError as fault:
            raise MachineError(f"{self.path(name)}: cannot be read: {fault.strerror}; run it again") from fault

    def read_into(self, name: str, offset: int, buffers: Sequence[memoryview]) -> int:
        """Fill buffers of bytes, one after the other, with what a file holds from `offset` on. Safe between threads.

        All that reads samples goes through here: one call a sample and feature, into memory that is there already.

        Returns: bytes read; fewer than the buffers take only where the file ends.
        Raises: FileNotFoundError where there is no such file; OSError where it cannot be read.
        """
        return self._open_files.read_into(self.path(name), offset, buffers)

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError where there is none."""
        return self.path(name).stat().st_size

    def list(self, directory: str) -> list[str]:
        """File and folder names directly below `directory`, sorted; empty where it does not exist."""
        try:
            return sorted(entry.name for entry in os.scandir(self.path(directory)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def check_writable(self) -> None:
        """Raise InputError early where nothing could be written. Creates the root folder."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with self.temporary():
                pass
        except OSError as fault:
            raise InputError(
                f"{self.root}: the cache folder cannot be written: {fault.strerror}; "
                f"choose another --cache or mend its permissions"
            ) from fault

    @contextlib.contextmanager
    def temporary(self) -> Iterator["TemporaryFile"]:
        """A new file to be published; it is removed when the block ends, published or not."""
        directory = self.root / _TEMPORARY
        path = directory / f"{_process_domain()}-{os.getpid()}-{uuid.uuid4().hex}"
        with _create_in(directory, path) as file:
            try:
                yield TemporaryFile(path, file)
            finally:
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    directory.rmdir()

    def publish(self, temporary: "TemporaryFile", name: str) -> bool:
        """Give a written temporary file its final name, durably.

        Returns: False where the name exists already; the file that has it stays as it is.
        """
        temporary.file.flush()
        os.fsync(temporary.file.fileno())
        final = self.path(name)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(temporary.path, final)
        except FileExistsError:
            return False
        except OSError as fault:
            if fault.errno not in _LINK_UNSUPPORTED:
                raise
            return self._publish_without_link(temporary, final)
        _sync_directory(final.parent)
        return True

    def _publish_without_link(self, temporary: "TemporaryFile", final: Path) -> bool:
        # A file system without hard links: exclusive creation still gives one winner, and a torn
        # file is recognised by its seal or its sha256, so it is refused and never believed.
        try:
            with open(final, "xb") as file:
                file.write(temporary.path.read_bytes())
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            return False
        _sync_directory(final.parent)
        return True

    def publish_content(self, temporary: "TemporaryFile", name: str, sha256: str) -> None:
        """Give a written temporary file the name that follows from its content, durably."""
        if self.publish(temporary, name):
            return
        # The name is taken: by the same bytes, unless that file was damaged since.
        final = self.path(name)
        with open(final, "rb") as file:
            intact = hashlib.file_digest(file, "sha256").hexdigest() == sha256
        if not intact:
            # No intact file has this name, so nothing that anyone relies on is lost.
            os.replace(temporary.path, final)

    def create(self, name: str, data: bytes) -> bool:
        """Publish `data` under `name` if nothing has that name yet; False where something has."""
        with machine_faults(f"{self.path(name)}: writing"), self.temporary() as temporary:
            temporary.file.write(data)
            return self.publish(temporary, name)

    def remove_own_temporaries(self) -> None:
        """Remove what this process has not published yet, because it is about to end."""
        prefix = f"{_process_domain()}-{os.getpid()}-"
        for name in self.list(_TEMPORARY):
            if name.startswith(prefix):
                self.path(f"{_TEMPORARY}/{name}").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path(_TEMPORARY).rmdir()

    def remove_abandoned(self) -> int:
        """Remove temporary files whose process, on this machine, is dead. Returns how many."""
        removed = 0
        domain = _process_domain()
        for name in self.list(_TEMPORARY):
            parts = name.split("-")
            if len(parts) == 3 and parts[0] == domain and parts[1].isdecimal() and not _is_alive(int(parts[1])):
                self.path(f"{_TEMPORARY}/{name}").unlink(missing_ok=True)
                removed += 1
        with contextlib.suppress(OSError):
            self.path(_TEMPORARY).rmdir()
        return removed


class TemporaryFile:
    """An open, unpublished file of a storage."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file


def open_storage(location: str) -> LocalStorage:
    """The storage behind a `--cache` value. Raises InputError for a scheme that is not supported."""
    if "://" in location:
        scheme, _, rest = location.partition("://")
        if scheme != "file":
            raise InputError(f"--cache {location}: {scheme}:// is not supported yet; give a folder")
        location = rest
    return LocalStorage(Path(location))
