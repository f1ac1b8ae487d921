"""What a format of shards does: take samples in row order, and say in which files, and where in them, each lies.

Files are written under temporary names and published by the commit; nothing of a format is visible before.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mimir_shared.features import FeatureTensor, TensorSpec
from mimir_shared.manifest import DataFile, StoredSample
from mimir_shared.storage.folder import TemporaryFile

NewFile = Callable[[], TemporaryFile]
"""Gives a new temporary file, which is gone when the shard's writing ends."""


@dataclass(frozen=True, kw_only=True)
class WrittenFile:
    """A file of a shard, under a temporary name."""

    temporary: TemporaryFile
    data_file: DataFile


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """The files of a shard whose last sample is written."""

    files: tuple[WrittenFile, ...]
    """In the order of the commit record; published in this order too, so that the last makes the shard readable."""
    stored: Mapping[int, StoredSample]
    """row → where its bytes lie, for every row that was added."""


class ShardFormat(Protocol):
    """Writes one shard."""

    def add(
        self,
        row: int,
        document: Mapping[str, Any],
        tensors: Mapping[str, FeatureTensor],
        specs: Sequence[TensorSpec],
        bucket: str | None,
    ) -> None:
        """Append one sample, whose tensors fit the specs. Rows come in rising order; a row left out stays absent."""
        ...

    def finish(self) -> WrittenShard: ...


class HashingFile:
    """Passes bytes on and hashes them on the way, so that a shard is read back by nobody."""

    def __init__(self, temporary: TemporaryFile) -> None:
        self.temporary = temporary
        self.nbytes = 0
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._sha256.update(data)
        self.nbytes += len(data)
        return self.temporary.file.write(data)

    def tell(self) -> int:
        return self.nbytes

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def as_written(self, path: str) -> WrittenFile:
        """What was written, to be published as `path` in the feature's folder."""
        data_file = DataFile(path=path, bytes=self.nbytes, sha256=self.sha256)
        return WrittenFile(temporary=self.temporary, data_file=data_file)
