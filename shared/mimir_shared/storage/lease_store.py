"""What leases ask of the place that a cache lies in: small files that their owners keep touching.

Times are those of the place's own clock, which stamps what is written there: clocks of hosts may be hours apart.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class StoredLease:
    """A lease as it lies there."""

    name: str
    owner: bytes
    """What it was created with; empty where that is not whole."""
    touched_s: float
    version: tuple[str, str] = ("", "")
    """Entity tag and version, where the place gives them: other ones after each change."""


class HeldLease(Protocol):
    """A lease that this process has created."""

    def touch(self) -> None:
        """Say that its owner lives. Nothing happens to one that was taken over. Raises OSError, MachineError."""
        ...

    def drop(self) -> None:
        """Give it back. Nothing happens to one that was taken over. Raises OSError, MachineError."""
        ...


class LeaseStore(Protocol):
    """Where leases lie. Safe between threads; names are relative to the cache."""

    @property
    def root(self) -> Path | str:
        """Of the cache, for messages."""
        ...

    @property
    def poll_s(self) -> float:
        """How often a worker that waits may look, at most."""
        ...

    def now_s(self) -> float:
        """Now, by the clock that stamps the leases. Raises MachineError."""
        ...

    def list(self, directory: str) -> list[str]:
        """Names directly below `directory`, sorted; empty where there is none. Raises MachineError."""
        ...

    def create(self, name: str, owner: bytes) -> HeldLease | None:
        """Create a lease that names its owner from the first moment on; None where somebody has it.

        Raises: OSError, MachineError.
        """
        ...

    def read(self, name: str) -> StoredLease | None:
        """None where there is no such lease (any more)."""
        ...

    def remove(self, seen: StoredLease) -> bool:
        """Remove a lease that is still as it was seen. Of several workers that try at once, one succeeds."""
        ...

    def tidy(self, directories: Iterable[str]) -> None:
        """Remove folders that are empty, where the place has folders."""
        ...
