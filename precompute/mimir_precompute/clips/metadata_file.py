"""The rows of a metadata file: JSONL, CSV or Parquet; each with where it stands."""

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from mimir_precompute.clips.row import Problems
from mimir_shared.plain_documents import parse_json


def _jsonl_rows(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"line {number}"
            try:
                row = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as fault:
                problems.add(f"{where}: not UTF-8 (byte 0x{line[fault.start]:02x} at {fault.start})")
                continue
            except ValueError as fault:
                problems.add(f"{where}: not JSON ({fault})")
                continue
            if isinstance(row, dict):
                yield where, row
            else:
                problems.add(f"{where}: {type(row).__name__}, expected an object")


def _csv_rows(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = data.count(b"\n", 0, fault.start) + 1
        problems.add(f"line {line}: not UTF-8 (byte 0x{data[fault.start]:02x})")
        return
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for row in reader:
        where = f"line {reader.line_num}"
        if None in row:
            problems.add(f"{where}: more fields than the header has")
        else:
            # an empty field of a CSV is a missing value: no caption, no trim
            yield where, {name: value if value != "" else None for name, value in row.items()}


def _parquet_rows(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                yield f"row {number}", row
                number += 1
    except (pa.ArrowException, UnicodeDecodeError) as fault:
        problems.add(f"not readable as Parquet ({str(fault).splitlines()[0]})")


ROWS: Final[dict[str, Callable[[Path, Problems], Iterator[tuple[str, dict[str, Any]]]]]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
"""Ending of the file's name → its reader."""
