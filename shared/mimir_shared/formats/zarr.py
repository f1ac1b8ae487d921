"""A shard as an immutable zarr v3 group: one array per tensor, one chunk per clip.

    000123-1a2b3c4d.zarr/
      rows                      (clips,) int32: the rows of the shard that are here; a quarantined row is absent
      documents                 (clips, bytes) uint8 and documents_lengths: the JSON of each sample, as UTF-8
      t5_embeds                 (clips, L, D); bf16 as uint16 with the attribute `dtype`
      query_hidden              (clips, longest, H) and query_hidden_lengths: a ragged tensor, padded with zeros
      9x64x96/vae_moments       of features with buckets: a group a bucket, with `rows` of its own
    attributes of each group: `keys` of its clips, in the order of `rows`

Equal samples give equal bytes. Any zarr library reads it; our reader takes places from the commit record.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import xxhash

from mimir_shared.features import DType, FeatureTensor, TensorSpec
from mimir_shared.formats.shard_format import NewFile, WrittenShard
from mimir_shared.formats.webdataset import document_bytes
from mimir_shared.formats.zarr_array import (
    METADATA,
    ArrayKind,
    ArrayWriter,
    Member,
    metadata_bytes,
    write_integers,
    write_member,
)
from mimir_shared.layout import data_name
from mimir_shared.manifest import StoredSample
from mimir_shared.safetensors_bytes import TensorPlace, stored_order

ENDING: Final = "zarr"

_DATA_TYPES: dict[DType, str] = {"bf16": "uint16", "f16": "float16", "f32": "float32", "i32": "int32"}
_DOCUMENTS: Final = ArrayKind(
    data_type="uint8",
    item_bytes=1,
    item_shape=(),
    is_ragged=True,
    dims=("bytes",),
    attributes={"dtype": "JSON as UTF-8"},
)


@dataclass
class _Group:
    """The root, or the clips of one bucket."""

    rows: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    arrays: dict[str, ArrayWriter] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A tensor, as the `number`-th clip of an array."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int
    array: ArrayWriter
    number: int


@dataclass(frozen=True, kw_only=True)
class _Sample:
    number: int
    """Among all clips of the shard."""
    document_bytes: int
    document_xxh3: int
    places: tuple[_Place, ...]
    xxh3: int | None


class ZarrWriter:
    """Writes the samples of one shard in row order. Holds one sample in memory; ragged tensors are written twice."""

    def __init__(self, shard: int, new_file: NewFile) -> None:
        self._shard = shard
        self._new_file = new_file
        self._documents = ArrayWriter("documents", _DOCUMENTS, new_file)
        self._groups: dict[str, _Group] = {"": _Group()}
        self._samples: dict[int, _Sample] = {}

    def add(
        self,
        row: int,
        document: Mapping[str, Any],
        tensors: Mapping[str, FeatureTensor],
        specs: Sequence[TensorSpec],
        bucket: str | None,
    ) -> None:
        """Append one sample; see ShardFormat."""
        root = self._groups[""]
        assert not root.rows or row > root.rows[-1], f"row {row} after row {root.rows[-1:]}"
        group = self._groups.setdefault(bucket or "", _Group())
        number = len(group.rows)
        for one in {id(root): root, id(group): group}.values():
            one.rows.append(row)
            one.keys.append(document["key"])
        text = document_bytes(document)
        self._documents.append(text, len(text))
        spec_of = {spec.name: spec for spec in specs}
        digest = xxhash.xxh3_64()
        places = []
        for name, tensor in stored_order(tensors):
            data = tensor.array.tobytes()
            digest.update(data)
            array = self._array(group, bucket, spec_of[name], tensor)
            array.append(data, tensor.array.shape[0] if _is_ragged(spec_of[name]) else None)
            shape = tuple(tensor.array.shape)
            places.append(
                _Place(name=name, dtype=tensor.dtype, shape=shape, nbytes=len(data), array=array, number=number)
            )
        self._samples[row] = _Sample(
            number=len(root.rows) - 1,
            document_bytes=len(text),
            document_xxh3=xxhash.xxh3_64_intdigest(text),
            places=tuple(places),
            xxh3=digest.intdigest() if places else None,
        )

    def _array(self, group: _Group, bucket: str | None, spec: TensorSpec, tensor: FeatureTensor) -> ArrayWriter:
        """The array of a tensor, begun with its first clip."""
        if spec.name not in group.arrays:
            ragged = _is_ragged(spec)
            kind = ArrayKind(
                data_type=_DATA_TYPES[tensor.dtype],
                item_bytes=tensor.array.itemsize,
                item_shape=tuple(tensor.array.shape[1:] if ragged else tensor.array.shape),
                is_ragged=ragged,
                dims=spec.dims,
                attributes={"dtype": tensor.dtype},
            )
            name = f"{bucket}/{spec.name}" if bucket else spec.name
            group.arrays[spec.name] = ArrayWriter(name, kind, self._new_file)
        return group.arrays[spec.name]

    def finish(self) -> WrittenShard:
        """Close the group."""
        members = self._documents.finish()
        for name, group in self._groups.items():
            prefix = f"{name}/" if name else ""
            for array in group.arrays.values():
                members += array.finish()
            members += write_integers(f"{prefix}rows", group.rows, self._new_file)
            document = {"zarr_format": 3, "node_type": "group", "attributes": {"keys": group.keys}}
            members.append(write_member(f"{prefix}{METADATA}", metadata_bytes(document), self._new_file))
        # The group's own document comes last: published last, it makes a group of what lies beside it.
        members.sort(key=lambda member: (member.name == METADATA, member.name))
        path = data_name(self._shard, _group_hash(members), ENDING)
        file_numbers = {member.name: number for number, member in enumerate(members)}
        return WrittenShard(
            files=tuple(member.file.as_written(f"{path}/{member.name}") for member in members),
            stored={row: self._stored(sample, file_numbers) for row, sample in self._samples.items()},
        )

    def _stored(self, sample: _Sample, file_numbers: Mapping[str, int]) -> StoredSample:
        places = [
            TensorPlace(
                name=place.name,
                dtype=place.dtype,
                shape=place.shape,
                file=file_numbers[place.array.data_name],
                offset=place.array.offset(place.number),
                nbytes=place.nbytes,
            )
            for place in sample.places
        ]
        return StoredSample(
            json_file=file_numbers[self._documents.data_name],
            json_offset=self._documents.offset(sample.number),
            json_nbytes=sample.document_bytes,
            json_xxh3=sample.document_xxh3,
            tensors=tuple(places),
            xxh3=sample.xxh3,
        )


def _is_ragged(spec: TensorSpec) -> bool:
    ragged = [dim for dim, size in enumerate(spec.sizes) if size is None]
    assert ragged in ([], [0]), f"{spec.name}: only the first dim may differ from clip to clip, got {spec.sizes}"
    return bool(ragged)


def _group_hash(members: Sequence[Member]) -> str:
    """sha256 in hex over the name, length and sha256 of every file."""
    listed = [[member.name, member.file.nbytes, member.file.sha256] for member in members]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
