"""What a list of clips has that the plan of a cache has not, and the other way round: part by part of their order."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa

from mimir_precompute.planning.hash_order import part_places
from mimir_shared.plan_file import Plan, PlanFile, hash_keys

_CONTENT: Final = ("source", "caption", "source_bytes", "source_offset", "start_s", "end_s")
"""What makes a clip another one, if it differs."""


@dataclass
class Difference:
    """Counts, and the keys of what is gone."""

    new: int = 0
    changed: int = 0
    removed: list[str] = field(default_factory=list)

    @property
    def num_fresh(self) -> int:
        """Clips that get a row: new and changed ones."""
        return self.new + self.changed


class PlannedContents:
    """The newest rows of a plan, for each part of the order of its keys' hashes."""

    def __init__(self, plan: Plan, bounds: np.ndarray) -> None:
        self._files = [_FileParts(file, bounds) for file in plan.files]

    def compare(self, part: int, listed: pa.Table, difference: Difference) -> pa.Table:
        """Add what differs in one part to `difference`. Returns: the listed clips that are new or changed."""
        if len(self._files) == 1:
            planned = self._files[0].rows(part)
            if planned.num_rows == listed.num_rows and all(
                planned[name].equals(listed[name]) for name in ("key", *_CONTENT)
            ):
                return listed.slice(0, 0)
        contents = self._contents(part)
        fresh = np.zeros(listed.num_rows, bool)
        for number, (key, content) in enumerate(_keys_and_contents(listed)):
            old = contents.pop(key, None)
            if old is None:
                difference.new += 1
            elif old != content:
                difference.changed += 1
            fresh[number] = old != content
        difference.removed += contents
        return listed.filter(pa.array(fresh))

    def _contents(self, part: int) -> dict[str, tuple[Any, ...]]:
        contents: dict[str, tuple[Any, ...]] = {}
        for file in self._files:
            contents.update(_keys_and_contents(file.rows(part)))
            for key in file.removed(part):
                contents.pop(key, None)
        return contents


class _FileParts:
    def __init__(self, file: PlanFile, bounds: np.ndarray) -> None:
        self._file = file
        self._places = part_places(file.hashes, bounds)
        gone = file.rows(file.num_planned, file.num_rows)["key"]
        hashes = hash_keys(gone, file.settings.seed)
        order = np.argsort(hashes)
        self._gone = gone.take(order)
        self._gone_places = part_places(hashes[order], bounds)

    def rows(self, part: int) -> pa.Table:
        """The rows of one part that stand in a shard."""
        return self._file.rows(self._places[part], self._places[part + 1])

    def removed(self, part: int) -> list[str]:
        """Keys of the tombstones of one part."""
        begin, end = self._gone_places[part : part + 2]
        keys: list[str] = self._gone.slice(begin, end - begin).to_pylist()
        return keys


def _keys_and_contents(rows: pa.Table) -> Iterator[tuple[str, tuple[Any, ...]]]:
    columns = [rows[name].to_pylist() for name in _CONTENT]
    return zip(rows["key"].to_pylist(), zip(*columns, strict=True), strict=True)
