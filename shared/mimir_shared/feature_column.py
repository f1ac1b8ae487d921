"""Where the bytes of one feature lie, for every clip of a snapshot's index, and how they are read.

All that reads samples by the index comes through `read_into`: it fills memory that is there already, by one call to
the storage for bytes that lie together, and compares their hash.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pyarrow as pa
import xxhash

from mimir_shared.clip_table import ClipTable
from mimir_shared.errors import CacheError, MachineError
from mimir_shared.feature_folder import FeatureFolder, FeatureSpec
from mimir_shared.features import NUMPY_DTYPES, DType
from mimir_shared.plain_documents import parse_json
from mimir_shared.snapshot import Snapshot
from mimir_shared.storage.protocol import Storage

_JSON_PLACE: Final = ("json_file", "json_offset", "json_nbytes", "json_xxh3")


@dataclass(frozen=True, kw_only=True)
class TensorColumn:
    """One tensor of a feature: its place and dims for every clip of the index."""

    name: str
    dtype: DType
    sizes: tuple[int | None, ...]
    """As in its TensorSpec; of the first bucket, where buckets differ."""
    file: np.ndarray
    """(clips,) index into the snapshot's list of files."""
    offset: np.ndarray
    """(clips,) of the first byte in its file."""
    nbytes: np.ndarray
    """(clips,)"""
    shape: np.ndarray
    """(clips, dims)"""

    @property
    def is_ragged(self) -> bool:
        """Whether the first dim differs from clip to clip."""
        return self.sizes[0] is None


class _Range:
    """Bytes that lie together, and the memory that they go to. Plain and slotted: one is made for every read."""

    __slots__ = ("buffers", "end", "file", "offset")

    def __init__(self, file: int, offset: int, end: int, buffers: list[memoryview]) -> None:
        self.file = file
        self.offset = offset
        self.end = end
        self.buffers = buffers


