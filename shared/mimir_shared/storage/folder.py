"""The folder of a cache, and the way in which a file appears in it: whole, or not at all.

Protocol: write under a unique temporary name, fsync, then `link` to the final name, which fails where
that name exists (rename would overwrite). The folder is fsynced last, and so is each folder above that
was new, so that the name outlives a power cut as surely as the bytes. A name that exists already is
fsynced too before it is relied on: its author may not have come that far. Names are relative to the
cache and use "/".
"""

import contextlib
import errno
import hashlib
import os
import stat
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from mimir_shared.errors import InputError, MachineError
from mimir_shared.failpoints import publishing_failpoint
from mimir_shared.process_identity import Life, owner_life, owner_stem
from mimir_shared.storage.disk import FULL, Disk, describe_full
from mimir_shared.storage.found_file import FoundFile
from mimir_shared.storage.local_leases import LocalLeaseStore
from mimir_shared.storage.open_files import OpenFiles

Done = TypeVar("Done")

_TEMPORARY = "tmp"
_MENDED_BY_THE_USER = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}


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
    """A cache in a folder of a local or network file system. Safe between threads."""

    def __init__(self, root: Path, disk: Disk | None = None) -> None:
        self.root = root
        self.disk = disk or Disk()
        self._open_files = OpenFiles()
        self._durable: set[Path] = set()
        self._root_identity: tuple[int, int] | None = None
        self._may_create = threading.Lock()

    def path(self, name: str) -> Path:
        return self.root / name

    def now_s(self) -> float:
        """Now, by the clock that stamps the files of the cache: clocks of hosts may be hours apart."""
        with machine_faults(f"{self.root}: asking for the time of its disk"), self.temporary() as probe:
            os.utime(probe.file.fileno())
            return os.fstat(probe.file.fileno()).st_mtime

    def lease_store(self) -> LocalLeaseStore:
        return LocalLeaseStore(self)

    def exists(self, name: str) -> bool:
        with machine_faults(f"{self.path(name)}: looking for it"):
            return self.path(name).exists()

    def exists_durably(self, name: str) -> bool:
        """As `exists`; where it does, it outlives a power cut from now on, whoever published it."""
        if not self.exists(name):
            return False
        self.settle(os.path.dirname(name))
        return True

    def settle(self, directory: str) -> None:
        """Make the names that a folder holds outlive a power cut, before something is built on them."""
        with machine_faults(f"{self.path(directory)}: fsync"):
            self._ensure_directory(self.path(directory))
            self.disk.sync_directory(self.path(directory))

    def read(self, name: str) -> bytes:
        """The whole file. Raises FileNotFoundError where there is none."""
        try:
            return self.path(name).read_bytes()
        except FileNotFoundError:
            raise
        except NotADirectoryError as fault:  # a stray file where a folder would be
            raise FileNotFoundError(fault.errno, fault.strerror, str(self.path(name))) from fault
        except OSError as fault:
            raise MachineError(f"{self.path(name)}: cannot be read: {fault.strerror}; run it again") from fault

    def read_into(
        self,
        name: str,
        offset: int,
        buffers: Sequence[memoryview],
        seen: Callable[[memoryview], None] | None = None,
    ) -> int:
        """Fill buffers of bytes, one after the other, with what a file holds from `offset` on. Safe between threads.

        Args:
            seen: is given all that was read, in order and piece by piece, while it is warm: to be hashed.
        Returns: bytes read; fewer than the buffers take only where the file ends.
        Raises: FileNotFoundError where there is no such file; OSError where it cannot be read.
        """
        return self._open_files.read_into(f"{self.root}/{name}", offset, buffers, seen)

    def read_many(self, names: Sequence[str]) -> Iterator[bytes]:
        """Whole files in the order of their names. Raises as `read`."""
        return map(self.read, names)

    def forget(self, name: str, offset: int, nbytes: int) -> bool:
        """False: what a disk has given, it gives again."""
        return False

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError where there is none."""
        return self.path(name).stat().st_size

    def list(self, directory: str) -> list[str]:
        """File and folder names directly below `directory`, sorted; empty where it does not exist."""
        try:
            with os.scandir(self.path(directory)) as entries:
                return sorted(entry.name for entry in entries)
        except (FileNotFoundError, NotADirectoryError):
            self.check_mounted()
            return []
        except OSError as fault:
            raise MachineError(f"{self.path(directory)}: cannot be listed: {fault.strerror}; run it again") from fault

    def check_writable(self) -> None:
        """Raise InputError early where nothing could be written. Creates the root folder."""
        try:
            with self.temporary():
                pass
        except OSError as fault:
            if fault.errno not in _MENDED_BY_THE_USER:
                with machine_faults(f"{self.root}: writing"):
                    raise
            raise InputError(
                f"{self.root}: the cache folder cannot be written: {fault.strerror}; "
                f"choose another --cache or mend its permissions"
            ) from fault

    @contextlib.contextmanager
    def temporary(self) -> Iterator["TemporaryFile"]:
        """A new file to be published; it is removed when the block ends, published or not.

        Raises: OSError; of a full disk, with what was written and what is free.
        """
        path = self._temporary_path()
        file = self._create_temporary(path)
        try:
            yield TemporaryFile(path, file)
            file.close()
        except OSError as fault:
            if fault.errno in FULL:
                raise describe_full(fault, self.root, path) from fault
            raise
        finally:
            with contextlib.suppress(OSError):
                file.close()
            with contextlib.suppress(FileNotFoundError):
                self.disk.remove(path)

    def publish(self, temporary: "TemporaryFile", name: str) -> bool:
        """Give a written temporary file its final name, durably.

        Returns: False where the name exists already; the file that has it stays as it is.
        """
        publishing_failpoint(name, "written")
        self.disk.sync_file(temporary.file)
        publishing_failpoint(name, "synced")
        final = self.path(name)
        linked = self._link(temporary.path, final)
        publishing_failpoint(name, "linked")
        self.disk.sync_directory(final.parent)
        publishing_failpoint(name, "dir_synced")
        return linked

    def publish_content(self, temporary: "TemporaryFile", name: str, sha256: str) -> None:
        """Give a written temporary file the name that follows from its content, durably."""
        while not self.publish(temporary, name):
            # The name is taken: by the same bytes, unless that file was damaged since.
            final = self.path(name)
            try:
                with open(final, "rb") as file:
                    intact = hashlib.file_digest(file, "sha256").hexdigest() == sha256
                with contextlib.suppress(PermissionError):
                    os.utime(final)  # to `gc` it is as young as if it had been published now
            except FileNotFoundError:
                continue
            if not intact:
                # No intact file has this name, so nothing that anyone relies on is lost.
                self._replace(temporary, final)
            return

    def create(self, name: str, data: bytes) -> bool:
        """Publish `data` under `name` if nothing has that name yet; False where something has."""
        with machine_faults(f"{self.path(name)}: writing"), self.temporary() as temporary:
            temporary.file.write(data)
            return self.publish(temporary, name)

    def overwrite(self, name: str, data: bytes) -> None:
        """Write a file that nobody relies on, over what it held. Raises OSError."""
        temporary = self._temporary_path()
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        temporary.parent.mkdir(exist_ok=True)
        # not synced: after a power cut nobody misses it
        temporary.write_bytes(data)
        os.replace(temporary, self.path(name))

    def append(self, name: str, data: bytes) -> None:
        """Add to a file that this process alone writes. Raises OSError."""
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        with open(self.path(name), "ab") as file:
            file.write(data)

    def set_aside(self, name: str) -> str:
        """Take a file or folder out of the cache in one step; it can still be read under the name returned.

        Raises: FileNotFoundError where it is gone already.
        """
        aside, path = self._temporary_path(), self.path(name)
        self._within(aside.parent, lambda: self.disk.rename(path, aside), source=path)
        self._open_files.forget(str(path))
        return f"{_TEMPORARY}/{aside.name}"

    def put_back(self, aside: str, name: str) -> None:
        """Undo `set_aside`, unless something has that name again."""
        self._link(self.path(aside), self.path(name))
        self.disk.sync_directory(self.path(name).parent)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            self.disk.remove(self.path(name))
        self._open_files.forget(str(self.path(name)))

    def remove_tree(self, name: str) -> None:
        """Remove a file, or a folder with all that it holds, if it is there, in one step. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            self._remove_temporary(self.path(self.set_aside(name)))

    def remove_empty_folder(self, directory: str) -> None:
        """Remove a folder that holds nothing."""
        with contextlib.suppress(OSError):
            self.disk.remove_directory(self.path(directory))

    def has_second_name(self, name: str) -> bool:
        """Whether the worker that published a file still has its temporary file: it has not come to the record."""
        try:
            return self.path(name).stat().st_nlink > 1
        except FileNotFoundError:
            return True

    def files(self, directory: str) -> Iterator[FoundFile]:
        """Every file below a folder, sorted. Raises OSError."""
        for path in sorted(self.path(directory).rglob("*")):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if stat.S_ISREG(status.st_mode):
                    name = path.relative_to(self.root).as_posix()
                    yield FoundFile(name=name, nbytes=status.st_size, modified_s=status.st_mtime)

    def temporaries(self) -> dict[str, Life]:
        """Name of each temporary file → what is known of the process that made it."""
        return {f"{_TEMPORARY}/{name}": owner_life(name) for name in self.list(_TEMPORARY)}

    def remove_abandoned(self) -> int:
        """Remove temporary files whose process, on this machine, is dead. Returns how many."""
        abandoned = [name for name, life in self.temporaries().items() if life == "dead"]
        with machine_faults(f"{self.root}/{_TEMPORARY}: removing abandoned files"):
            for name in abandoned:
                self._remove_temporary(self.path(name))
        return len(abandoned)

    def tidy(self) -> None:
        """Remove what this process has not published and, if it is empty then, the folder of temporaries.

        To be called at the end of a command: a folder that came and went with each file would trip programs
        that walk the cache meanwhile.
        """
        # a disk that fails, or is gone, has been told of already: what is left is removed by another run
        with contextlib.suppress(OSError, MachineError):
            for name in self.temporaries():
                if name.startswith(f"{_TEMPORARY}/{owner_stem()}-"):
                    self._remove_temporary(self.path(name))
            self.disk.remove_directory(self.root / _TEMPORARY)

    def stop_creating(self) -> None:
        """Let no temporary file appear any more: whoever asks for one waits until this process has ended."""
        self._may_create.acquire()

    def _temporary_path(self) -> Path:
        """A name that nothing has and that tells whose it is."""
        return self.root / _TEMPORARY / f"{owner_stem()}-{uuid.uuid4().hex}"

    def _remove_temporary(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir():
                self.disk.remove_tree(path)
            else:
                self.disk.remove(path)

    def _create_temporary(self, path: Path) -> BinaryIO:
        with self._may_create:
            return self._within(path.parent, lambda: self.disk.create(path))

    def _link(self, source: Path, final: Path) -> bool:
        def link() -> bool:
            try:
                self.disk.link(source, final)
            except FileExistsError:
                return False
            return True

        return self._within(final.parent, link, source=source)

    def _within(self, directory: Path, action: Callable[[], Done], *, source: Path | None = None) -> Done:
        """Do what needs a folder of the cache; made anew where it was empty and another process has just removed it.

        Raises: FileNotFoundError where `source`, which the action needs besides, is gone.
        """
        while True:
            self._ensure_directory(directory)
            self.check_mounted()
            try:
                return action()
            except FileNotFoundError:
                self.check_mounted()
                if source is not None and not os.path.lexists(source):
                    raise
                self._durable.discard(directory)

    def _replace(self, temporary: "TemporaryFile", final: Path) -> None:
        second = self._temporary_path()
        self.disk.link(temporary.path, second)
        self.disk.rename(second, final)
        self._open_files.forget(str(final))
        self.disk.sync_directory(final.parent)

    def _ensure_directory(self, directory: Path) -> None:
        """Make a folder of the cache, and those above it, under names that outlive a power cut."""
        if directory in self._durable:
            return
        if directory == self.root:
            self._ensure_root()
        else:
            self._within(directory.parent, lambda: self._make_directory(directory))
            # also where another worker made it, who may not have come to this yet
            self.disk.sync_directory(directory.parent)
        self._durable.add(directory)

    def _make_directory(self, directory: Path) -> None:
        try:
            self.disk.make_directory(directory)
        except FileExistsError:
            if not directory.is_dir():
                raise

    def _ensure_root(self) -> None:
        self.check_mounted()
        missing = [self.root, *self.root.parents]
        missing = missing[: next(n for n, folder in enumerate(missing) if folder.exists())]
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                self.disk.make_directory(folder)
            self.disk.sync_directory(folder.parent)
        status = os.stat(self.root)
        self._root_identity = (status.st_dev, status.st_ino)

    def check_mounted(self) -> None:
        """Raise MachineError where the root is not the folder any more that was written to before."""
        if self._root_identity is None:
            return
        try:
            status = os.stat(self.root)
            same = (status.st_dev, status.st_ino) == self._root_identity
        except OSError:
            same = False
        if not same:
            raise MachineError(
                f"{self.root}: is not the folder any more that this program has written to; a mount has vanished or "
                f"the folder was replaced: bring it back and run the same command again"
            )


class TemporaryFile:
    """An open, unpublished file of a storage."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
