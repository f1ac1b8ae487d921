"""What a cache asks of the place that it lies in: a folder, or a prefix in a bucket.

Names are relative to the cache and use "/". A file appears whole under its name, or not at all; a listing
may be late, so that nothing is believed to be absent because a listing does not have it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from mimir_shared.process_identity import Life
from mimir_shared.storage.folder import TemporaryFile
from mimir_shared.storage.found_file import FoundFile
from mimir_shared.storage.lease_store import LeaseStore


class Storage(Protocol):
    """A cache's files."""

    @property
    def root(self) -> Path | str:
        """Folder or URL, for messages: `{root}/{name}` says where a file is."""
        ...

    def now_s(self) -> float:
        """Now, by the clock that stamps the files of the cache: clocks of hosts may be hours apart."""
        ...

    def lease_store(self) -> LeaseStore:
        """Where those who make this cache say which shard they are at."""
        ...

    def exists(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes:
        """The whole file. Raises FileNotFoundError where there is none."""
        ...

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
        Raises: FileNotFoundError where there is no such file; OSError or MachineError where it cannot be read.
        """
        ...

    def read_many(self, names: Sequence[str]) -> Iterator[bytes]:
        """Whole files in the order of their names. Raises as `read`."""
        ...

    def forget(self, name: str, offset: int, nbytes: int) -> bool:
        """To be told of a range whose bytes were not those that were committed; whether to read it once more."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError where there is none."""
        ...

    def list(self, directory: str) -> list[str]:
        """File and folder names directly below `directory`, sorted; empty where there is none."""
        ...

    def files(self, directory: str) -> Iterator[FoundFile]:
        """Every file below a folder, sorted; none where there is no such folder."""
        ...

    def check_writable(self) -> None:
        """Raise InputError early where nothing could be written."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Publish `data` under `name` if nothing has that name yet; False where something has."""
        ...

    def temporary(self) -> AbstractContextManager[TemporaryFile]:
        """A new file to be published; it is removed when the block ends, published or not."""
        ...

    def publish_content(self, temporary: TemporaryFile, name: str, sha256: str) -> None:
        """Give a written temporary file the name that follows from its content, durably.

        Where the name exists already it holds the same bytes, unless they were damaged since: then they are replaced.
        """
        ...

    def overwrite(self, name: str, data: bytes) -> None:
        """Write a file that nobody relies on, over what it held. Raises OSError, MachineError."""
        ...

    def append(self, name: str, data: bytes) -> None:
        """Add to a file that this process alone writes. Raises OSError, MachineError."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, if it is there. Raises OSError, MachineError."""
        ...

    def remove_tree(self, name: str) -> None:
        """Remove a file, or a folder with all that it holds, if it is there. Raises OSError, MachineError."""
        ...

    def remove_empty_folder(self, directory: str) -> None:
        """Remove a folder that holds nothing, where the storage has folders."""
        ...

    def set_aside(self, name: str) -> str:
        """Take a file out of the cache; it can still be read under the name returned.

        Raises: FileNotFoundError where it is gone already; OSError, MachineError.
        """
        ...

    def put_back(self, aside: str, name: str) -> None:
        """Undo `set_aside`, unless something has that name again. Raises OSError, MachineError."""
        ...

    def has_second_name(self, name: str) -> bool:
        """Whether it is known that the worker that published a file has not come to the record that will name it."""
        ...

    def temporaries(self) -> dict[str, Life]:
        """Name of each file that is to have another name, or none, soon → what is known of the process that made it."""
        ...

    def remove_abandoned(self) -> int:
        """Remove temporary files whose process, on this machine, is dead. Returns how many."""
        ...

    def exists_durably(self, name: str) -> bool:
        """As `exists`; where it does, it outlives a power cut from now on, whoever published it."""
        ...

    def settle(self, directory: str) -> None:
        """Make the names that a folder holds outlive a power cut, before something is built on them."""
        ...

    def tidy(self) -> None:
        """Remove what this process has not published, at the end of a command."""
        ...

    def stop_creating(self) -> None:
        """Let no temporary file appear any more: whoever asks for one waits until this process has ended."""
        ...
