"""The files of a checkpoint, as torch.distributed.checkpoint writes and reads them.

That library plans which rank writes which piece of which tensor, and which pieces a rank reads to get what it holds,
whatever the ranks were when it was saved. Here the pieces become files: each rank writes one safetensors file of each
part, `model/00003.safetensors`, whose header says where in its tensor every piece belongs. The library's own writers
keep that in a pickle, or hold a second copy of a rank's whole state in memory; here is neither.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import struct
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from mimir_shared.errors import CacheError, MachineError
from mimir_shared.failpoints import failpoint
from mimir_shared.plain_documents import parse_json
from mimir_shared.storage.disk import Disk
from mimir_shared.wording import format_size
from mimir_train.checkpoint.folder import MANIFEST, FileDigest

PIECES: Final = "pieces"
"""Key in the metadata of a file: name in the file → [name of the tensor, offsets of the piece, dims of the tensor]."""
DTYPES: Final = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_CHUNK_BYTES: Final = 1 << 24
_ALIGNMENT: Final = 8
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

# one process without a group is no mistake here; said at every save and load, from whichever thread
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

Foreign = Any
"""What the library hands through without a type of its own."""


@dataclass(frozen=True, kw_only=True)
class WrittenFile:
    """What a rank tells of a file: its name in the checkpoint, and what was written."""

    name: str
    digest: FileDigest


@contextmanager
def faults_of_ranks() -> Iterator[None]:
    """Raise what went wrong on the first rank that failed, in place of the library's bundle of all."""
    try:
        yield
    except CheckpointException as bundle:
        fault, _ = bundle.failures[min(bundle.failures)]
        raise fault from None


def part_of(tensor_name: str) -> str:
    """ "optimizer" of "optimizer.dit.proj_out.weight.exp_avg"."""
    return tensor_name.partition(".")[0]