class FeatureColumn:
    """One feature's part of an index. Safe between threads."""

    def __init__(
        self, storage: Storage, snapshot: Snapshot, spec: FeatureSpec, column: pa.StructArray, clips: ClipTable
    ) -> None:
        """Raises: CacheError where the index does not hold the tensors that the spec promises."""
        pinned = snapshot.features[spec.feature]
        self.feature = spec.feature
        self._storage = storage
        self._files = pinned.files
        self._records = {shard: (generation, seal) for shard, generation, seal in pinned.records}
        self._folder = FeatureFolder(storage, spec.feature, spec.fingerprint)
        self._snapshot = snapshot
        self._column = column
        self._clips = clips
        self.tensors = _tensor_columns(column, spec, clips.numbers_of_bucket, str(storage.root))
        self._xxh3 = column.field("xxh3").to_numpy(zero_copy_only=False)
        self._is_one_range = bool(self.tensors) and all(
            (one.file == two.file).all() and (one.offset + one.nbytes == two.offset).all()
            for one, two in pairwise(self.tensors)
        )
        self._checked_shards: set[int] = set()
        self._lock = threading.Lock()

    def read_into(self, number: int, buffers: Sequence[memoryview], *, verify: bool) -> None:
        """Read the tensors of a clip, each into a buffer of its size.

        Args:
            number: of the clip in the index.
            buffers: of bytes, one for each of `tensors`.
            verify: compare the bytes with their xxh3 in the commit record, and once a shard, the record on disk with
                the one that the snapshot pins.
        Raises: CacheError naming clip, shard, row and source where a file is missing or short, or the bytes are not
            those that were committed; MachineError where they cannot be read.
        """
        if verify:
            self._check_record(int(self._clips.shards[number]))
        ranges = self._ranges(number, buffers)
        digest = xxhash.xxh3_64()
        for part in ranges:
            self._read_range(part, number, digest.update if verify else None)
        if verify and ranges:
            expected = int(self._xxh3[number])
            read_right = digest.intdigest() == expected
            if not read_right and not (self._read_again(ranges, number) and _hash(buffers) == expected):
                raise CacheError(
                    f"{self._where(ranges[0].file, number)}: its {sum(map(len, buffers))} bytes do not match the hash "
                    f"in the commit record; the shard is damaged: {self._verify_command}"
                )

    def _read_again(self, ranges: Sequence[_Range], number: int) -> bool:
        """Whether the storage may give other bytes than before; then they are in the buffers."""
        worth_it = [self._storage.forget(self._files[p.file], p.offset, sum(map(len, p.buffers))) for p in ranges]
        if any(worth_it):
            for part in ranges:
                self._read_range(part, number)
        return any(worth_it)

    def read_document(self, number: int, *, verify: bool) -> dict[str, Any]:
        """The text of a clip: its key, caption, answers. Raises as read_into."""
        place = {name: int(self._column.field(name)[number].as_py()) for name in _JSON_PLACE}
        data = bytearray(place["json_nbytes"])
        part = _Range(place["json_file"], place["json_offset"], place["json_offset"] + len(data), [memoryview(data)])
        self._read_range(part, number)
        expected = place["json_xxh3"]
        if (
            verify
            and _hash(part.buffers) != expected
            and not (self._read_again([part], number) and _hash(part.buffers) == expected)
        ):
            raise CacheError(
                f"{self._where(part.file, number)}: its text does not match the hash in the commit record; the shard "
                f"is damaged: {self._verify_command}"
            )
        document = parse_json(data)
        assert isinstance(document, dict), f"clip {self._clips[number]}: the text is {type(document)}"
        return document

    def _ranges(self, number: int, buffers: Sequence[memoryview]) -> list[_Range]:
        """Where the tensors of a clip lie; those that touch each other are one range."""
        if self._is_one_range:
            # as in tars: looked up once, for this is asked for every clip that is read
            first, last = self.tensors[0], self.tensors[-1]
            offset, end = first.offset.item(number), last.offset.item(number) + last.nbytes.item(number)
            assert end - offset == sum(map(len, buffers)), f"clip number {number}: {end - offset} bytes for {buffers}"
            return [_Range(first.file.item(number), offset, end, list(buffers))]
        ranges: list[_Range] = []
        for tensor, buffer in zip(self.tensors, buffers, strict=True):
            # `item` costs half as much as an index and a conversion, and this is asked for every tensor read
            file, offset, nbytes = tensor.file.item(number), tensor.offset.item(number), len(buffer)
            assert nbytes == tensor.nbytes.item(number), f"{tensor.name}: a buffer of {nbytes} bytes"
            if ranges and ranges[-1].file == file and ranges[-1].end == offset:
                ranges[-1].end += nbytes
                ranges[-1].buffers.append(buffer)
            else:
                ranges.append(_Range(file, offset, offset + nbytes, [buffer]))
        return ranges

    def _read_range(self, part: _Range, number: int, seen: Callable[[memoryview], None] | None = None) -> None:
        try:
            count = self._storage.read_into(self._files[part.file], part.offset, part.buffers, seen)
        except FileNotFoundError as fault:
            raise CacheError(
                f"{self._where(part.file, number)}: the file is missing, though the snapshot names it; restore it from "
                f"a copy, or {self._verify_command}"
            ) from fault
        except OSError as fault:
            raise MachineError(
                f"{self._where(part.file, number)}: cannot be read: {fault.strerror}; run the same command again"
            ) from fault
        nbytes = part.end - part.offset
        if count != nbytes:
            raise CacheError(
                f"{self._where(part.file, number)}: the file ends after {count} of its {nbytes} bytes; it was cut "
                f"short: {self._verify_command}"
            )

    def _check_record(self, shard: int) -> None:
        """Compare the commit record on disk with the one that the snapshot pins, when the shard is first read."""
        if shard in self._checked_shards:
            return
        generation, seal = self._records[shard]
        _, found = self._folder.read_record_metadata(shard, generation)
        if found != seal:
            raise CacheError(
                f"{self._storage.root}/{self._folder.record_path(shard, generation)}: its seal is {found[:12]}, but "
                f"snapshot {self._snapshot.digest[:12]} was made of the record with {seal[:12]}; the cache was changed "
                f"since: restore the record from a copy, or take stock anew: `mimir-precompute finalize "
                f"{self._storage.root}`"
            )
        with self._lock:
            self._checked_shards.add(shard)

    def _where(self, file: int, number: int) -> str:
        return f"{self._storage.root}/{self._files[file]}: `{self.feature}` of clip {self._clips[number]}"

    @property
    def _verify_command(self) -> str:
        return f"see `mimir-precompute verify {self._storage.root}`"


