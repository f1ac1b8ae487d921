"""A file of a cache, as a listing has it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FoundFile:
    """Where it lies, how large it is, and when it was last written."""

    name: str
    """Relative to the cache."""
    nbytes: int
    modified_s: float
    """By the clock of the storage."""
