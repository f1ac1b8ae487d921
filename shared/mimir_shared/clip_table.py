"""The clips of a snapshot's index: who they are, and which of them are of one bucket."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One clip of a snapshot."""

    key: str
    shard: int
    row: int
    bucket: str
    caption: str
    source: str

    def __str__(self) -> str:
        return f"{self.key!r} (shard {self.shard}, row {self.row}, source {self.source})"


class ClipTable:
    """Clips by number, which is their row of the index."""

    def __init__(self, index: pa.Table) -> None:
        """Of an index in one chunk."""
        self._columns = {name: index[name].combine_chunks() for name in ("key", "bucket", "caption", "source")}
        # of a cache without latents: nothing has decided it yet
        self._columns["bucket"] = self._columns["bucket"].fill_null("")
        self.shards = index["shard"].to_numpy()
        """(clips,) the shard of each."""
        self._rows = index["row"].to_numpy()

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> Clip:
        text = {name: column[number].as_py() for name, column in self._columns.items()}
        return Clip(shard=int(self.shards[number]), row=int(self._rows[number]), **text)

    def keys(self) -> Iterator[str]:
        for start in range(0, len(self), 4096):
            yield from self._columns["key"].slice(start, 4096).to_pylist()

    def number_of(self, key: str) -> int | None:
        """The number of a clip; None for a key that is not here."""
        return self._numbers.get(key)

    @cached_property
    def numbers_of_bucket(self) -> dict[str, np.ndarray]:
        """bucket → the numbers of its clips, by shard and row; buckets by name."""
        names = self._columns["bucket"].dictionary_encode()
        codes = names.indices.to_numpy(zero_copy_only=False)
        order = np.lexsort((self._rows, self.shards))
        return {
            name: order[codes[order] == code]
            for name, code in sorted((name, code) for code, name in enumerate(names.dictionary.to_pylist()))
        }

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {key: number for number, key in enumerate(self.keys())}