class PieceWriter(StorageWriter):
    """Writes a checkpoint under another name and renames it when all is on the disk, the manifest last.

    Args:
        final: the folder that the checkpoint becomes; one that is there is replaced.
        rank: of this process, for the names of its files.
        nbytes: that the tensors take on all ranks, for what is said when they do not fit.
        seal: gives the bytes of checkpoint.json, from the digests of all files.
        published: called by the first rank when the checkpoint is there.
    """

    def __init__(
        self,
        final: Path,
        *,
        rank: int,
        nbytes: int,
        seal: Callable[[Mapping[str, FileDigest]], bytes],
        published: Callable[[], None],
        disk: Disk,
    ) -> None:
        self.final = final
        self.unfinished = final.with_name(f".{final.name}.unfinished")
        self._rank = rank
        self._nbytes = nbytes
        self._seal = seal
        self._published = published
        self._disk = disk

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one save to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Foreign, **kwargs: Foreign) -> None:
        """Nothing to do: folders are made when the plan is known."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first rank, before any writes: an empty folder. Raises MachineError."""
        with self._disk_faults():
            if self.unfinished.exists():
                self._disk.remove_tree(self.unfinished)
            if not self.final.parent.is_dir():
                self.final.parent.mkdir(parents=True, exist_ok=True)
                for folder in list(self.final.parents)[1:3]:  # the run and what it lies in: both may be new
                    self._disk.sync_directory(folder)
            self._make_folder(self.unfinished)
            failpoint("checkpoint.folder_made")
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's pieces, a file a part. Raises MachineError."""
        parts: dict[str, list[WriteItem]] = defaultdict(list)
        for item in plan.items:
            assert item.tensor_data is not None, f"{item.index.fqn} is no tensor, and would have to be pickled"
            if math.prod(item.tensor_data.chunk.sizes) or not math.prod(item.tensor_data.size):  # a rank may hold none
                parts[part_of(item.index.fqn)].append(item)
        results = []
        with self._disk_faults():
            for part, items in sorted(parts.items()):
                name = f"{part}/{self._rank:05d}.safetensors"
                self._make_folder(self.unfinished / part)
                written = WrittenFile(name=name, digest=self._write_file(self.unfinished / name, items, planner))
                self._disk.sync_directory(self.unfinished / part)
                failpoint("checkpoint.file_synced")
                results += [WriteResult(item.index, item.tensor_storage_size() or 0, written) for item in items]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, when all have written: the manifest, then the name. Raises MachineError."""
        written = {result.storage_data.name: result.storage_data.digest for rank in results for result in rank}
        manifest = self._seal(dict(sorted(written.items())))
        with self._disk_faults():
            with self._disk.create(self.unfinished / MANIFEST) as file:
                file.write(manifest)
                failpoint("checkpoint.manifest_written")
                self._disk.sync_file(file)
            self._disk.sync_directory(self.unfinished)
            failpoint("checkpoint.manifest_synced")
            self._publish()
        self._published()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def _publish(self) -> None:
        replaced = self.final.with_name(f".{self.final.name}.replaced")
        if self.final.exists():
            if replaced.exists():
                self._disk.remove_tree(replaced)
            self._disk.rename(self.final, replaced)
            failpoint("checkpoint.old_set_aside")
        # last: a reader must see a whole checkpoint or none
        self._disk.rename(self.unfinished, self.final)
        failpoint("checkpoint.renamed")
        self._disk.sync_directory(self.final.parent)
        if replaced.exists():
            self._disk.remove_tree(replaced)

    @contextmanager
    def _disk_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as fault:
            is_full = fault.errno in _FULL
            raise MachineError(
                f"{self.final}: saving the checkpoint: {fault.strerror or fault} "
                f"({errno.errorcode.get(fault.errno or 0, '?')}) on rank {self._rank}; it takes "
                f"{format_size(self._nbytes)}{_free_bytes(self.final)}. Checkpoints from before are untouched: "
                f"{'make room' if is_full else 'mend it'}, then run again with --resume-from-checkpoint latest"
            ) from fault

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            with suppress(FileExistsError):  # of another rank
                self._disk.make_directory(folder)

    def _write_file(self, path: Path, items: Sequence[WriteItem], planner: SavePlanner) -> FileDigest:
        names = _names_in_file(items)
        header, ordered = _header(names)
        with self._disk.create(path) as file:
            digesting = _DigestingFile(file)
            digesting.write(header)
            for name in ordered:
                # one by one: a second copy of everything would not fit beside the first
                tensor = cast(Tensor, planner.resolve_data(names[name])).detach().cpu().contiguous()
                digesting.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                failpoint("checkpoint.tensor_written")
            self._disk.sync_file(file)
        return digesting.digest


def _free_bytes(path: Path) -> str:
    with suppress(OSError):
        return f", and {format_size(shutil.disk_usage(path.parent).free)} are free there"
    return ""


class _DigestingFile:
    """Hashes what it writes: a disk that keeps something else is found out when the checkpoint is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for begin in range(0, len(view), _CHUNK_BYTES):
            chunk = view[begin : begin + _CHUNK_BYTES]
            self._sha256.update(chunk)
            self._file.write(chunk)
            self._bytes += len(chunk)

    @property
    def digest(self) -> FileDigest:
        return FileDigest(bytes=self._bytes, sha256=self._sha256.hexdigest())


def _names_in_file(items: Sequence[WriteItem]) -> dict[str, WriteItem]:
    """A tensor's own name for its first piece in a file, with a number for further ones."""
    names: dict[str, WriteItem] = {}
    for item in items:
        name, number = item.index.fqn, 1
        while name in names:
            number += 1
            name = f"{item.index.fqn}#{number}"
        names[name] = item
    return names


