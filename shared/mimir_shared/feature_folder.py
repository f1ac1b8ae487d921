"""One feature of a cache at one fingerprint: its spec, its commit records, its data files."""

from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mimir_shared.errors import CacheError, InputError
from mimir_shared.features import FEATURES, FeatureName, FeatureTensor, TensorSpec
from mimir_shared.fingerprint import fingerprint as fingerprint_of
from mimir_shared.layout import feature_directory, parse_record_name, record_name, spec_name
from mimir_shared.manifest import (
    CacheFormat,
    CommitRecord,
    RecordMetadata,
    SampleRecord,
    read_record,
    read_record_metadata,
    read_record_table,
)
from mimir_shared.plain_documents import parse_json
from mimir_shared.shard_files import ShardFiles
from mimir_shared.storage.protocol import Storage

SPEC_VERSION: Final = 1


class FeatureSpec(BaseModel):
    """spec.json: what made the bytes of a feature."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[1] = SPEC_VERSION
    feature: FeatureName
    fingerprint: str = Field(pattern="^[0-9a-f]{64}$", description="sha256 of the identity as canonical JSON")
    format: CacheFormat
    identity: dict[str, Any] = Field(description="every model file and setting that changes a byte")

    def tensor_specs(self, bucket: str) -> tuple[TensorSpec, ...]:
        """The tensors of one sample of a bucket."""
        tensors = self.identity["tensors"]
        entries = tensors.get(bucket, []) if isinstance(tensors, Mapping) else tensors
        return tuple(
            TensorSpec(
                name=entry["name"],
                dtype=entry["dtype"],
                dims=tuple(entry["dims"]),
                sizes=tuple(entry["sizes"]),
                channel_dim=entry.get("channel_dim"),
            )
            for entry in entries
        )


class FeatureFolder:
    """Reads one `<feature>/<fingerprint>` folder of a cache."""

    def __init__(self, storage: Storage, feature: FeatureName, fingerprint: str) -> None:
        self.storage = storage
        self.feature: FeatureName = feature
        self.fingerprint = fingerprint
        self.directory = feature_directory(feature, fingerprint)

    def read_spec(self) -> FeatureSpec:
        """Raises CacheError where spec.json is missing, damaged, or not what its folder is named for."""
        name = spec_name(self.feature, self.fingerprint)
        where = f"{self.storage.root}/{name}"
        try:
            spec = FeatureSpec.model_validate(parse_json(self.storage.read(name)))
        except FileNotFoundError as fault:
            raise CacheError(f"{where}: missing; the folder is no feature of this program, or it is damaged") from fault
        except (ValidationError, ValueError) as fault:
            raise CacheError(f"{where}: not readable: {' '.join(str(fault).splitlines()[:3])}") from fault
        actual = fingerprint_of(spec.identity)
        if actual != spec.fingerprint or not actual.startswith(self.fingerprint):
            raise CacheError(
                f"{where}: its identity has the fingerprint {actual[:12]}, but the file says {spec.fingerprint[:12]} "
                f"and its folder {self.fingerprint[:12]}; it was edited or damaged: restore it from a copy"
            )
        return spec

    def generations(self) -> dict[int, int]:
        """shard → highest generation, for every shard that is committed."""
        newest: dict[int, int] = {}
        for name in self.storage.list(f"{self.directory}/manifests"):
            parsed = parse_record_name(name)
            if parsed is not None:
                shard, generation = parsed
                newest[shard] = max(generation, newest.get(shard, -1))
        return newest

    def record_path(self, shard: int, generation: int) -> str:
        return f"{self.directory}/{record_name(shard, generation)}"

    def read_record(self, shard: int, generation: int) -> CommitRecord:
        """Raises CacheError where the record is damaged or belongs to another place."""
        (record,) = self.read_records({shard: generation})
        return record

    def read_records(self, generations: Mapping[int, int]) -> Iterator[CommitRecord]:
        """The records of several shards, in their order; from a bucket, many at a time. Raises as read_record."""
        for shard, generation, name, data in self._read_all(generations):
            record = read_record(data, f"{self.storage.root}/{name}")
            self._check_place(record.metadata, name, shard, generation)
            yield record

    def read_record_tables(self, generations: Mapping[int, int]) -> Iterator[tuple[pa.Table, RecordMetadata, str]]:
        """As read_records: the rows as a table, the footer and the seal."""
        for shard, generation, name, data in self._read_all(generations):
            table, metadata, seal = read_record_table(data, f"{self.storage.root}/{name}")
            self._check_place(metadata, name, shard, generation)
            yield table, metadata, seal

    def read_record_metadata(self, shard: int, generation: int) -> tuple[RecordMetadata, str]:
        """The record's footer and seal. Raises CacheError as read_record."""
        (found,) = self.read_all_metadata({shard: generation})
        return found

    def read_all_metadata(self, generations: Mapping[int, int]) -> Iterator[tuple[RecordMetadata, str]]:
        """As read_records: the footers and seals alone."""
        for shard, generation, name, data in self._read_all(generations):
            metadata, seal = read_record_metadata(data, f"{self.storage.root}/{name}")
            self._check_place(metadata, name, shard, generation)
            yield metadata, seal

    def open_shard(self, record: CommitRecord) -> ShardFiles:
        """The data files of a shard, for reading many of its samples."""
        return ShardFiles(self.storage, self.directory, record)

    def read_sample(
        self, record: CommitRecord, sample: SampleRecord
    ) -> tuple[dict[str, Any], dict[str, FeatureTensor]]:
        """The text and the tensors of one sample that is ok, checked against their hashes. Raises CacheError."""
        files = self.open_shard(record)
        return files.read_document(sample), files.read_tensors(sample)

    def _read_all(self, generations: Mapping[int, int]) -> Iterator[tuple[int, int, str, bytes]]:
        """(shard, generation, name, bytes) of each record."""
        names = [self.record_path(shard, generation) for shard, generation in generations.items()]
        found = self.storage.read_many(names)
        for (shard, generation), name in zip(generations.items(), names, strict=True):
            try:
                yield shard, generation, name, next(found)
            except FileNotFoundError as fault:
                raise CacheError(f"{self.storage.root}/{name}: missing; the shard is not committed") from fault

    def _check_place(self, metadata: RecordMetadata, name: str, shard: int, generation: int) -> None:
        expected = (self.feature, shard, generation)
        got = (metadata.feature, metadata.shard, metadata.generation)
        if got != expected or not metadata.fingerprint.startswith(self.fingerprint):
            raise CacheError(
                f"{self.storage.root}/{name}: expected the record of {expected} at {self.fingerprint[:12]}, got {got} "
                f"at {metadata.fingerprint[:12]}; records were swapped: restore them from a copy"
            )


