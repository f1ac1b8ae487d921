"""Snapshots: the commit records that a training run pins, merged into one index for fast opening.

`snapshot.json` names every record by its seal; `index.arrow` has one row per clip that is ok in every
feature, with the place of its bytes. Both follow from the records alone, so equal caches have equal
snapshots, and the digest names the data of a training run.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mimir_shared.errors import CacheError, InputError
from mimir_shared.feature_folder import FeatureFolder
from mimir_shared.features import FEATURES, FeatureName
from mimir_shared.layout import feature_directory, snapshot_directory
from mimir_shared.manifest import CacheFormat, CommitRecord, TensorStatistics
from mimir_shared.plan_file import Plan
from mimir_shared.statistics import merge_statistics
from mimir_shared.storage import LocalStorage

SNAPSHOT_VERSION: Final = 1


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
    version: Literal[1] = SNAPSHOT_VERSION
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


@dataclass
class _FeatureColumns:
    """The index columns of one feature while they are filled."""

    file: list[int]
    json_offset: list[int]
    json_nbytes: list[int]
    json_xxh3: list[int]
    offset: list[int | None]
    nbytes: list[int | None]
    xxh3: list[int | None]
    tensors: list[list[dict[str, Any]]]


_CLIP_COLUMNS = ("key", "shard", "row", "bucket", "caption", "source")
_PLACE = pa.struct([("name", pa.string()), ("dtype", pa.string()), ("shape", pa.list_(pa.int32()))])


def incomplete_shards(plan: Plan, folders: Iterable[FeatureFolder]) -> dict[FeatureName, int]:
    """feature → shards without a commit record, for features that are not complete."""
    missing = {folder.feature: plan.num_shards - len(folder.generations()) for folder in folders}
    return {feature: count for feature, count in missing.items() if count}


def write_snapshot(storage: LocalStorage, plan: Plan, folders: Mapping[FeatureName, FeatureFolder]) -> Snapshot:
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
    index = builder.index_bytes()
    content = {
        "plans": [file.seal for file in plan.files],
        "preset": plan.settings.preset,
        "buckets": list(plan.settings.buckets),
        "fps": plan.settings.fps,
        "clips": builder.clips,
        "left_out": dict(sorted(builder.left_out.items())),
        "index_sha256": hashlib.sha256(index).hexdigest(),
        "features": {
            feature: json.loads(builder.feature(feature).model_dump_json())
            for feature in FEATURES
            if feature in folders
        },
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    existing = list_snapshots(storage)
    for snapshot in existing:
        if snapshot.digest == digest:
            return snapshot
    sequence = max((snapshot.sequence + 1 for snapshot in existing), default=0)
    snapshot = Snapshot.model_validate({"sequence": sequence, "digest": digest, **content})
    storage.create(f"{snapshot.directory}/index.arrow", index)
    # last, for a snapshot exists when its snapshot.json does
    storage.create(f"{snapshot.directory}/snapshot.json", snapshot.model_dump_json(indent=1).encode() + b"\n")
    return snapshot


class _IndexBuilder:
    """Collects the rows of the index, shard by shard."""

    def __init__(self, plan: Plan, folders: Mapping[FeatureName, FeatureFolder]) -> None:
        self._plan = plan
        self._folders = folders
        self._clip_columns: dict[str, list[Any]] = {
            n: [] for n in ("key", "shard", "row", "bucket", "caption", "source")
        }
        self._columns = {feature: _FeatureColumns(*([] for _ in range(8))) for feature in folders}
        self._files: dict[FeatureName, list[str]] = {feature: [] for feature in folders}
        self._records: dict[FeatureName, list[tuple[int, int, str]]] = {feature: [] for feature in folders}
        self._statistics: dict[FeatureName, list[dict[str, TensorStatistics]]] = {feature: [] for feature in folders}
        self._generations = {feature: folder.generations() for feature, folder in folders.items()}
        self.left_out: dict[str, int] = {}

    @property
    def clips(self) -> int:
        return len(self._clip_columns["key"])

    def add_shard(self, shard: int) -> None:
        planned = self._plan.shard_clips(shard)
        records: dict[FeatureName, CommitRecord] = {}
        for feature, folder in self._folders.items():
            generation = self._generations[feature][shard]
            record = folder.read_record(shard, generation)
            if [s.key for s in record.samples] != [clip.key for clip in planned]:
                raise CacheError(
                    f"{folder.storage.root}/{folder.record_path(shard, generation)}: its keys are not those of the plan"
                )
            self._records[feature].append((shard, generation, record.seal))
            self._statistics[feature].append(record.metadata.statistics)
            (data_file,) = record.metadata.files
            self._files[feature].append(f"{feature_directory(feature, folder.fingerprint)}/{data_file.path}")
            records[feature] = record
        for row, clip in enumerate(planned):
            failed = next((f for f, record in records.items() if record.samples[row].status != "ok"), None)
            if self._plan.is_superseded(clip):
                self._leave_out("plan:superseded")
            elif failed is not None:
                self._leave_out(f"{failed}:{records[failed].samples[row].reason}")
            else:
                buckets = [r.samples[row].bucket for r in records.values() if r.samples[row].bucket]
                values = (clip.key, shard, row, buckets[0] if buckets else clip.bucket, clip.caption, clip.source)
                for column, value in zip(self._clip_columns.values(), values, strict=True):
                    column.append(value)
                for feature, record in records.items():
                    self._add_place(feature, record, row)

    def _leave_out(self, reason: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def _add_place(self, feature: FeatureName, record: CommitRecord, row: int) -> None:
        stored = record.samples[row].stored
        assert stored is not None, f"{feature} shard {record.metadata.shard} row {row} is ok without bytes"
        columns = self._columns[feature]
        columns.file.append(len(self._files[feature]) - 1)
        columns.json_offset.append(stored.json_offset)
        columns.json_nbytes.append(stored.json_nbytes)
        columns.json_xxh3.append(stored.json_xxh3)
        columns.offset.append(stored.tensors[0].offset if stored.tensors else None)
        columns.nbytes.append(sum(t.nbytes for t in stored.tensors) if stored.tensors else None)
        columns.xxh3.append(stored.xxh3)
        columns.tensors.append([{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in stored.tensors])

    def index_bytes(self) -> bytes:
        """The Arrow IPC file: columns of the clip, and for each feature a struct of where its bytes lie."""
        arrays: dict[str, pa.Array] = {
            name: pa.array(values, pa.int32() if name in ("shard", "row") else pa.string())
            for name, values in self._clip_columns.items()
        }
        for feature in FEATURES:
            if feature in self._columns:
                columns = self._columns[feature]
                arrays[feature] = pa.StructArray.from_arrays(
                    [
                        pa.array(columns.file, pa.int32()),
                        pa.array(columns.json_offset, pa.int64()),
                        pa.array(columns.json_nbytes, pa.int64()),
                        pa.array(columns.json_xxh3, pa.uint64()),
                        pa.array(columns.offset, pa.int64()),
                        pa.array(columns.nbytes, pa.int64()),
                        pa.array(columns.xxh3, pa.uint64()),
                        pa.array(columns.tensors, pa.list_(_PLACE)),
                    ],
                    names=["file", "json_offset", "json_nbytes", "json_xxh3", "offset", "nbytes", "xxh3", "tensors"],
                )
        table = pa.table(arrays)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue())

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


def list_snapshots(storage: LocalStorage) -> list[Snapshot]:
    """Every snapshot of a cache, oldest first. Raises CacheError for one that does not parse."""
    snapshots = []
    for name in storage.list("snapshots"):
        path = f"snapshots/{name}/snapshot.json"
        if not storage.exists(path):
            continue
        try:
            snapshots.append(Snapshot.model_validate(json.loads(storage.read(path))))
        except (ValidationError, ValueError) as fault:
            raise CacheError(f"{storage.root}/{path}: not readable: {' '.join(str(fault).splitlines()[:3])}") from fault
    return sorted(snapshots, key=lambda snapshot: snapshot.sequence)


def read_index(storage: LocalStorage, snapshot: Snapshot) -> pa.Table:
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
