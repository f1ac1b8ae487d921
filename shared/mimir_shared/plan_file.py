"""The plan: which clips there are, and in which shard and row each stands. Append-only sealed Parquet files.

A later file holds the clips that are new or changed since, in shards of their own, and a tombstone for
every clip that is gone. The newest row of a key wins; older rows are superseded.

Rows are written and read in groups, so that a plan of millions of clips is never a table in memory: a worker reads the
rows of its shard, and of a plan that was changed the keys of the later files.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mimir_shared.errors import CacheError, InputError
from mimir_shared.layout import plan_name
from mimir_shared.plain_documents import parse_json
from mimir_shared.sealed import SealedTableWriter, open_sealed_table
from mimir_shared.storage.folder import LocalStorage
from mimir_shared.storage.protocol import Storage

PLAN_VERSION: Final = 1
GROUP_ROWS: Final = 65_536
"""Of a row group: what a worker reads to know one shard."""
_MAPPED_BYTES: Final = 2**26
"""A plan file of this size is mapped into memory: the workers of a machine share its pages."""

OWN_COLUMNS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("source_bytes", pa.int64()),
        pa.field("source_offset", pa.int64()),
        pa.field("bucket", pa.string()),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("removed", pa.bool_(), nullable=False),
    ]
)
"""source_bytes is null where the file was missing when planned; source_offset is set for members of a tar."""


class PlanSettings(BaseModel):
    """The footer of a plan file, under the key "mimir"."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[1] = PLAN_VERSION
    index: int = Field(ge=0)
    previous: str | None = Field(description="seal of the plan file before this one")
    preset: str | None
    buckets: tuple[str, ...] = Field(min_length=1, description="frames x height x width")
    fps: float = Field(gt=0)
    shard_size: int = Field(ge=1, description="clips in a full shard")
    seed: int
    source_root: str = Field(description="folder that relative sources are read from")
    first_shard: int = Field(ge=0)
    num_shards: int = Field(ge=0)


@dataclass(frozen=True)
class PlannedClip:
    """One row of a plan."""

    key: str
    shard: int
    row: int
    source: str
    caption: str
    source_bytes: int | None
    source_offset: int | None
    bucket: str | None
    start_s: float | None
    end_s: float | None
    removed: bool


_FIELDS = tuple(OWN_COLUMNS.names)


def hash_keys(keys: pa.Array | pa.ChunkedArray, seed: int) -> np.ndarray:
    """xxh3-64 of each key, uint64: the order of a plan file's clips.

    A hash and not a random generator: the shard of a clip depends neither on the order of the list, nor on the version
    of a library.
    """
    digest = xxhash.xxh3_64_intdigest
    return np.fromiter((digest(key.encode(), seed) for key in keys.to_pylist()), np.uint64, len(keys))


