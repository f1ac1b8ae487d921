"""Shards of samples that a test makes up, written by either format and committed to a folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mimir_shared.features import DType, FeatureTensor, TensorSpec
from mimir_shared.formats.open_format import open_shard_format
from mimir_shared.manifest import (
    CacheFormat,
    CommitRecord,
    RecordMetadata,
    SampleRecord,
    read_record,
    write_record,
)
from mimir_shared.shard_files import ShardFiles
from mimir_shared.storage.folder import LocalStorage


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What is given to a format."""

    row: int
    document: Mapping[str, Any]
    tensors: Mapping[str, FeatureTensor]
    specs: tuple[TensorSpec, ...] = ()
    bucket: str | None = None


def counted(dtype: DType, *shape: int, start: int = 0) -> FeatureTensor:
    """A tensor of 0, 1, 2, …, in bf16 as bits."""
    held = {"bf16": "<u2", "f16": "<f2", "f32": "<f4", "i32": "<i4"}[dtype]
    return FeatureTensor((np.arange(int(np.prod(shape))) + start).astype(held).reshape(shape), dtype)


def specs_of(tensors: Mapping[str, FeatureTensor], *ragged: str) -> tuple[TensorSpec, ...]:
    """Specs that tensors fit; of the ragged ones the first dim is free."""
    return tuple(
        TensorSpec(
            name=name,
            dtype=tensor.dtype,
            dims=tuple(f"d{dim}" for dim in range(tensor.array.ndim)),
            sizes=tuple(None if name in ragged and not dim else size for dim, size in enumerate(tensor.array.shape)),
        )
        for name, tensor in tensors.items()
    )


def write_shard(root: Path, data_format: CacheFormat, samples: Sequence[Sample], shard: int = 7) -> CommitRecord:
    """Write and publish a shard below `root`; the record as it would be read."""
    storage = LocalStorage(root)
    with open_shard_format(storage, data_format, shard) as writer:
        for sample in samples:
            writer.add(sample.row, sample.document, sample.tensors, sample.specs, sample.bucket)
        written = writer.finish()
        for file in written.files:
            assert storage.publish(file.temporary, file.data_file.path)
    num_rows = max((sample.row for sample in samples), default=-1) + 1
    records = [
        SampleRecord(
            row=row,
            key=f"k{row}",
            status="ok" if row in written.stored else "quarantined",
            caption_xxh3=0,
            stored=written.stored.get(row),
        )
        for row in range(num_rows)
    ]
    metadata = RecordMetadata(
        feature="t5", shard=shard, generation=0, format=data_format, fingerprint="0" * 64, plan="0" * 64,
        files=tuple(file.data_file for file in written.files), ok=len(samples), quarantined=num_rows - len(samples),
        statistics={},
    )  # fmt: skip
    return read_record(write_record(metadata, records), "here")


def open_shard(root: Path, record: CommitRecord) -> ShardFiles:
    """The files of a shard that `write_shard` wrote."""
    return ShardFiles(LocalStorage(root), ".", record)
