"""Commit records: one sealed Parquet file per (feature, shard, generation), and the truth about that shard.

A shard is done exactly when its record exists. The record holds one row per planned clip, what became of
it, and where its bytes lie; nothing of clocks, hosts or folders, so that equal runs give equal records.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mimir_shared.errors import CacheError
from mimir_shared.features import FeatureName
from mimir_shared.plain_documents import parse_json
from mimir_shared.safetensors_bytes import TensorPlace
from mimir_shared.sealed import read_sealed_metadata, read_sealed_table, write_sealed_table

Status = Literal["ok", "quarantined"]
CacheFormat = Literal["webdataset", "zarr"]
RECORD_VERSION: Final = 2


class DataFile(BaseModel):
    """A data file of a shard, relative to the feature's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class TensorStatistics(BaseModel):
    """Of the values of one tensor over the valid rows of a shard; one entry per channel.

    A tensor without a channel dim has a single entry.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    count: int = Field(ge=0, description="values per channel")
    mean: tuple[float, ...]
    variance: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]


class RecordMetadata(BaseModel):
    """The footer of a commit record, under the key "mimir"."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[2] = RECORD_VERSION
    feature: FeatureName
    shard: int = Field(ge=0)
    generation: int = Field(ge=0)
    format: CacheFormat
    fingerprint: str = Field(pattern="^[0-9a-f]{64}$", description="of the identity in spec.json")
    plan: str = Field(pattern="^[0-9a-f]{64}$", description="seal of the plan file that this shard belongs to")
    files: tuple[DataFile, ...]
    ok: int = Field(ge=0)
    quarantined: int = Field(ge=0)
    statistics: dict[str, TensorStatistics]


@dataclass(frozen=True, kw_only=True)
class StoredSample:
    """Where the bytes of one sample lie in the data files of its shard."""

    json_file: int = 0
    """Index into the record's `metadata.files`, as in TensorPlace."""
    json_offset: int
    json_nbytes: int
    json_xxh3: int
    tensors: tuple[TensorPlace, ...] = ()
    """In the order of safetensors_bytes.stored_order, in either format."""
    xxh3: int | None = None
    """xxh3-64 over the tensors' bytes, one after the other in that order; None for a feature without tensors."""


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """What became of one planned clip."""

    row: int
    key: str
    status: Status
    stage: str | None = None
    """Where a quarantined clip failed: plan, fetch, decode, encode, or the feature that it depended on."""
    reason: str | None = None
    detail: str | None = None
    attempt: int | None = None
    """How many times a quarantined clip was tried; None where it is ok, and where there was nothing to try."""
    bucket: str | None = None
    source_xxh3: int | None = None
    """Of what the feature was made from besides the caption: the source's bytes (`latents`), the text of the clip's
    `answers` (`llm`)."""
    caption_xxh3: int
    stored: StoredSample | None = None


_TENSOR_TYPE = pa.struct(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("shape", pa.list_(pa.int64()), nullable=False),
        pa.field("file", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("nbytes", pa.int64(), nullable=False),
    ]
)