class PlanFile:
    """One plan file: rows are read by group when they are asked for. Safe between threads."""

    def __init__(self, settings: PlanSettings, file: pq.ParquetFile, seal: str) -> None:
        self.settings = settings
        self.seal = seal
        self.num_rows = int(file.metadata.num_rows)
        self._file = file
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self._begins = np.cumsum([0, *sizes])
        self._lock = threading.Lock()
        self._last: tuple[int, pa.Table] | None = None

    @cached_property
    def table(self) -> pa.Table:
        """All of it."""
        # in this thread, as mimir_shared.sealed says why
        return self._file.read(use_threads=False)

    def groups(self, names: Sequence[str]) -> Iterator[pa.Table]:
        """Some columns, group by group."""
        for group in range(len(self._begins) - 1):
            with self._lock:
                table = self._file.read_row_group(group, columns=list(names), use_threads=False)
            yield table

    def rows(self, begin: int, end: int) -> pa.Table:
        """OWN_COLUMNS of some rows; of rows that stand near one another a group is read once."""
        first = int(np.searchsorted(self._begins, begin, side="right")) - 1
        parts = []
        for group in range(first, len(self._begins) - 1):
            start = int(self._begins[group])
            if start >= end:
                break
            parts.append(self._group(group).slice(max(begin - start, 0), end - max(begin, start)))
        return pa.concat_tables(parts) if parts else OWN_COLUMNS.empty_table()

    def _group(self, group: int) -> pa.Table:
        with self._lock:
            if self._last is None or self._last[0] != group:
                self._last = group, self._file.read_row_group(group, columns=list(_FIELDS), use_threads=False)
            return self._last[1]

    def shard_clips(self, shard: int) -> list[PlannedClip]:
        """The planned clips of one shard, in row order."""
        return [PlannedClip(**row) for row in self.shard_table(shard).to_pylist()]

    def shard_table(self, shard: int) -> pa.Table:
        """The planned rows of one shard, in row order, with OWN_COLUMNS."""
        begin = (shard - self.settings.first_shard) * self.settings.shard_size
        rows = self.rows(begin, min(begin + self.settings.shard_size, self.num_rows))
        rows = rows.filter(pc.equal(rows["shard"], shard))
        assert rows["row"].to_pylist() == list(range(rows.num_rows)), f"shard {shard} of the plan has gaps"
        return rows

    def num_clips(self, shard: int) -> int:
        """How many clips are planned in one shard."""
        begin = (shard - self.settings.first_shard) * self.settings.shard_size
        return int(np.count_nonzero(self._shards[begin : begin + self.settings.shard_size] == shard))

    @cached_property
    def num_planned(self) -> int:
        """Rows that stand in a shard; the others are tombstones."""
        return int(np.count_nonzero(self._shards >= 0))

    @cached_property
    def _shards(self) -> np.ndarray:
        return np.concatenate([np.empty(0, np.int32), *(table["shard"].to_numpy() for table in self.groups(["shard"]))])

    @cached_property
    def keys(self) -> frozenset[str]:
        """Of all rows, tombstones among them."""
        return frozenset(key for table in self.groups(["key"]) for key in table["key"].to_pylist())

    @cached_property
    def hashes(self) -> np.ndarray:
        """`hash_keys` of the rows that stand in a shard, in their order, which ascends."""
        found = [np.empty(0, np.uint64)]
        found += [hash_keys(table["key"], self.settings.seed) for table in self.groups(["key"])]
        hashes = np.concatenate(found)[: self.num_planned]
        assert bool(np.all(hashes[1:] >= hashes[:-1])), f"clips of plan {self.settings.index} are not in their order"
        return hashes

    def num_among(self, keys: frozenset[str]) -> int:
        """How many rows that stand in a shard have one of these keys."""
        wanted = pa.array(sorted(keys), pa.string())
        tables = self.groups(["key", "removed"])
        return sum(
            int(pc.sum(pc.and_(pc.is_in(t["key"], value_set=wanted), pc.invert(t["removed"]))).as_py() or 0)
            for t in tables
        )

    def find(self, key: str) -> PlannedClip | None:
        """The row of a clip that stands in a shard."""
        digest = np.uint64(xxhash.xxh3_64_intdigest(key.encode(), self.settings.seed))
        begin, end = (int(np.searchsorted(self.hashes, digest, side=side)) for side in ("left", "right"))
        for row in self.rows(begin, end).to_pylist():
            if row["key"] == key:
                return PlannedClip(**row)
        return None


class Plan:
    """All plan files of a cache together."""

    def __init__(self, files: Sequence[PlanFile]) -> None:
        assert files, "a plan has at least one file"
        self.files = tuple(files)
        self._newest: dict[str, tuple[int, int]] | None = None

    @property
    def settings(self) -> PlanSettings:
        """Of the newest file; geometry and seed are the same in all."""
        return self.files[-1].settings

    @property
    def num_shards(self) -> int:
        return self.settings.first_shard + self.settings.num_shards

    def file_of(self, shard: int) -> PlanFile:
        for file in self.files:
            if file.settings.first_shard <= shard < file.settings.first_shard + file.settings.num_shards:
                return file
        raise InputError(f"shard {shard}: the plan has shards 0 to {self.num_shards - 1}")

    def shard_clips(self, shard: int) -> list[PlannedClip]:
        return self.file_of(shard).shard_clips(shard)

    def shard_table(self, shard: int) -> pa.Table:
        """As shard_clips, with OWN_COLUMNS."""
        return self.file_of(shard).shard_table(shard)

    def newest_rows(self) -> Mapping[str, tuple[int, int]]:
        """key → (shard, row) of its newest row; clips that were removed are absent."""
        if self._newest is None:
            newest: dict[str, tuple[int, int]] = {}
            for file in self.files:
                columns = [file.table[name].to_pylist() for name in ("key", "shard", "row", "removed")]
                for key, shard, row, removed in zip(*columns, strict=True):
                    if removed:
                        newest.pop(key, None)
                    else:
                        newest[key] = (shard, row)
            self._newest = newest
        return self._newest

    @property
    def num_current(self) -> int:
        """Clips that the plan holds now: neither removed nor counted twice."""
        return sum(
            file.num_planned - (file.num_among(later) if later else 0)
            for file, later in zip(self.files, self._later_keys, strict=True)
        )

    @cached_property
    def _later_keys(self) -> tuple[frozenset[str], ...]:
        """For each file, the keys of those after it: whatever they say of a key, its row here is superseded."""
        later = [frozenset[str]()]
        for file in reversed(self.files[1:]):
            later.append(later[-1] | file.keys)
        return tuple(reversed(later))

    def _superseding(self, shard: int) -> frozenset[str]:
        return self._later_keys[self.files.index(self.file_of(shard))]

    def num_current_clips(self, shard: int) -> int:
        """How many clips of a shard no later plan file changed or removed."""
        if not self._superseding(shard):
            return self.file_of(shard).num_clips(shard)
        return int(np.count_nonzero(~self.superseded_rows(shard)))

    def is_superseded(self, clip: PlannedClip) -> bool:
        """Whether a later plan file changed or removed the clip of this row."""
        return clip.key in self._superseding(clip.shard)

    def superseded_rows(self, shard: int) -> np.ndarray:
        """is_superseded of every row of a shard, boolean."""
        later = self._superseding(shard)
        if not later:
            return np.zeros(self.file_of(shard).num_clips(shard), bool)
        return np.array([key in later for key in self.shard_table(shard)["key"].to_pylist()], bool)

    def older_rows(self, clip: PlannedClip) -> list[PlannedClip]:
        """Earlier rows of the same key, newest first: what an unchanged feature can be copied from."""
        earlier = self.files[: self.files.index(self.file_of(clip.shard))]
        found = (file.find(clip.key) for file in reversed(earlier))
        return [row for row in found if row is not None]


