"""The data files of one committed shard, read at the places that its commit record gives, in either format.

Both formats keep every tensor of a sample as one range of raw bytes, and the text of a sample as UTF-8; neither is
parsed here. What comes out was checked against the hashes in the record.
"""

from typing import Any, Final

import xxhash

from mimir_shared.errors import CacheError, MachineError
from mimir_shared.features import FeatureTensor
from mimir_shared.manifest import CommitRecord, SampleRecord, StoredSample
from mimir_shared.plain_documents import parse_json
from mimir_shared.safetensors_bytes import tensor_at
from mimir_shared.storage.protocol import Storage

SEE_VERIFY: Final = "; the shard is damaged: run `mimir-precompute verify`"


class ShardFiles:
    """Reads the samples of one shard, by one call for each range of bytes."""

    def __init__(self, storage: Storage, directory: str, record: CommitRecord) -> None:
        """Of the record in the feature folder `directory`."""
        self._storage = storage
        self._directory = directory
        self._record = record

    def read_document(self, sample: SampleRecord) -> dict[str, Any]:
        """The text of a sample that is ok. Raises CacheError where it is missing or does not match its hash."""
        stored = self._stored(sample)
        data = self._read(stored.json_file, stored.json_offset, stored.json_nbytes)
        if len(data) != stored.json_nbytes or xxhash.xxh3_64_intdigest(data) != stored.json_xxh3:
            raise CacheError(self._damaged(stored.json_file, sample, "text"))
        document = parse_json(data)
        assert isinstance(document, dict), f"{self._where(stored.json_file)}: {sample.key!r} has no object as text"
        return document

    def read_tensors(self, sample: SampleRecord) -> dict[str, FeatureTensor]:
        """The tensors of a sample that is ok. Raises CacheError where they are missing or do not match their hash."""
        stored = self._stored(sample)
        tensors: dict[str, FeatureTensor] = {}
        digest = xxhash.xxh3_64()
        for place in stored.tensors:
            data = self._read(place.file, place.offset, place.nbytes)
            if len(data) != place.nbytes:
                raise CacheError(self._damaged(place.file, sample, "tensors"))
            digest.update(data)
            tensors[place.name] = tensor_at(data, place, base=place.offset, where=self._where(place.file))
        if stored.tensors and digest.intdigest() != stored.xxh3:
            raise CacheError(self._damaged(stored.tensors[0].file, sample, "tensors"))
        return tensors

    def _read(self, file: int, offset: int, nbytes: int) -> bytearray:
        where = self._where(file)
        data = bytearray(nbytes)
        try:
            filled = self._storage.read_into(self._name(file), offset, [memoryview(data)])
        except (FileNotFoundError, NotADirectoryError) as fault:
            raise CacheError(
                f"{where}: missing, though the commit record of shard {self._record.metadata.shard} names it; restore "
                f"it from a copy, or see `mimir-precompute verify`"
            ) from fault
        except OSError as fault:
            raise MachineError(f"{where}: cannot be read: {fault.strerror}; run it again") from fault
        return data[:filled] if filled < nbytes else data

    def _stored(self, sample: SampleRecord) -> StoredSample:
        assert sample.stored is not None, f"sample {sample.key!r} is {sample.status}, it has no bytes"
        return sample.stored

    def _name(self, file: int) -> str:
        return f"{self._directory}/{self._record.metadata.files[file].path}"

    def _where(self, file: int) -> str:
        return f"{self._storage.root}/{self._name(file)}"

    def _damaged(self, file: int, sample: SampleRecord, what: str) -> str:
        return (
            f"{self._where(file)}: the {what} of sample {sample.key!r} (row {sample.row}) "
            f"{'does' if what == 'text' else 'do'} not match the hash in the commit record{SEE_VERIFY}"
        )