def _header(names: Mapping[str, WriteItem]) -> tuple[bytes, list[str]]:
    """The header of a safetensors file, and the order of the tensors behind it: widest dtype first, for alignment."""

    def width(name: str) -> int:
        data = names[name].tensor_data
        assert data is not None
        return int(data.properties.dtype.itemsize)

    ordered = sorted(names, key=lambda name: (-width(name), name))
    places: dict[str, object] = {}
    pieces: dict[str, object] = {}
    position = 0
    for name in ordered:
        data = names[name].tensor_data
        assert data is not None
        end = position + math.prod(data.chunk.sizes) * width(name)
        places[name] = {
            "dtype": DTYPES[data.properties.dtype],
            "shape": list(data.chunk.sizes),
            "data_offsets": [position, end],
        }
        pieces[name] = [names[name].index.fqn, list(data.chunk.offsets), list(data.size)]
        position = end
    metadata = {"format": "pt", PIECES: json.dumps(pieces, separators=(",", ":"))}
    text = json.dumps({"__metadata__": metadata, **places}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, ordered


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a piece lies."""

    file: str
    name: str
    dims: tuple[int, ...]


class PieceReader(StorageReader):
    """Reads pieces of a checkpoint whose files were checked (`find_checkpoint`).

    Args:
        folder: the checkpoint.
        files: names of its files that are looked into.
    """

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self._folder = folder
        self._places: dict[MetadataIndex, _Place] = {}
        self._saved: dict[str, TensorStorageMetadata] = {}
        for file in files:
            self._read_header(file)

    @property
    def dims(self) -> dict[str, tuple[int, ...]]:
        """Name → dims of every tensor in the files, whole."""
        return {name: tuple(saved.size) for name, saved in self._saved.items()}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A reader is of one checkpoint."""

    def read_metadata(self, *args: Foreign, **kwargs: Foreign) -> Metadata:
        # a dict of a wider type there; it is not written to
        return Metadata(state_dict_metadata=cast(Foreign, self._saved), storage_data=self._places)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Foreign, **kwargs: Foreign
    ) -> None:
        """Nothing to do: the headers have been read."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what the plan asks for into the tensors that are to be filled. Raises CacheError."""
        wanted: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            wanted[self._places[item.storage_index].file].append(item)
        for name, items in wanted.items():
            try:
                with safe_open(self._folder / name, framework="pt") as file:
                    for item in items:
                        self._read_piece(file, item, planner)
            except (OSError, SafetensorError) as fault:
                raise CacheError(f"{self._folder / name}: cannot be read ({fault}); restore it from a copy") from fault
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def _read_piece(self, file: Foreign, item: ReadItem, planner: LoadPlanner) -> None:
        place = self._places[item.storage_index]
        if tuple(item.lengths) == place.dims:
            piece = file.get_tensor(place.name)
        else:
            ends = (begin + length for begin, length in zip(item.storage_offsets, item.lengths, strict=True))
            bounds = zip(item.storage_offsets, ends, strict=True)
            piece = file.get_slice(place.name)[tuple(slice(begin, end) for begin, end in bounds)]
        target = planner.resolve_tensor(item).detach()
        target.copy_(piece)
        planner.commit_tensor(item, target)

    def _read_header(self, name: str) -> None:
        path = self._folder / name
        try:
            with safe_open(path, framework="pt") as file:
                pieces = parse_json(file.metadata()[PIECES])
                shapes = {key: file.get_slice(key).get_shape() for key in pieces}
                dtypes = {key: file.get_slice(key).get_dtype() for key in pieces}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as fault:
            raise CacheError(f"{path}: not a file of a checkpoint ({fault!r}); restore it from a copy") from fault
        of_name = {value: key for key, value in DTYPES.items()}
        for key, (tensor, offsets, dims) in pieces.items():
            saved = self._saved.setdefault(
                tensor,
                TensorStorageMetadata(TensorProperties(dtype=of_name[dtypes[key]]), size=torch.Size(dims), chunks=[]),
            )
            saved.chunks.append(ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(shapes[key])))
            place = _Place(file=name, name=key, dims=tuple(shapes[key]))
            self._places[MetadataIndex(tensor, offsets)] = place
