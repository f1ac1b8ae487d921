"""Snapshots: the commit records that a training run pins, merged into one index for fast opening.

`snapshot.json` names every record by its seal; `index.arrow` has one row per clip that is ok in every
feature, with the place of its bytes. Both follow from the records alone, so equal caches have equal
snapshots, and the digest names the data of a training run.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mimir_shared.errors import CacheError, InputError
from mimir_shared.feature_folder import FeatureFolder
from mimir_shared.features import FEATURES, FeatureName
from mimir_shared.layout import feature_directory, snapshot_directory
from mimir_shared.manifest import CacheFormat, RecordMetadata, TensorStatistics
from mimir_shared.plain_documents import parse_json
from mimir_shared.plan_file import Plan
from mimir_shared.statistics import merge_statistics
from mimir_shared.storage.protocol import Storage

_UNDIGESTED: Final = frozenset(("version", "sequence", "digest"))
SNAPSHOT_VERSION: Final = 2


class SnapshotFeature(BaseModel):
    """One feature of a snapshot."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    fingerprint: str
    format: CacheFormat
    identity: dict[str, Any]
    records: tuple[tuple[int, int, str], ...] = Field(description="shard, generation, seal of its commit record")
    files: tuple[str, ...] = Field(description="data files, relative to the cache; the index counts into this list")
    statistics: dict[str, TensorStatistics]