def _hash(buffers: Sequence[memoryview]) -> int:
    digest = xxhash.xxh3_64()
    for buffer in buffers:
        digest.update(buffer)
    return digest.intdigest()


def _tensor_columns(
    column: pa.StructArray, spec: FeatureSpec, clips_of_bucket: Mapping[str, np.ndarray], root: str
) -> tuple[TensorColumn, ...]:
    """In stored order, in which their bytes were hashed too."""
    specs_of_bucket = {bucket: {s.name: s for s in spec.tensor_specs(bucket)} for bucket in clips_of_bucket}
    places_of = {}
    if any(field.name == "tensors" for field in column.type):
        tensors = column.field("tensors")
        places_of = {field.name: tensors.field(field.name) for field in tensors.type}
    for bucket, specs in specs_of_bucket.items():
        if specs.keys() != places_of.keys():
            raise CacheError(
                f"{root}: the index has tensors {sorted(places_of)} of `{spec.feature}`, spec.json {sorted(specs)} for "
                f"bucket {bucket}; index and spec disagree: write the snapshot again with `mimir-precompute finalize`"
            )
    found = []
    for name, places in places_of.items():
        first = next(iter(specs_of_bucket.values()))[name]
        shape = places.field("shape")
        tensor = TensorColumn(
            name=name,
            dtype=first.dtype,
            sizes=first.sizes,
            file=places.field("file").to_numpy(),
            offset=places.field("offset").to_numpy(),
            nbytes=places.field("nbytes").to_numpy(),
            shape=shape.flatten().to_numpy().reshape(len(shape), -1),
        )
        for bucket, numbers in clips_of_bucket.items():
            own = specs_of_bucket[bucket][name]
            assert own.dtype == first.dtype, f"{name}: {own.dtype} in bucket {bucket}, {first.dtype} in others"
            bad = _departing(tensor, own.sizes, numbers)
            if bad is not None:
                raise CacheError(
                    f"{root}: {name!r} of clip number {bad} has dims {tuple(tensor.shape[bad].tolist())} in "
                    f"{int(tensor.nbytes[bad])} bytes, spec.json says {own.sizes} of {own.dtype} for bucket {bucket}; "
                    f"index and spec disagree: write the snapshot again with `mimir-precompute finalize`"
                )
        found.append(tensor)
    return tuple(found)


def _departing(tensor: TensorColumn, sizes: Sequence[int | None], numbers: np.ndarray) -> int | None:
    """The first of some clips whose dims or bytes do not fit; None where all do."""
    if tensor.shape.shape[1] != len(sizes):
        return int(numbers[0]) if len(numbers) else None
    if len(numbers) == len(tensor.shape):
        numbers = np.arange(len(numbers))  # all clips: in the order of the index nothing needs to be gathered
        shape, stored = tensor.shape, tensor.nbytes
    else:
        shape, stored = tensor.shape[numbers], tensor.nbytes[numbers]
    nbytes = np.full(len(numbers), NUMPY_DTYPES[tensor.dtype].itemsize, np.int64)
    for dim in range(shape.shape[1]):
        nbytes *= shape[:, dim]
    fits = nbytes == stored
    for dim, size in enumerate(sizes):
        if size is not None:
            fits &= shape[:, dim] == size
    return None if fits.all() else int(numbers[np.argmin(fits)])