class PlanWriter:
    """Writes a plan file; rows come in their order, in pieces of any size."""

    def __init__(self, further: pa.Schema) -> None:
        """Nothing is written yet.

        Args:
            further: the user's own columns.
        """
        self._schema = pa.schema([*OWN_COLUMNS, *further])
        self._writer = SealedTableWriter(self._schema)
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0

    def add(self, table: pa.Table) -> None:
        """Append rows; a column that they lack is null."""
        for name in self._schema.names:
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(table.num_rows, self._schema.field(name).type))
        self._waiting.append(table.select(self._schema.names).cast(self._schema))
        self._num_waiting += table.num_rows
        while self._num_waiting >= GROUP_ROWS:
            self._write_group(GROUP_ROWS)

    def finish(self, settings: PlanSettings) -> bytes:
        """The sealed bytes."""
        self._write_group(self._num_waiting)
        return self._writer.finish({"mimir": settings.model_dump_json()})

    def _write_group(self, rows: int) -> None:
        waiting = pa.concat_tables([self._schema.empty_table(), *self._waiting])
        # one chunk: how rows came in pieces must not show in the bytes
        self._writer.write(waiting.slice(0, rows).combine_chunks())
        rest = waiting.slice(rows)
        self._waiting, self._num_waiting = [rest], rest.num_rows


def write_plan(settings: PlanSettings, columns: Mapping[str, Any]) -> bytes:
    """The sealed bytes of a plan file with OWN_COLUMNS alone."""
    writer = PlanWriter(pa.schema([]))
    writer.add(pa.table({name: pa.array(columns[name], OWN_COLUMNS.field(name).type) for name in OWN_COLUMNS.names}))
    return writer.finish(settings)


def read_plan_file(data: pa.Buffer, where: str) -> PlanFile:
    """Check one plan file, whose rows are read later. Raises CacheError."""
    file, footer = open_sealed_table(data, where)
    try:
        settings = PlanSettings.model_validate(parse_json(footer.get("mimir", "null")))
    except (ValidationError, ValueError) as fault:
        raise CacheError(
            f"{where}: not a plan of version {PLAN_VERSION}: {' '.join(str(fault).splitlines()[:3])}"
        ) from fault
    return PlanFile(settings, file, footer["seal"])


def _file_bytes(storage: Storage, name: str) -> pa.Buffer:
    if isinstance(storage, LocalStorage) and storage.size(name) >= _MAPPED_BYTES:
        return pa.memory_map(str(storage.path(name))).read_buffer()
    return pa.py_buffer(storage.read(name))


def read_plan(storage: Storage) -> Plan:
    """All plan files of a cache. Raises InputError where there is none, CacheError where one is damaged."""
    names = [name for name in storage.list("plan") if name.endswith(".parquet")]
    # a listing may be late; the name of the next plan file is known
    while storage.exists(plan_name(len(names))):
        names.append(plan_name(len(names)).removeprefix("plan/"))
    if not names and isinstance(storage.root, Path) and not storage.root.is_dir():
        raise InputError(
            f"{storage.root}: no such folder; expected a cache, as `mimir-precompute plan CLIPS --cache "
            f"{storage.root}` makes it"
        )
    if not names:
        raise InputError(
            f"{storage.root}: no plan in this cache (expected {plan_name(0)}); make one: "
            f"`mimir-precompute plan CLIPS --cache {storage.root}`, or give CLIPS to `encode`"
        )
    files: list[PlanFile] = []
    for index, name in enumerate(names):
        if name != plan_name(index).removeprefix("plan/"):
            raise CacheError(f"{storage.root}/plan: found {name}, expected {plan_name(index)}; a plan file is missing")
        file = read_plan_file(_file_bytes(storage, f"plan/{name}"), f"{storage.root}/plan/{name}")
        previous = files[-1].seal if files else None
        if file.settings.previous != previous:
            raise CacheError(
                f"{storage.root}/plan/{name}: continues a plan sealed {file.settings.previous}, but the file before it "
                f"has {previous}; plan files of two caches are mixed"
            )
        files.append(file)
    return Plan(files)