class Snapshot(BaseModel):
    """snapshot.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[2] = SNAPSHOT_VERSION
    sequence: int = Field(ge=0, description="how many snapshots the cache had before; not part of the digest")
    digest: str = Field(pattern="^[0-9a-f]{64}$", description="sha256 over everything below")
    plans: tuple[str, ...] = Field(description="seals of the plan files")
    preset: str | None
    buckets: tuple[str, ...]
    fps: float
    clips: int = Field(ge=0, description="rows of the index: clips that are ok in every feature")
    left_out: dict[str, int] = Field(description="planned clips that are not in the index, counted by feature:reason")
    index_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    features: dict[FeatureName, SnapshotFeature]

    @property
    def directory(self) -> str:
        return snapshot_directory(self.digest)


_COPIED_COLUMNS: Final = ("xxh3", "json_offset", "json_nbytes", "json_xxh3")
"""Of a commit record, as they stand."""


def incomplete_shards(plan: Plan, folders: Iterable[FeatureFolder]) -> dict[FeatureName, int]:
    """feature → shards without a commit record, for features that are not complete."""
    missing = {folder.feature: plan.num_shards - len(folder.generations()) for folder in folders}
    return {feature: count for feature, count in missing.items() if count}


def write_snapshot(storage: Storage, plan: Plan, folders: Mapping[FeatureName, FeatureFolder]) -> Snapshot:
    """Merge the newest commit records of complete features and publish the snapshot.

    The same records give the same digest: then the snapshot that exists is returned.
    Raises: InputError where a shard of a feature is not committed; CacheError where a record is damaged.
    """
    missing = incomplete_shards(plan, folders.values())
    if missing or not folders:
        counts = ", ".join(f"{feature}: {count} of {plan.num_shards} shards" for feature, count in missing.items())
        raise InputError(
            f"{storage.root}: the cache is not finished ({counts or 'no feature yet'} missing); "
            f"run `mimir-precompute encode --cache {storage.root} --shards all` with the same models"
        )
    builder = _IndexBuilder(plan, folders)
    for shard in range(plan.num_shards):
        builder.add_shard(shard)
    index = builder.index()
    index_bytes = _to_bytes(index)
    content = {
        "plans": [file.seal for file in plan.files],
        "preset": plan.settings.preset,
        "buckets": list(plan.settings.buckets),
        "fps": plan.settings.fps,
        "clips": index.num_rows,
        "left_out": dict(sorted(builder.left_out.items())),
        "index_sha256": hashlib.sha256(index_bytes).hexdigest(),
        "features": {
            feature: json.loads(builder.feature(feature).model_dump_json())
            for feature in FEATURES
            if feature in folders
        },
    }
    digest = _digest(content)
    existing = list_snapshots(storage)
    for snapshot in existing:
        if snapshot.digest == digest:
            storage.settle(snapshot.directory)
            return snapshot
    sequence = max((snapshot.sequence + 1 for snapshot in existing), default=0)
    snapshot = Snapshot.model_validate({"sequence": sequence, "digest": digest, **content})
    for folder in folders.values():
        # other workers' records among them, of whose fsync nothing is known
        storage.settle(f"{folder.directory}/manifests")
    storage.create(f"{snapshot.directory}/index.arrow", index_bytes)
    # last, for a snapshot exists when its snapshot.json does
    storage.create(f"{snapshot.directory}/snapshot.json", snapshot.model_dump_json(indent=1).encode() + b"\n")
    # once more: between the two, `gc` may have taken it for what a killed process left
    storage.create(f"{snapshot.directory}/index.arrow", index_bytes)
    return snapshot


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _IndexBuilder:
    """Collects the rows of the index, shard by shard, as tables: a snapshot may have hundreds of thousands."""

    def __init__(
        self,
        plan: Plan,
        folders: Mapping[FeatureName, FeatureFolder],
        generations: Mapping[FeatureName, Mapping[int, int]] | None = None,
    ) -> None:
        """Of the newest commit records, or of other `generations` of each shard."""
        self._plan = plan
        self._folders = folders
        self._tables: list[pa.Table] = []
        self._files: dict[FeatureName, list[str]] = {feature: [] for feature in folders}
        self._records: dict[FeatureName, list[tuple[int, int, str]]] = {feature: [] for feature in folders}
        self._statistics: dict[FeatureName, list[dict[str, TensorStatistics]]] = {feature: [] for feature in folders}
        newest = {feature: folder.generations() for feature, folder in folders.items()}
        self._tables_of = {
            feature: _tables_in_order(plan, folder, (generations or newest)[feature])
            for feature, folder in folders.items()
        }
        self.left_out: dict[str, int] = {}

    def add_shard(self, shard: int) -> None:
        """Append the clips of the next shard that are ok in every feature, and count the others. Raises CacheError."""
        planned = self._plan.shard_table(shard)
        records: dict[FeatureName, pa.Table] = {}
        footers: dict[FeatureName, RecordMetadata] = {}
        for feature, folder in self._folders.items():
            records[feature], footers[feature], seal = next(self._tables_of[feature])
            generation = footers[feature].generation
            if not records[feature]["key"].equals(planned["key"]):
                raise CacheError(
                    f"{folder.storage.root}/{folder.record_path(shard, generation)}: its keys are not those of the plan"
                )
            self._records[feature].append((shard, generation, seal))
            self._statistics[feature].append(footers[feature].statistics)
        kept = self._kept_rows(shard, planned, records)
        buckets = pc.coalesce(*(record["bucket"] for record in records.values()), planned["bucket"])
        columns = {name: planned[name] for name in ("key", "shard", "row")}
        columns |= {"bucket": buckets, "caption": planned["caption"], "source": planned["source"]}
        clips = pa.table(columns).filter(kept)
        for feature in FEATURES:
            if feature in records:
                places = self._places(feature, footers[feature], records[feature].filter(kept))
                clips = clips.append_column(feature, places)
        self._tables.append(clips)

    def _kept_rows(self, shard: int, planned: pa.Table, records: Mapping[FeatureName, pa.Table]) -> pa.Array:
        """Boolean: the rows that are ok in every feature and that no later plan file superseded."""
        kept = ~self._plan.superseded_rows(shard)
        self._leave_out("plan:superseded", int(np.count_nonzero(~kept)))
        for feature, record in records.items():
            failed = kept & pc.not_equal(record["status"], "ok").to_numpy()
            for reason in record["reason"].filter(pa.array(failed)).to_pylist():
                self._leave_out(f"{feature}:{reason}", 1)
            kept &= ~failed
        return pa.array(kept)

    def _leave_out(self, reason: str, count: int) -> None:
        if count:
            self.left_out[reason] = self.left_out.get(reason, 0) + count

    def _places(self, feature: FeatureName, footer: RecordMetadata, rows: pa.Table) -> pa.StructArray:
        """The index column of a feature for rows of one shard that are all ok."""
        where = f"{self._folders[feature].storage.root}: {feature} shard {footer.shard}"
        rows = rows.combine_chunks()
        if rows["json_offset"].null_count or rows["tensors"].null_count:
            raise CacheError(
                f"{feature} shard {footer.shard}: a row is ok without bytes; see `mimir-precompute verify`"
            )
        directory = feature_directory(feature, self._folders[feature].fingerprint)
        entries = pc.list_flatten(_only_chunk(rows["tensors"]))
        json_file, tensor_file = rows["json_file"].to_numpy(), pc.struct_field(entries, "file").to_numpy()
        # The index counts into one list of all files that hold a sample's bytes, a record into its own.
        used = np.unique(np.concatenate([json_file, tensor_file]))
        numbers = np.zeros(len(footer.files), np.int32)
        numbers[used] = len(self._files[feature]) + np.arange(len(used))
        self._files[feature] += [f"{directory}/{footer.files[number].path}" for number in used]
        fields = {name: _only_chunk(rows[name]) for name in _COPIED_COLUMNS}
        fields["json_file"] = pa.array(numbers[json_file])
        tensors = _tensor_places(entries, numbers[tensor_file], rows.num_rows, where)
        if tensors is not None:
            fields["tensors"] = tensors
        return pa.StructArray.from_arrays(list(fields.values()), names=list(fields))

    def index(self) -> pa.Table:
        """Columns of the clip, and for each feature a struct of where its bytes lie."""
        # a shard without a clip has no tensors to tell its columns from
        tables = [table for table in self._tables if table.num_rows] or self._tables[:1]
        return pa.concat_tables(tables).combine_chunks()

    def feature(self, feature: FeatureName) -> SnapshotFeature:
        spec = self._folders[feature].read_spec()
        return SnapshotFeature(
            fingerprint=spec.fingerprint,
            format=spec.format,
            identity=spec.identity,
            records=tuple(self._records[feature]),
            files=tuple(self._files[feature]),
            statistics=merge_statistics(self._statistics[feature]),
        )


def _only_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _tensor_places(entries: pa.StructArray, files: np.ndarray, num_rows: int, where: str) -> pa.StructArray | None:
    """One struct of (file, offset, nbytes, shape) for each tensor of a feature, named by it, in stored order.

    Args:
        entries: the `tensors` of all rows, one after the other.
        files: the file of each entry, as the index numbers them.
    Returns: None for a feature without tensors.
    Raises: CacheError where a row has other tensors than its neighbours.
    """
    if not num_rows or not len(entries):
        return None
    names = pc.struct_field(entries, "name").to_pylist()
    per_row = len(names) // num_rows
    if names != names[:per_row] * num_rows:
        raise CacheError(f"{where}: its rows have different tensors; see `mimir-precompute verify`")
    places = {}
    for number, name in enumerate(names[:per_row]):
        own = entries.take(pa.array(np.arange(number, len(names), per_row)))
        shapes = pc.struct_field(own, "shape")
        num_dims = len(shapes[0])
        places[name] = pa.StructArray.from_arrays(
            [
                pa.array(files[number::per_row]),
                pc.struct_field(own, "offset"),
                pc.struct_field(own, "nbytes"),
                shapes.cast(pa.list_(pa.int32(), num_dims)),
            ],
            names=["file", "offset", "nbytes", "shape"],
        )
    return pa.StructArray.from_arrays(list(places.values()), names=list(places))


def _to_bytes(table: pa.Table) -> bytes:
    """As an Arrow IPC file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _tables_in_order(
    plan: Plan, folder: FeatureFolder, generations: Mapping[int, int]
) -> Iterator[tuple[pa.Table, RecordMetadata, str]]:
    return folder.read_record_tables({shard: generations[shard] for shard in range(plan.num_shards)})


