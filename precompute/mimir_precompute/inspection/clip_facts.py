"""Everything that a cache knows of one clip, as plain JSON values: `inspect`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.compute as pc

from mimir_precompute.clips.fetch import ClipFetcher
from mimir_precompute.clips.rejection import ClipRejected
from mimir_precompute.clips.source import hash_source
from mimir_precompute.inspection.find_clip import complete_key
from mimir_shared.errors import CacheError, MachineError
from mimir_shared.feature_folder import FeatureFolder, find_features
from mimir_shared.features import FeatureTensor
from mimir_shared.manifest import CommitRecord, SampleRecord, StoredSample
from mimir_shared.plan_file import OWN_COLUMNS, Plan, PlannedClip, read_plan
from mimir_shared.storage.protocol import Storage

Json = Any
"""A value that `json` writes; the library gives it no type."""

_PLAN_COLUMNS = ("caption", "source", "source_bytes", "source_offset", "bucket", "start_s", "end_s", "shard", "row")


def describe_clip(storage: Storage, key: str) -> dict[str, Json]:
    """Everything known of one clip.

    A clip that a later plan removed is described by its last row. Bytes that do not match their hashes are told, not
    raised: `matches` is then false, beside the `fault`.
    Raises: InputError for an unknown key, CacheError where the plan or a record is damaged.
    """
    plan = read_plan(storage)
    key = complete_key(key, {one for file in plan.files for one in file.table["key"].to_pylist()})
    rows = _rows_of(plan, key)
    last = next(row for row in reversed(rows) if not row["removed"])
    clip = PlannedClip(**{name: last[name] for name in OWN_COLUMNS.names})
    described: dict[str, Json] = {
        "key": clip.key,
        "state": "removed" if rows[-1]["removed"] else "planned",
        "plan": last["plan"],
        **{name: last[name] for name in _PLAN_COLUMNS},
        "source_root": plan.settings.source_root,
        "columns": {n: v for n, v in last.items() if n not in OWN_COLUMNS.names and n != "plan"},
        "history": [_describe_row(row) for row in rows] if len(rows) > 1 else [],
        "source_now": _describe_source(plan, clip),
        "features": {},
    }
    for folder in find_features(storage):
        described["features"][f"{folder.feature}/{folder.fingerprint}"] = _describe_feature(folder, clip)
    return described


def _rows_of(plan: Plan, key: str) -> list[dict[str, Json]]:
    """Every row of a key, oldest first, with all columns and the number of its plan file."""
    return [
        {"plan": file.settings.index, **row}
        for file in plan.files
        for row in file.table.filter(pc.equal(file.table["key"], key)).to_pylist()
    ]


def _describe_row(row: dict[str, Json]) -> dict[str, Json]:
    if row["removed"]:
        return {"plan": row["plan"], "change": "removed"}
    change = {"plan": row["plan"], "change": "planned"}
    return change | {name: row[name] for name in ("shard", "row", "source", "source_bytes", "caption")}


def _describe_source(plan: Plan, clip: PlannedClip) -> dict[str, Json]:
    """What the source is now."""
    try:
        with ClipFetcher(plan.settings.source_root).fetch(clip) as source:
            return {"xxh3": _digits(hash_source(source))}
    except ClipRejected as rejected:
        return {"fault": f"{rejected.reason}: {rejected.detail}"}
    except MachineError as fault:
        return {"fault": str(fault)}


def _describe_feature(folder: FeatureFolder, clip: PlannedClip) -> dict[str, Json]:
    generation = folder.generations().get(clip.shard)
    if generation is None:
        return {"status": "not encoded yet"}
    record = folder.read_record(clip.shard, generation)
    sample = record.samples[clip.row]
    described: dict[str, Json] = {
        "status": sample.status,
        "generation": generation,
        "record": folder.record_path(clip.shard, generation),
        "format": record.metadata.format,
        "bucket": sample.bucket,
        "caption_xxh3": _digits(sample.caption_xxh3),
        "source_xxh3": _digits(sample.source_xxh3),
    }
    if sample.stored is None:
        why = ("stage", "reason", "detail", "attempt")
        return {**described, **{name: getattr(sample, name) for name in why}}
    return {**described, **_describe_stored(folder, record, sample, sample.stored)}


def _describe_stored(
    folder: FeatureFolder, record: CommitRecord, sample: SampleRecord, stored: StoredSample
) -> dict[str, Json]:
    """Where the bytes lie, whether they match, and what is in them."""
    shard = folder.open_shard(record)
    document, text_fault = _try(lambda: shard.read_document(sample))
    tensors, tensor_fault = _try(lambda: shard.read_tensors(sample))
    files = [f"{folder.directory}/{data_file.path}" for data_file in record.metadata.files]
    valid_rows = (document or {}).get("valid_rows", {})
    return {
        "matches": text_fault is None and tensor_fault is None,
        "fault": text_fault or tensor_fault,
        "file": files[stored.json_file],
        "text": {"offset": stored.json_offset, "nbytes": stored.json_nbytes, "xxh3": _digits(stored.json_xxh3)},
        "tensors_xxh3": _digits(stored.xxh3),
        "tensors": [
            {
                "name": place.name,
                "dtype": place.dtype,
                "shape": list(place.shape),
                "valid_rows": valid_rows.get(place.name),
                **(_describe_values(tensors[place.name], valid_rows.get(place.name)) if tensors else {}),
                "file": files[place.file],
                "offset": place.offset,
                "nbytes": place.nbytes,
            }
            for place in stored.tensors
        ],
        "document": {
            name: value for name, value in (document or {}).items() if name not in ("key", "caption", "valid_rows")
        },
    }


def _try(read: Callable[[], dict[str, Json]]) -> tuple[dict[str, Json] | None, str | None]:
    try:
        return read(), None
    except CacheError as fault:
        return None, str(fault)


def _describe_values(tensor: FeatureTensor, valid_rows: int | None) -> dict[str, float]:
    """Of the rows before the padding; ids and offsets are no quantities."""
    values = tensor.to_float32()[:valid_rows].astype(np.float64)
    if tensor.dtype == "i32" or not values.size:
        return {}
    described = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
    return {name: float(value) for name, value in described.items()}


def _digits(xxh3: int | None) -> str | None:
    return None if xxh3 is None else f"{xxh3:016x}"
