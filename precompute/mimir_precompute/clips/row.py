"""What may stand in a row of a list of clips, and what is said of what may not."""

import reprlib
from collections.abc import Mapping

from mimir_shared.errors import InputError

SHOWN_PROBLEMS = 10
MAX_DEPTH = 50
"""Of values in the user's further columns."""


class Problems:
    """Collects what is wrong with the input, so that one error lists it all."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._found: list[str] = []

    def add(self, what: str) -> None:
        self._found.append(what)

    def raise_if_any(self) -> None:
        if self._found:
            shown = "; ".join(self._found[:SHOWN_PROBLEMS])
            more = len(self._found) - SHOWN_PROBLEMS
            rest = f"; and {more} more" if more > 0 else ""
            count = "1 problem" if len(self._found) == 1 else f"{len(self._found)} problems"
            raise InputError(f"{self._where}: {count}: {shown}{rest}; mend the input and run it again")


def caption_problem(caption: object) -> str | None:
    """Say what is wrong with a caption; None where it can be used."""
    if caption is None:
        return "no caption"
    if not isinstance(caption, str):
        return f"the caption is {type(caption).__name__}, expected text"
    if not caption.strip():
        return "empty caption"
    try:
        caption.encode()
    except UnicodeEncodeError as fault:
        return f"caption not UTF-8 (lone surrogate at character {fault.start})"
    return None


def seconds_of(value: object, name: str) -> float | None:
    if value is None or value == "" or value != value:  # NaN: how data frames write a missing number
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{name} is {reprlib.repr(value)}, expected seconds")
    seconds = float(value)
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{name} is {reprlib.repr(value)}, expected seconds from 0")
    return seconds


def text_problem(text: str) -> str | None:
    """Say why a text cannot be stored; None where it can."""
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        return f"is not UTF-8 (lone surrogate at character {fault.start})"
    return None


def name_problem(source: str) -> str | None:
    """Say why no file can have this name; None where one can."""
    return "holds a NUL character" if "\0" in source else text_problem(source)


def extra_problem(columns: Mapping[str, object]) -> str | None:
    """Say what cannot be kept of the user's further columns; None where all can."""
    for name, value in columns.items():
        if problem := text_problem(str(name)):
            return f"the name of column {str(name)!a} {problem}"
        if isinstance(value, list | dict) and _depth_is_above(value, MAX_DEPTH):
            return f"{name!r} is nested more than {MAX_DEPTH} deep"
    return None


def _depth_is_above(value: object, limit: int) -> bool:
    """Without recursion: what is asked is whether recursion would be safe."""
    level = [value]
    for _ in range(limit + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True
