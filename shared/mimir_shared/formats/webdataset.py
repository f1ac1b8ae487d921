"""A shard as an uncompressed POSIX tar, both directions.

A sample is `<shard><row>.json` and, where the feature has tensors, `<shard><row>.safetensors`. Equal
samples give equal bytes: fixed owner and time, sorted JSON keys, members in row order. Plain `tar` and
`webdataset` read it; our reader takes the offsets from the commit record and never parses the tar.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import xxhash

from mimir_shared.features import FeatureTensor
from mimir_shared.layout import sample_stem
from mimir_shared.manifest import StoredSample
from mimir_shared.safetensors_bytes import TensorPlace, read_header, tensors_to_safetensors

ENDING = "tar"


def document_bytes(document: Mapping[str, Any]) -> bytes:
    """JSON as it stands in a shard: sorted keys, UTF-8."""
    return json.dumps(document, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


class WebDatasetWriter:
    """Writes the samples of one shard in row order, and says where each came to lie."""

    def __init__(self, file: BinaryIO, shard: int) -> None:
        self._output = _HashingFile(file)
        output: Any = self._output  # a file as far as writing a tar needs one
        self._tar = tarfile.TarFile(fileobj=output, mode="w", format=tarfile.USTAR_FORMAT)
        self._shard = shard
        self._last_row = -1

    def add(self, row: int, document: Mapping[str, Any], tensors: Mapping[str, FeatureTensor]) -> StoredSample:
        """Append one sample. Rows must come in rising order."""
        assert row > self._last_row, f"row {row} after row {self._last_row}"
        self._last_row = row
        document_text = document_bytes(document)
        safetensors = tensors_to_safetensors(tensors) if tensors else None
        stem = sample_stem(self._shard, row)
        json_offset = self._add_member(f"{stem}.json", document_text)
        places: list[TensorPlace] = []
        tensor_hash = None
        if safetensors is not None:
            base = self._add_member(f"{stem}.safetensors", safetensors)
            for place in read_header(safetensors, stem):
                places.append(
                    TensorPlace(
                        name=place.name,
                        dtype=place.dtype,
                        shape=place.shape,
                        offset=base + place.offset,
                        nbytes=place.nbytes,
                    )
                )
            tensor_hash = xxhash.xxh3_64_intdigest(safetensors[places[0].offset - base :])
        return StoredSample(
            json_offset=json_offset,
            json_nbytes=len(document_text),
            json_xxh3=xxhash.xxh3_64_intdigest(document_text),
            tensors=tuple(places),
            xxh3=tensor_hash,
        )

    def finish(self) -> tuple[int, str]:
        """Close the tar; (bytes, sha256 in hex) of the whole file."""
        self._tar.close()
        return self._output.nbytes, self._output.sha256.hexdigest()

    def _add_member(self, name: str, data: bytes) -> int:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        entry.mode = 0o644
        self._tar.addfile(entry, io.BytesIO(data))
        end = self._output.nbytes
        return end - len(data) - (-len(data) % tarfile.BLOCKSIZE)


class _HashingFile:
    """Passes bytes on and hashes them on the way, so that a shard is read back by nobody."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.nbytes = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.nbytes += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.nbytes
