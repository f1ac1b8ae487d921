"""A shard as an uncompressed POSIX tar.

A sample is `<shard><row>.json` and, where the feature has tensors, `<shard><row>.safetensors`. Equal
samples give equal bytes: fixed owner and time, sorted JSON keys, members in row order. Plain `tar` and
`webdataset` read it; our reader takes the offsets from the commit record and never parses the tar.
"""

import json
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from mimir_shared.features import FeatureTensor, TensorSpec
from mimir_shared.formats.shard_format import HashingFile, NewFile, WrittenShard
from mimir_shared.layout import data_name, sample_stem
from mimir_shared.manifest import StoredSample
from mimir_shared.safetensors_bytes import TensorPlace, read_header, tensors_to_safetensors
from mimir_shared.storage.folder import TemporaryFile

ENDING = "tar"


def document_bytes(document: Mapping[str, Any]) -> bytes:
    """JSON as it stands in a shard: sorted keys, UTF-8."""
    return json.dumps(document, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


class SampleTar:
    """A tar whose bytes follow from the names and bytes of its members alone."""

    def __init__(self, temporary: TemporaryFile) -> None:
        self._output = HashingFile(temporary)

    def add(self, name: str, data: bytes) -> int:
        """Append a member; the offset of its bytes in the tar."""
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        entry.mode = 0o644
        self._output.write(entry.tobuf(tarfile.USTAR_FORMAT))
        offset = self._output.nbytes
        # in one piece, where TarFile copies 16 kB at a time: pages of a file written so are dearer to read
        self._output.write(data)
        self._output.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def finish(self) -> HashingFile:
        """Close the tar: two blocks of zeros, and more up to a whole record, as `tar` itself writes them."""
        end = self._output.nbytes + 2 * tarfile.BLOCKSIZE
        self._output.write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        return self._output


class WebDatasetWriter:
    """Writes the samples of one shard in row order, and says where each came to lie."""

    def __init__(self, shard: int, new_file: NewFile) -> None:
        self._tar = SampleTar(new_file())
        self._shard = shard
        self._last_row = -1
        self._stored: dict[int, StoredSample] = {}

    def add(
        self,
        row: int,
        document: Mapping[str, Any],
        tensors: Mapping[str, FeatureTensor],
        specs: Sequence[TensorSpec],
        bucket: str | None,
    ) -> None:
        """Append one sample; see ShardFormat. A tar needs neither the specs nor the bucket."""
        assert row > self._last_row, f"row {row} after row {self._last_row}"
        self._last_row = row
        document_text = document_bytes(document)
        safetensors = tensors_to_safetensors(tensors) if tensors else None
        stem = sample_stem(self._shard, row)
        json_offset = self._tar.add(f"{stem}.json", document_text)
        places: list[TensorPlace] = []
        tensor_hash = None
        if safetensors is not None:
            base = self._tar.add(f"{stem}.safetensors", safetensors)
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
        self._stored[row] = StoredSample(
            json_offset=json_offset,
            json_nbytes=len(document_text),
            json_xxh3=xxhash.xxh3_64_intdigest(document_text),
            tensors=tuple(places),
            xxh3=tensor_hash,
        )

    def finish(self) -> WrittenShard:
        """Close the tar."""
        output = self._tar.finish()
        path = data_name(self._shard, output.sha256, ENDING)
        return WrittenShard(files=(output.as_written(path),), stored=self._stored)
