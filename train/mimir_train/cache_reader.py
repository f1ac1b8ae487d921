"""Reads a cache as its snapshot pins it: any clip, any feature, one read each, every byte checked. No torch here.

cache = open_cache("CACHE")
tensors = cache.read(0, "latents")           # {"vae_moments": FeatureTensor}
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import xxhash

from mimir_shared.errors import CacheError, InputError, MachineError
from mimir_shared.feature_folder import FeatureSpec, find_features
from mimir_shared.features import NUMPY_DTYPES, DType, FeatureName, FeatureTensor
from mimir_shared.layout import empty_name
from mimir_shared.plan_file import read_plan
from mimir_shared.safetensors_bytes import TensorPlace, read_tensors, tensor_at
from mimir_shared.sealed import check_sealed_tensors
from mimir_shared.snapshot import Snapshot, incomplete_shards, list_snapshots, read_index
from mimir_shared.storage import LocalStorage, open_storage
from mimir_train.order import BucketShards, ClipPlace

NEEDED: Final[tuple[FeatureName, ...]] = ("latents", "t5")
"""Without these there is nothing to train on; `llm` is needed by some fusers only."""

_MAX_OPEN_FILES: Final = 256


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
        return f"{self.key!r} (shard {self.shard}, row {self.row})"


class Cache:
    """A snapshot of a cache, open for reading. Clips are numbered as the index has them. Safe between threads."""

    def __init__(self, storage: LocalStorage, snapshot: Snapshot, index: pa.Table) -> None:
        self.storage = storage
        self.snapshot = snapshot
        self._index = index.combine_chunks()
        self._shards = self._index["shard"].to_numpy()
        self._rows = self._index["row"].to_numpy()
        self._features: dict[FeatureName, _FeatureReader] = {}
        self._lock = threading.Lock()

    @property
    def num_clips(self) -> int:
        return int(self._index.num_rows)

    @property
    def num_shards(self) -> int:
        """Shards with a clip in the index have smaller numbers than this."""
        return 1 + max((shard for feature in self.snapshot.features.values() for shard, _, _ in feature.records))

    def spec(self, feature: FeatureName) -> FeatureSpec:
        """What made a feature. Raises InputError where the snapshot does not have it."""
        pinned = self.snapshot.features.get(feature)
        if pinned is None:
            raise InputError(
                f"{self.storage.root}: snapshot {self.snapshot.digest[:12]} has no feature `{feature}`, only "
                f"{', '.join(self.snapshot.features)}; make it: `mimir-precompute encode --cache {self.storage.root} "
                f"--features {feature}` with its models"
            )
        return FeatureSpec(
            feature=feature, fingerprint=pinned.fingerprint, format=pinned.format, identity=pinned.identity
        )

    def clip(self, number: int) -> Clip:
        text = {name: self._index[name][number].as_py() for name in ("key", "bucket", "caption", "source")}
        return Clip(shard=int(self._shards[number]), row=int(self._rows[number]), **text)

    def read(self, number: int, feature: FeatureName, *, verify: bool = True) -> dict[str, FeatureTensor]:
        """The tensors of one feature of a clip, by one read.

        Args:
            verify: compare the bytes with their xxh3 in the commit record.
        Raises: CacheError naming clip, shard and row where the file is missing, the bytes are not those that were
            committed, or a tensor departs from its spec.
        """
        return self._reader(feature).read(self.clip(number), number, verify=verify)

    def read_empty(self, feature: FeatureName) -> dict[str, FeatureTensor]:
        """The feature of the empty prompt. Raises CacheError where it is missing or damaged."""
        name = empty_name(feature, self.spec(feature).fingerprint)
        where = f"{self.storage.root}/{name}"
        try:
            data = self.storage.read(name)
        except FileNotFoundError as fault:
            raise CacheError(
                f"{where}: missing, the features of the empty prompt; train with --empty-text zeros, or encode "
                f"`{feature}` again"
            ) from fault
        check_sealed_tensors(data, where)
        return read_tensors(data, where)

    def buckets(self, held_out: Collection[int] = ()) -> tuple[BucketShards, ...]:
        """The clips of each bucket, but for those in the shards that are held out; by name."""
        found = []
        for name, numbers in self._by_bucket.items():
            shards, sizes = np.unique(self._shards[numbers], return_counts=True)
            kept = [(int(s), int(n)) for s, n in zip(shards, sizes, strict=True) if int(s) not in held_out]
            if kept:
                found.append(BucketShards(name=name, shards=tuple(s for s, _ in kept), sizes=tuple(n for _, n in kept)))
        return tuple(found)

    def clip_number(self, bucket: str, place: ClipPlace) -> int:
        """The index number of a clip that an order names."""
        numbers = self._by_bucket[bucket]
        first = int(np.searchsorted(self._shards[numbers], place.shard))
        number = int(numbers[first + place.number])
        assert self._shards[number] == place.shard, f"{place} of {bucket}"
        return number

    def clip_numbers(self, bucket: BucketShards) -> list[int]:
        """The index numbers of all clips of a bucket, by shard and row."""
        return [
            self.clip_number(bucket.name, ClipPlace(shard=shard, number=number))
            for shard, size in zip(bucket.shards, bucket.sizes, strict=True)
            for number in range(size)
        ]

    @cached_property
    def _by_bucket(self) -> dict[str, np.ndarray]:
        """bucket → index numbers, by shard and row."""
        names = self._index["bucket"].combine_chunks().dictionary_encode()
        codes = names.indices.to_numpy(zero_copy_only=False)
        order = np.lexsort((self._rows, self._shards))
        return {
            name: order[codes[order] == code]
            for name, code in sorted((name, code) for code, name in enumerate(names.dictionary.to_pylist()))
        }

    def _reader(self, feature: FeatureName) -> "_FeatureReader":
        with self._lock:
            if feature not in self._features:
                column = self._index[feature].combine_chunks() if feature in self._index.column_names else None
                self._features[feature] = _FeatureReader(self, self.spec(feature), column)
            return self._features[feature]


class _FeatureReader:
    """One feature's column of the index, and its data files."""

    def __init__(self, cache: Cache, spec: FeatureSpec, column: pa.StructArray | None) -> None:
        assert column is not None, f"the index has no column {spec.feature}"
        self._root = cache.storage.root
        self._spec = spec
        self._specs_of_bucket = {bucket: spec.tensor_specs(bucket) for bucket in cache.snapshot.buckets}
        self._names = cache.snapshot.features[spec.feature].files
        self._files = _OpenFiles()
        self._xxh3 = column.field("xxh3").to_numpy(zero_copy_only=False)
        has_tensors = any(field.name == "tensors" for field in column.type)
        self._tensors = _tensor_columns(column.field("tensors")) if has_tensors else []

    def read(self, clip: Clip, number: int, *, verify: bool) -> dict[str, FeatureTensor]:
        parts, where = [], f"`{self._spec.feature}` of clip {clip}"
        for file, offset, nbytes in self._ranges(number):
            path = self._root / self._names[file]
            where = f"{path}: `{self._spec.feature}` of clip {clip}"
            parts.append(self._read_range(path, offset, nbytes, where))
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if verify and parts and xxhash.xxh3_64_intdigest(data) != int(self._xxh3[number]):
            raise CacheError(
                f"{where}: its {len(data)} bytes do not match the hash in the commit record; the shard is damaged: see "
                f"`mimir-precompute verify {self._root}`"
            )
        return self._parse(data, clip, number, where)

    def _ranges(self, number: int) -> list[tuple[int, int, int]]:
        """(file, offset, nbytes) of a clip's tensors; those that touch each other are one range."""
        ranges: list[tuple[int, int, int]] = []
        for column in self._tensors:
            file, offset, nbytes = (int(values[number]) for values in (column.file, column.offset, column.nbytes))
            if ranges and ranges[-1][0] == file and sum(ranges[-1][1:]) == offset:
                ranges[-1] = (file, ranges[-1][1], ranges[-1][2] + nbytes)
            else:
                ranges.append((file, offset, nbytes))
        return ranges

    def _read_range(self, path: Path, offset: int, nbytes: int, where: str) -> bytes:
        try:
            data = self._files.read(path, offset, nbytes)
        except FileNotFoundError as fault:
            raise CacheError(
                f"{where}: the file is missing, though the snapshot names it; restore it from a copy, or see "
                f"`mimir-precompute verify {self._root}`"
            ) from fault
        except OSError as fault:
            raise MachineError(f"{where}: cannot be read: {fault.strerror}; run the same command again") from fault
        if len(data) != nbytes:
            raise CacheError(
                f"{where}: the file ends after {len(data)} of its {nbytes} bytes; it was cut short: see "
                f"`mimir-precompute verify {self._root}`"
            )
        return data

    def _parse(self, data: bytes, clip: Clip, number: int, where: str) -> dict[str, FeatureTensor]:
        specs = {spec.name: spec for spec in self._specs_of_bucket.get(clip.bucket, ())}
        tensors: dict[str, FeatureTensor] = {}
        offset = 0
        for column in self._tensors:
            name = column.name
            if name not in specs:
                raise CacheError(f"{where}: no tensor {name!r} for bucket {clip.bucket} by spec.json; they disagree")
            place = _place(name, specs[name].dtype, column.shape[number].tolist(), offset)
            tensor = tensor_at(data, place, base=0, where=where)
            offset += tensor.array.nbytes
            mismatch = specs[name].mismatch(tensor.array, tensor.dtype)
            if mismatch is not None:
                raise CacheError(f"{where}: {mismatch} for bucket {clip.bucket} by spec.json; index and spec disagree")
            tensors[name] = tensor
        missing = sorted(specs.keys() - tensors.keys())
        if missing:
            raise CacheError(f"{where}: tensors {missing} of spec.json are missing; index and spec disagree")
        return tensors