def list_snapshots(storage: Storage) -> list[Snapshot]:
    """Every snapshot of a cache, oldest first. Raises CacheError for one that does not parse."""
    found = [read_snapshot(storage, f"snapshots/{name}") for name in storage.list("snapshots")]
    return sorted((snapshot for snapshot in found if snapshot), key=lambda snapshot: snapshot.sequence)


def readable_snapshots(storage: Storage) -> Iterator[Snapshot]:
    """As list_snapshots, in any order and without those that are damaged."""
    for name in storage.list("snapshots"):
        with suppress(CacheError):
            snapshot = read_snapshot(storage, f"snapshots/{name}")
            if snapshot is not None:
                yield snapshot


def read_snapshot(storage: Storage, directory: str) -> Snapshot | None:
    """None where there is none (yet). Raises CacheError for one that is not as it was written."""
    path = f"{directory}/snapshot.json"
    try:
        document = parse_json(storage.read(path))
        snapshot = Snapshot.model_validate(document)
    except FileNotFoundError:
        return None
    except (ValidationError, ValueError) as fault:
        raise CacheError(f"{storage.root}/{path}: not readable: {' '.join(str(fault).splitlines()[:3])}") from fault
    content = {name: value for name, value in document.items() if name not in _UNDIGESTED}
    if _digest(content) != snapshot.digest or snapshot.directory != directory:
        raise CacheError(
            f"{storage.root}/{path}: its content does not have the digest {snapshot.digest[:12]} that it names, or its "
            f"folder another; it was edited or damaged: run `mimir-precompute verify --repair`"
        )
    return snapshot


def rebuild_index(storage: Storage, plan: Plan, snapshot: Snapshot) -> bytes:
    """The bytes of a snapshot's index, from the commit records that it names.

    Raises: CacheError where they do not give the index that the snapshot names any more.
    """
    files = plan.files[: len(snapshot.plans)]
    folders = {name: FeatureFolder(storage, name, one.fingerprint) for name, one in snapshot.features.items()}
    generations = {name: {r[0]: r[1] for r in one.records} for name, one in snapshot.features.items()}
    builder = _IndexBuilder(Plan(files), folders, generations)
    for shard in range(Plan(files).num_shards):
        builder.add_shard(shard)
    data = _to_bytes(builder.index())
    if hashlib.sha256(data).hexdigest() != snapshot.index_sha256:
        raise CacheError(
            f"{storage.root}/{snapshot.directory}: the commit records that it names do not give its index any more; "
            f"run `mimir-precompute finalize {storage.root}` for a snapshot of what the cache holds now"
        )
    return data


def read_index(storage: Storage, snapshot: Snapshot) -> pa.Table:
    """The index of a snapshot, checked against its sha256. Raises CacheError."""
    name = f"{snapshot.directory}/index.arrow"
    try:
        data = storage.read(name)
    except FileNotFoundError as fault:
        raise CacheError(f"{storage.root}/{name}: missing; write it again: `mimir-precompute finalize`") from fault
    if hashlib.sha256(data).hexdigest() != snapshot.index_sha256:
        raise CacheError(
            f"{storage.root}/{name}: its sha256 is not the one in snapshot.json; it is damaged: remove the folder "
            f"{snapshot.directory} and run `mimir-precompute finalize {storage.root}`"
        )
    return pa.ipc.open_file(pa.BufferReader(data)).read_all()