def find_features(storage: Storage) -> list[FeatureFolder]:
    """Every feature folder of a cache, in the order in which features are made, then by fingerprint."""
    return [
        FeatureFolder(storage, feature, name)
        for feature in FEATURES
        for name in storage.list(feature)
        if storage.exists(spec_name(feature, name))
    ]


def select_features(storage: Storage, wanted: Mapping[str, str]) -> dict[FeatureName, FeatureFolder]:
    """One folder for each feature that the cache has.

    Args:
        wanted: feature → beginning of the fingerprint, for features that the cache has more than once.
    Raises: InputError where a choice is missing, ambiguous, or fits nothing.
    """
    chosen: dict[FeatureName, FeatureFolder] = {}
    folders = find_features(storage)
    unknown = sorted(set(wanted) - {folder.feature for folder in folders})
    if unknown:
        raise InputError(f"--feature {unknown[0]}: {storage.root} has no such feature")
    for feature in FEATURES:
        present = [folder for folder in folders if folder.feature == feature]
        fitting = [folder for folder in present if folder.fingerprint.startswith(wanted.get(feature, ""))]
        if present and len(fitting) != 1:
            names = ", ".join(folder.fingerprint for folder in present)
            asked = f" beginning with {wanted[feature]!r}" if feature in wanted else ""
            raise InputError(
                f"{storage.root}: {len(fitting)} {feature} features{asked}, expected one; the cache has {names}: "
                f"choose by --feature {feature}=FINGERPRINT"
            )
        if fitting:
            chosen[feature] = fitting[0]
    return chosen