@dataclass(frozen=True, kw_only=True)
class _TensorColumn:
    """Where one tensor of a feature lies, for every clip of the index."""

    name: str
    file: np.ndarray
    offset: np.ndarray
    nbytes: np.ndarray
    shape: np.ndarray
    """(clips, dims)"""


def _tensor_columns(column: pa.StructArray) -> list[_TensorColumn]:
    """In stored order, which is also the order in which their bytes were hashed."""
    columns = []
    for field in column.type:
        places = column.field(field.name)
        shape = places.field("shape")
        columns.append(
            _TensorColumn(
                name=field.name,
                file=places.field("file").to_numpy(),
                offset=places.field("offset").to_numpy(),
                nbytes=places.field("nbytes").to_numpy(),
                shape=shape.flatten().to_numpy().reshape(len(shape), -1),
            )
        )
    return columns


def _place(name: str, dtype: DType, shape: list[int], offset: int) -> TensorPlace:
    nbytes = int(np.prod(shape, dtype=np.int64)) * NUMPY_DTYPES[dtype].itemsize
    return TensorPlace(name=name, dtype=dtype, shape=tuple(shape), offset=offset, nbytes=nbytes)


class _OpenFiles:
    """Descriptors of the files read last, so that a shard is not opened anew for every clip."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[Path, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, offset: int, nbytes: int) -> bytes:
        with self._lock:  # a descriptor must not be closed, and its number given away, while it is read from
            descriptor = self._descriptors.pop(path, None)
            if descriptor is None:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._descriptors[path] = descriptor
            if len(self._descriptors) > _MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            return os.pread(descriptor, nbytes, offset)

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def open_cache(location: str, wanted: Mapping[str, str] | None = None, *, snapshot: str | None = None) -> Cache:
    """Open the newest snapshot of a cache that can be trained on.

    Args:
        wanted: feature → beginning of its fingerprint, where the cache has a feature more than once.
        snapshot: digest (or its beginning) of the one to open instead.
    Raises: InputError where there is none, saying what to run; CacheError where it is damaged, or where the snapshot
        asked for is gone.
    """
    storage = open_storage(location)
    if not storage.root.is_dir():
        raise InputError(f"--cache {location}: no such folder")
    snapshots = list_snapshots(storage)
    if snapshot is not None:
        chosen = next((found for found in snapshots if found.digest.startswith(snapshot)), None)
        if chosen is None:
            raise CacheError(
                f"{storage.root}: snapshot {snapshot[:12]} is not here; the cache has "
                f"{', '.join(found.digest[:12] for found in snapshots) or 'none'}; give the cache that the run began "
                f"with"
            )
    else:
        fitting = [found for found in snapshots if _fits(found, wanted or {})]
        if not fitting:
            raise InputError(_no_snapshot(storage, snapshots, wanted or {}))
        chosen = fitting[-1]
    return Cache(storage, chosen, read_index(storage, chosen))


def newer_plan(cache: Cache) -> str | None:
    """Say so where clips were planned since the snapshot that are not part of it."""
    plans = [name for name in cache.storage.list("plan") if name.endswith(".parquet")]
    later = len(plans) - len(cache.snapshot.plans)
    if later <= 0:
        return None
    return (
        f"{cache.storage.root}: {later} plan file(s) came after snapshot {cache.snapshot.digest[:12]}; to train on "
        f"their clips too: `mimir-precompute encode --cache {cache.storage.root} --shards all`"
    )


def _fits(snapshot: Snapshot, wanted: Mapping[str, str]) -> bool:
    pinned = {name: feature.fingerprint for name, feature in snapshot.features.items()}
    return all(feature in pinned for feature in NEEDED) and all(
        pinned.get(feature, "-").startswith(beginning)  # type: ignore[call-overload]  # any name may be asked for
        for feature, beginning in wanted.items()
    )


def _no_snapshot(storage: LocalStorage, snapshots: list[Snapshot], wanted: Mapping[str, str]) -> str:
    """Why nothing can be trained on, and what to run."""
    root = storage.root
    plan = read_plan(storage)  # says it better where there is no plan at all
    folders = find_features(storage)
    absent = [feature for feature in NEEDED if feature not in {folder.feature for folder in folders}]
    missing = incomplete_shards(plan, folders)
    encode = f"`mimir-precompute encode --cache {root} --shards all`"
    if absent:
        return f"{root}: the cache is not finished: no {' and no '.join(absent)} yet; run {encode} with its models"
    for feature, beginning in wanted.items():
        present = [folder.fingerprint for folder in folders if folder.feature == feature]
        if not any(fingerprint.startswith(beginning) for fingerprint in present):
            return f"--feature {feature}={beginning}: {root} has {', '.join(present) or 'no such feature'}"
    if missing:
        counts = ", ".join(f"{feature}: {count} of {plan.num_shards} shards" for feature, count in missing.items())
        return f"{root}: the cache is not finished ({counts} missing); run {encode} with the same models"
    choices = "".join(f" --feature {feature}={beginning}" for feature, beginning in wanted.items())
    reason = "of these features" if snapshots else "yet"
    return f"{root}: no snapshot {reason}; write one: `mimir-precompute finalize {root}{choices}`"