RECORD_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("stage", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("attempt", pa.int32()),
        pa.field("bucket", pa.string()),
        pa.field("source_xxh3", pa.uint64()),
        pa.field("caption_xxh3", pa.uint64(), nullable=False),
        pa.field("tensors", pa.list_(_TENSOR_TYPE)),
        pa.field("xxh3", pa.uint64()),
        pa.field("json_file", pa.int32()),
        pa.field("json_offset", pa.int64()),
        pa.field("json_nbytes", pa.int64()),
        pa.field("json_xxh3", pa.uint64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class CommitRecord:
    """A commit record as read from disk."""

    metadata: RecordMetadata
    samples: tuple[SampleRecord, ...]
    seal: str


def write_record(metadata: RecordMetadata, samples: Sequence[SampleRecord]) -> bytes:
    """The sealed bytes of a commit record."""
    assert [s.row for s in samples] == list(range(len(samples))), "a record has one row per planned clip, in order"
    assert metadata.ok == sum(s.status == "ok" for s in samples), f"counts {metadata.ok} do not fit the rows"
    table = pa.Table.from_pylist([_to_row(sample) for sample in samples], schema=RECORD_SCHEMA)
    return write_sealed_table(table, {"mimir": metadata.model_dump_json()})


def read_record(data: bytes, where: str) -> CommitRecord:
    """Check and parse a commit record. Raises CacheError naming `where`."""
    table, metadata, seal = read_record_table(data, where)
    return CommitRecord(metadata=metadata, samples=tuple(_from_row(row) for row in table.to_pylist()), seal=seal)


def read_record_table(data: bytes, where: str) -> tuple[pa.Table, RecordMetadata, str]:
    """As read_record, with the rows as a table of RECORD_SCHEMA, and the seal."""
    table, footer = read_sealed_table(data, where)
    metadata = _parse_metadata(footer, where)
    if table.schema != RECORD_SCHEMA:
        raise CacheError(f"{where}: the columns are {table.schema.names}, expected {RECORD_SCHEMA.names}")
    return table, metadata, footer["seal"]


def read_record_metadata(data: bytes, where: str) -> tuple[RecordMetadata, str]:
    """The footer alone and the seal, for counting. Raises CacheError."""
    footer = read_sealed_metadata(data, where)
    return _parse_metadata(footer, where), footer["seal"]


def _parse_metadata(footer: dict[str, str], where: str) -> RecordMetadata:
    if "mimir" not in footer:
        raise CacheError(f"{where}: no commit record of ours: its footer has {sorted(footer)}, expected 'mimir'")
    try:
        document = parse_json(footer["mimir"])
        version = document.get("version") if isinstance(document, dict) else None
        if version != RECORD_VERSION:
            raise CacheError(
                f"{where}: a commit record of version {version}, expected {RECORD_VERSION}; it was written by another "
                f"release of this program: read it with that one, or encode into a new --cache"
            )
        return RecordMetadata.model_validate(document)
    except (ValidationError, ValueError) as fault:
        first = " ".join(str(fault).splitlines()[:3])
        raise CacheError(f"{where}: its footer is not readable: {first}; restore it from a copy") from fault


def _to_row(sample: SampleRecord) -> dict[str, object]:
    stored = sample.stored
    return {
        "row": sample.row,
        "key": sample.key,
        "status": sample.status,
        "stage": sample.stage,
        "reason": sample.reason,
        "detail": sample.detail,
        "attempt": sample.attempt,
        "bucket": sample.bucket,
        "source_xxh3": sample.source_xxh3,
        "caption_xxh3": sample.caption_xxh3,
        "tensors": None
        if stored is None
        else [
            {
                "name": t.name,
                "dtype": t.dtype,
                "shape": list(t.shape),
                "file": t.file,
                "offset": t.offset,
                "nbytes": t.nbytes,
            }
            for t in stored.tensors
        ],
        "xxh3": stored.xxh3 if stored else None,
        "json_file": stored.json_file if stored else None,
        "json_offset": stored.json_offset if stored else None,
        "json_nbytes": stored.json_nbytes if stored else None,
        "json_xxh3": stored.json_xxh3 if stored else None,
    }


def _from_row(row: dict[str, object]) -> SampleRecord:
    # The seal has vouched for the bytes and the schema for the types: only the shape changes here.
    values = dict(row)
    tensors = values.pop("tensors")
    place = {name: values.pop(name) for name in ("xxh3", "json_file", "json_offset", "json_nbytes", "json_xxh3")}
    stored = None
    if place["json_offset"] is not None:
        assert isinstance(tensors, list), f"row {row['row']}: {tensors!r}"
        places = tuple(TensorPlace(**{**t, "shape": tuple(t["shape"])}) for t in tensors)
        stored = StoredSample(tensors=places, **place)  # type: ignore[arg-type]
    return SampleRecord(stored=stored, **values)  # type: ignore[arg-type]
