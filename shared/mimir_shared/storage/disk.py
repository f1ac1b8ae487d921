"""The operations by which a cache changes, and nothing else: a test puts a disk here that fails or loses power."""

import ctypes
import errno
import os
import shutil
from pathlib import Path
from typing import BinaryIO

_LINK_UNSUPPORTED = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
FULL = {errno.ENOSPC, errno.EDQUOT}
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1


class Disk:
    """A folder of a local or network file system. Every method raises OSError."""

    def create(self, path: Path) -> BinaryIO:
        """Open a new file to be written. Raises FileExistsError."""
        return open(path, "xb")

    def sync_file(self, file: BinaryIO) -> None:
        """Return when the bytes written so far outlive a power cut; the name may not yet."""
        file.flush()
        os.fsync(file.fileno())

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name. Raises FileExistsError; rename would overwrite."""
        try:
            os.link(source, target)
        except OSError as fault:
            if fault.errno not in _LINK_UNSUPPORTED:
                raise
            self._move_if_absent(source, target)

    def rename(self, source: Path, target: Path) -> None:
        """Move a file or a folder, over what a file's target held before."""
        os.rename(source, target)

    def remove(self, path: Path) -> None:
        os.unlink(path)

    def remove_tree(self, path: Path) -> None:
        shutil.rmtree(path)

    def make_directory(self, path: Path) -> None:
        os.mkdir(path)

    def remove_directory(self, path: Path) -> None:
        """Raises OSError where it is not empty."""
        os.rmdir(path)

    def sync_directory(self, path: Path) -> None:
        """Return when the names that the folder holds outlive a power cut."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as fault:
            if fault.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know no fsync of folders
                raise
        finally:
            os.close(descriptor)

    def _move_if_absent(self, source: Path, target: Path) -> None:
        # A file system without hard links. The kernel can rename without overwriting on most of them.
        library = ctypes.CDLL(None, use_errno=True)
        if hasattr(library, "renameat2"):
            names = (os.fsencode(source), os.fsencode(target))
            if library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE) == 0:
                return
            if ctypes.get_errno() == errno.EEXIST:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        # Nothing is exclusive here: of two workers in the same instant the second overwrites the first
        # with a record that is as whole. A torn one could never be committed again.
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        os.rename(source, target)


def describe_full(fault: OSError, root: Path, path: Path) -> OSError:
    """The same fault of a full disk, with what was written of a file below `root` and what is free there."""
    space = os.statvfs(root)
    written = path.stat().st_size if path.exists() else 0
    return OSError(
        fault.errno,
        f"{fault.strerror}: {written} bytes of a file were written and more are needed; {root} has "
        f"{space.f_bavail * space.f_frsize} bytes and {space.f_favail} files free",
    )
