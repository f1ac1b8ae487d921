"""The order of a plan: by the hash of the key. A list of any length is put into it part by part."""

from collections.abc import Iterator
from typing import Final

import numpy as np
import pyarrow as pa

from mimir_precompute.clips.columns import ClipList

PART_CLIPS: Final = 65_536


class HashOrder:
    """Clips by (hash, key), in parts that each hold a range of hashes."""

    def __init__(self, clips: ClipList, seed: int, *, at_least: int = 0) -> None:
        """Take the clips out of their list, and sort each of its tables on its own.

        Args:
            at_least: clips of another list, that is compared part by part: a part is to have no more of it either.
        """
        self._tables: list[pa.Table] = []
        self._hashes: list[np.ndarray] = []
        for table, hashes in clips.give_away(seed):
            order = np.argsort(hashes)
            self._tables.append(table.take(order))
            self._hashes.append(hashes[order])
        self.schema = self._tables[0].schema if self._tables else pa.schema([])
        num_parts = max(len(clips), at_least) // PART_CLIPS + 1
        self.bounds = np.array([part * 2**64 // num_parts for part in range(1, num_parts)], np.uint64)
        """Hashes at which a part ends and the next one begins."""

    def __iter__(self) -> Iterator[pa.Table]:
        places = [part_places(hashes, self.bounds) for hashes in self._hashes]
        for part in range(len(self.bounds) + 1):
            begins, ends = ([place[part + side] for place in places] for side in (0, 1))
            pieces = zip(self._tables, self._hashes, begins, ends, strict=True)
            slices = [(table.slice(a, b - a), hashes[a:b]) for table, hashes, a, b in pieces]
            table = pa.concat_tables([self.schema.empty_table(), *(one for one, _ in slices)]).combine_chunks()
            yield table.take(_order(np.concatenate([np.empty(0, np.uint64), *(one for _, one in slices)]), table))


def part_places(hashes: np.ndarray, bounds: np.ndarray) -> list[int]:
    """Where in sorted hashes each part begins, and the last one ends."""
    return [0, *(int(place) for place in np.searchsorted(hashes, bounds)), len(hashes)]


def _order(hashes: np.ndarray, table: pa.Table) -> np.ndarray:
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    if np.any(ordered[1:] == ordered[:-1]):  # two keys of one hash: by key then
        keys = table["key"].to_pylist()
        order = np.array(sorted(order.tolist(), key=lambda n: (int(hashes[n]), keys[n])))
    return order
