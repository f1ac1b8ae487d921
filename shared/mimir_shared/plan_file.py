"""The plan: which clips there are, and in which shard and row each stands. Append-only sealed Parquet files.

A later file holds the clips that are new or changed since, in shards of their own, and a tombstone for
every clip that is gone. The newest row of a key wins; older rows are superseded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mimir_shared.errors import CacheError, InputError
from mimir_shared.layout import plan_name
from mimir_shared.plain_documents import parse_json
from mimir_shared.sealed import read_sealed_table, write_sealed_table
from mimir_shared.storage_protocol import Storage

PLAN_VERSION: Final = 1

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


class PlanFile:
    """One plan file as read from disk."""

    def __init__(self, settings: PlanSettings, table: pa.Table, seal: str) -> None:
        self.settings = settings
        self.table = table
        self.seal = seal

    def shard_clips(self, shard: int) -> list[PlannedClip]:
        """The planned clips of one shard, in row order."""
        return [PlannedClip(**row) for row in self.shard_table(shard).to_pylist()]

    def shard_table(self, shard: int) -> pa.Table:
        """The planned rows of one shard, in row order, with OWN_COLUMNS."""
        begin = (shard - self.settings.first_shard) * self.settings.shard_size
        rows = self.table.select(list(_FIELDS)).slice(begin, self.settings.shard_size)
        rows = rows.filter(pc.equal(rows["shard"], shard))
        assert rows["row"].to_pylist() == list(range(rows.num_rows)), f"shard {shard} of the plan has gaps"
        return rows

    def num_clips(self, shard: int) -> int:
        """How many clips are planned in one shard."""
        begin = (shard - self.settings.first_shard) * self.settings.shard_size
        shards = self.table["shard"].slice(begin, self.settings.shard_size)
        return int(pc.sum(pc.equal(shards, shard)).as_py() or 0)


class Plan:
    """All plan files of a cache together."""

    def __init__(self, files: Sequence[PlanFile]) -> None:
        assert files, "a plan has at least one file"
        self.files = tuple(files)
        self._newest: dict[str, tuple[int, int]] | None = None
        self._places: dict[str, list[tuple[int, int]]] | None = None

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

    def num_current_clips(self, shard: int) -> int:
        """How many clips of a shard no later plan file changed or removed."""
        if len(self.files) == 1:
            return self.files[0].num_clips(shard)
        return sum(not self.is_superseded(clip) for clip in self.shard_clips(shard))

    def is_superseded(self, clip: PlannedClip) -> bool:
        """Whether a later plan file changed or removed the clip of this row."""
        if len(self.files) == 1:
            return False
        return self.newest_rows().get(clip.key) != (clip.shard, clip.row)

    def superseded_rows(self, shard: int) -> np.ndarray:
        """is_superseded of every row of a shard, boolean."""
        if len(self.files) == 1:
            return np.zeros(self.files[0].num_clips(shard), bool)
        keys = self.shard_table(shard)["key"].to_pylist()
        newest = self.newest_rows()
        return np.array([newest.get(key) != (shard, row) for row, key in enumerate(keys)], bool)

    def older_rows(self, clip: PlannedClip) -> list[PlannedClip]:
        """Earlier rows of the same key, newest first: what an unchanged feature can be copied from."""
        if len(self.files) == 1:
            return []
        if self._places is None:
            places: dict[str, list[tuple[int, int]]] = {}
            for index, file in enumerate(self.files):
                columns = (file.table["key"].to_pylist(), file.table["removed"].to_pylist())
                for position, (key, removed) in enumerate(zip(*columns, strict=True)):
                    if not removed:
                        places.setdefault(key, []).append((index, position))
            # whole before another thread sees it
            self._places = places
        found = []
        for index, position in reversed(self._places.get(clip.key, [])):
            (row,) = self.files[index].table.select(list(_FIELDS)).slice(position, 1).to_pylist()
            if row["shard"] < clip.shard:
                found.append(PlannedClip(**row))
        return found


def write_plan(settings: PlanSettings, columns: Mapping[str, Any], extra: pa.Table | None) -> bytes:
    """The sealed bytes of a plan file; `extra` holds the user's own columns."""
    table = pa.table({name: pa.array(columns[name], OWN_COLUMNS.field(name).type) for name in OWN_COLUMNS.names})
    table = table.cast(OWN_COLUMNS)
    if extra is not None:
        for name in extra.column_names:
            table = table.append_column(name, extra[name])
    return write_sealed_table(table, {"mimir": settings.model_dump_json()})


def read_plan_file(data: bytes, where: str) -> PlanFile:
    """Check and parse one plan file. Raises CacheError."""
    table, footer = read_sealed_table(data, where)
    try:
        settings = PlanSettings.model_validate(parse_json(footer.get("mimir", "null")))
    except (ValidationError, ValueError) as fault:
        raise CacheError(
            f"{where}: not a plan of version {PLAN_VERSION}: {' '.join(str(fault).splitlines()[:3])}"
        ) from fault
    return PlanFile(settings, table, footer["seal"])


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
        file = read_plan_file(storage.read(f"plan/{name}"), f"{storage.root}/plan/{name}")
        previous = files[-1].seal if files else None
        if file.settings.previous != previous:
            raise CacheError(
                f"{storage.root}/plan/{name}: continues a plan sealed {file.settings.previous}, but the file before it "
                f"has {previous}; plan files of two caches are mixed"
            )
        files.append(file)
    return Plan(files)
