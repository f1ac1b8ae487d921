"""The clips of a list as columns: rows come one by one and are kept in chunks of Arrow, far smaller than as objects."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from mimir_precompute.clips.row import text_problem
from mimir_shared.plan_file import OWN_COLUMNS, hash_keys

CHUNK_CLIPS: Final = 65_536
_CHUNK_CHARACTERS: Final = 2**26
"""Of captions: a chunk with more is closed before it is full."""
LISTED: Final = ("key", "source", "caption", "source_bytes", "source_offset", "start_s", "end_s")
"""The plan's columns that a list decides; source_bytes is None where the file is missing."""


class ClipList:
    """Clips in the order of their list, with the user's further columns."""

    def __init__(self, root: Path | str) -> None:
        """Empty yet.

        Args:
            root: folder, or address in a bucket, that relative sources are read from.
        """
        self.root = root
        self._count = 0
        self.num_missing = 0
        """Clips whose source was not there."""
        self._own: dict[str, list[Any]] = {name: [] for name in LISTED}
        self._further: dict[str, list[Any]] = {}
        self._characters = 0
        self._chunks: list[_Chunk] = []
        self._hashes: tuple[int, list[np.ndarray]] | None = None

    def __len__(self) -> int:
        return self._count

    def add(
        self,
        *,
        key: str,
        source: str,
        caption: str,
        source_bytes: int | None,
        source_offset: int | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
        further: Mapping[str, Any] | None = None,
    ) -> None:
        """Append a clip.

        Args:
            source: path relative to root; for a member of a tar, "file.tar::member".
            source_offset: of a member's bytes in its tar.
            further: the user's own columns; one that other clips have and this one lacks holds None.
        """
        values = (key, source, caption, source_bytes, source_offset, start_s, end_s)
        for column, value in zip(self._own.values(), values, strict=True):
            column.append(value)
        before = len(self._own["key"]) - 1
        for name in further or ():
            if name not in self._further:
                self._further[name] = [None] * before
        for name, column in self._further.items():
            column.append(None if further is None else further.get(name))
        self._count += 1
        self.num_missing += source_bytes is None
        self._characters += len(caption)
        if before + 1 >= CHUNK_CLIPS or self._characters > _CHUNK_CHARACTERS:
            self._close_chunk()

    def tables(self) -> list[pa.Table]:
        """All clips: LISTED, then the further columns under the names that they have in a plan; equal schemas."""
        self._close_chunk()
        types = self._further_types()
        return [chunk.table(types) for chunk in self._chunks]

    def give_away(self, seed: int) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """Each of the tables and its hashes; the list lets go of it, for one copy of all captions is enough."""
        hashes, types = self.hashes(seed), self._further_types()
        self._hashes = None
        for of_table in hashes:
            yield self._chunks.pop(0).table(types), of_table

    def _further_types(self) -> dict[str, pa.DataType | None]:
        names = dict.fromkeys(name for chunk in self._chunks for name in chunk.further)
        return {
            name: _common_type([chunk.further[name] for chunk in self._chunks if name in chunk.further])
            for name in names
        }

    def hashes(self, seed: int) -> list[np.ndarray]:
        """`hash_keys` of each of the tables."""
        if self._hashes is None or self._hashes[0] != seed:
            self._close_chunk()
            self._hashes = seed, [hash_keys(chunk.own["key"], seed) for chunk in self._chunks]
        return self._hashes[1]

    def column(self, name: str) -> list[Any]:
        """One column of all clips."""
        return [value for table in self.tables() for value in table[name].to_pylist()]

    def _close_chunk(self) -> None:
        if self._own["key"]:
            own = pa.table({name: pa.array(values, OWN_COLUMNS.field(name).type) for name, values in self._own.items()})
            further = {}
            for name, values in self._further.items():
                further[f"user_{name}" if name in OWN_COLUMNS.names else name] = _FurtherColumn.of(values)
            self._chunks.append(_Chunk(own, further))
            self._own = {name: [] for name in LISTED}
            self._further = {}
            self._characters = 0
            self._hashes = None


class _FurtherColumn:
    """Some values of a user's column; as JSON text where Arrow or Parquet has no type for all of them."""

    def __init__(self, array: pa.Array, is_json: bool) -> None:
        self.array = array
        self.is_json = is_json

    @classmethod
    def of(cls, values: list[Any]) -> "_FurtherColumn":
        with contextlib.suppress(pa.ArrowException, OverflowError, UnicodeEncodeError):
            array = pa.array(values)
            if _fits_parquet(array.type):
                return cls(array, is_json=False)
        # mixed types, integers of more than 64 bits, lone surrogates, empty objects
        return cls(_json_array(values), is_json=True)

    def cast(self, kind: pa.DataType | None) -> pa.Array:
        """With the type of the whole column; None: as JSON text."""
        if kind is None:
            return self.array if self.is_json else _json_array(self.array.to_pylist())
        return self.array if self.array.type == kind else self.array.cast(kind)


class _Chunk:
    def __init__(self, own: pa.Table, further: dict[str, _FurtherColumn]) -> None:
        self.own = own
        self.further = further

    def table(self, types: Mapping[str, pa.DataType | None]) -> pa.Table:
        table = self.own
        for name, kind in types.items():
            if name in self.further:
                array = self.further[name].cast(kind)
            else:
                array = pa.nulls(self.own.num_rows, pa.string() if kind is None else kind)
            table = table.append_column(name, array)
        return table


def _common_type(parts: list[_FurtherColumn]) -> pa.DataType | None:
    """The type that holds every part's values; None where that is JSON text alone."""
    if any(part.is_json for part in parts):
        return None
    try:
        schemas = [pa.schema([("x", part.array.type)]) for part in parts]
        kind = _ordered(pa.unify_schemas(schemas, promote_options="permissive").field("x").type)
        for part in parts:
            part.cast(kind)
    except pa.ArrowException:
        return None
    return kind


def _ordered(kind: pa.DataType) -> pa.DataType:
    """With the fields of objects by name: which of them came first in the list must not show."""
    if pa.types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        return pa.struct(sorted(((one.name, _ordered(one.type)) for one in fields), key=lambda field: field[0]))
    return pa.list_(_ordered(kind.value_type)) if pa.types.is_list(kind) else kind


def _json_array(values: list[Any]) -> pa.Array:
    return pa.array([None if value is None else _as_json(value) for value in values], pa.string())


def _fits_parquet(kind: pa.DataType) -> bool:
    """Whether Parquet can hold it: no object without a field."""
    children = [kind.field(index).type for index in range(kind.num_fields)]
    return not (pa.types.is_struct(kind) and not children) and all(_fits_parquet(child) for child in children)


def _as_json(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if text.isascii() or text_problem(text) is None else json.dumps(value, default=str)
