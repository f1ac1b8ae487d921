"""Which clips there are, and in which shard and row each will stand: compared with the plan that exists."""

import contextlib
import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import xxhash

from mimir_precompute.clip_list import ClipList
from mimir_precompute.clip_row import text_problem
from mimir_precompute.config import Bucket, Geometry
from mimir_precompute.presets import find_preset
from mimir_shared.errors import CacheError, InputError
from mimir_shared.layout import plan_name
from mimir_shared.plan_file import OWN_COLUMNS, Plan, PlanFile, PlanSettings, read_plan_file, write_plan
from mimir_shared.storage_protocol import Storage

DEFAULT_SHARD_SIZE = 256
_REMOVAL_LIMIT = 0.5


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What the user asked of the plan; None: as the plan that exists has it, or the default."""

    preset: str | None = None
    buckets: tuple[Bucket, ...] = ()
    fps: float | None = None
    shard_size: int | None = None
    seed: int | None = None
    accept_removals: bool = False

    def __post_init__(self) -> None:
        if self.shard_size is not None and self.shard_size < 1:
            raise InputError(f"--shard-size must be at least 1, got {self.shard_size}")
        if self.shard_size is not None and self.shard_size > 99_999:
            raise InputError(f"--shard-size must be at most 99999 (rows have five digits), got {self.shard_size}")

    def geometry(self) -> Geometry:
        """Of a first plan. Raises InputError where neither a preset nor buckets are given."""
        if self.preset is None and not self.buckets:
            raise InputError(
                "no geometry: give --preset (tiny, cogvideox-2b, cogvideox-5b), or --bucket FxHxW and --fps"
            )
        default = find_preset(self.preset).geometry if self.preset is not None else None
        fps = self.fps if self.fps is not None else (default.fps if default else None)
        if fps is None:
            raise InputError("--bucket without a preset needs --fps, the frames a second at which clips are sampled")
        buckets = self.buckets or (default.buckets if default else ())
        if len(set(buckets)) != len(buckets):
            raise InputError(f"--bucket: given twice: {', '.join(map(str, buckets))}")
        return Geometry(buckets=buckets, fps=fps)


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """What planning found, and what the plan holds after it."""

    clips: int
    new: int
    changed: int
    removed: int
    unchanged: int
    missing_files: int
    """Clips whose source was not there; they are quarantined when they are encoded, unless it appears."""
    new_shards: int
    shards: int
    written: bool


def geometry_of(settings: PlanSettings) -> Geometry:
    return Geometry(buckets=tuple(Bucket.parse(text) for text in settings.buckets), fps=settings.fps)


def update_plan(
    storage: Storage, existing: Plan | None, clips: ClipList, request: PlanRequest, *, dry_run: bool = False
) -> tuple[Plan | None, PlanReport]:
    """Compare the clips with the plan of a cache and append what differs.

    Returns: the plan as it is now (None for a dry run on a new cache), and the report.
    Raises: CacheError where the request contradicts the plan that exists; InputError where more than half
        of the planned clips are gone and that was not accepted.
    """
    previous = existing.settings if existing else None
    if previous is not None:
        _check_request(storage, request, previous)
    difference = _compare(existing, clips)
    fresh = difference.new + difference.changed
    if existing is not None and not request.accept_removals:
        _check_removals(storage, existing, difference.removed)
    seed = previous.seed if previous else (request.seed or 0)
    shard_size = previous.shard_size if previous else (request.shard_size or DEFAULT_SHARD_SIZE)
    first_shard = existing.num_shards if existing else 0
    geometry = geometry_of(previous) if previous else request.geometry()
    settings = PlanSettings(
        index=len(existing.files) if existing else 0,
        previous=existing.files[-1].seal if existing else None,
        preset=previous.preset if previous else request.preset,
        buckets=tuple(str(bucket) for bucket in geometry.buckets),
        fps=geometry.fps,
        shard_size=shard_size,
        seed=seed,
        source_root=str(clips.root),
        first_shard=first_shard,
        num_shards=-(-len(fresh) // shard_size),
    )
    moved = previous is not None and previous.source_root != settings.source_root
    write = existing is None or bool(fresh) or bool(difference.removed) or moved
    report = PlanReport(
        clips=len(clips),
        new=len(difference.new),
        changed=len(difference.changed),
        removed=len(difference.removed),
        unchanged=len(clips) - len(fresh),
        missing_files=sum(size is None for size in clips.source_bytes),
        new_shards=settings.num_shards,
        shards=first_shard + settings.num_shards,
        written=write and not dry_run,
    )
    if not report.written:
        return existing, report
    file = _write(storage, settings, clips, fresh, difference.removed)
    return Plan([*(existing.files if existing else ()), file]), report


@dataclass(frozen=True)
class _Difference:
    new: list[int]
    """Positions in the clip list."""
    changed: list[int]
    removed: list[str]
    """Keys."""


def _compare(existing: Plan | None, clips: ClipList) -> _Difference:
    if existing is None:
        return _Difference(list(range(len(clips))), [], [])
    planned = _newest_contents(existing)
    new: list[int] = []
    changed: list[int] = []
    for position, key in enumerate(clips.keys):
        content = (
            clips.sources[position],
            clips.captions[position],
            clips.source_bytes[position],
            clips.source_offsets[position],
            clips.starts_s[position],
            clips.ends_s[position],
        )
        if key not in planned:
            new.append(position)
        elif planned[key] != content:
            changed.append(position)
    present = set(clips.keys)
    return _Difference(new, changed, sorted(key for key in planned if key not in present))


def _newest_contents(plan: Plan) -> dict[str, tuple[Any, ...]]:
    contents: dict[str, tuple[Any, ...]] = {}
    names = ("key", "removed", "source", "caption", "source_bytes", "source_offset", "start_s", "end_s")
    for file in plan.files:
        for key, removed, *content in zip(*(file.table[name].to_pylist() for name in names), strict=True):
            if removed:
                contents.pop(key, None)
            else:
                contents[key] = tuple(content)
    return contents


def _check_request(storage: Storage, request: PlanRequest, previous: PlanSettings) -> None:
    """Raise CacheError where the request asks for another geometry than the plan has."""
    wanted: dict[str, tuple[object, object]] = {}
    if request.preset is not None and not request.buckets:
        wanted["buckets"] = (previous.buckets, tuple(str(b) for b in find_preset(request.preset).geometry.buckets))
        if request.fps is None:
            wanted["fps"] = (previous.fps, find_preset(request.preset).geometry.fps)
    if request.buckets:
        wanted["buckets"] = (previous.buckets, tuple(str(bucket) for bucket in request.buckets))
    for name, value in (("fps", request.fps), ("shard_size", request.shard_size), ("seed", request.seed)):
        if value is not None:
            wanted[name] = (getattr(previous, name), value)
    contradictions = [f"{name}: {old} → {new}" for name, (old, new) in wanted.items() if old != new]
    if contradictions:
        raise CacheError(
            f"{storage.root}: its plan has other settings ({'; '.join(contradictions)}); leave these options out to go "
            f"on with the plan, or use another --cache for the new ones"
        )


def _check_removals(storage: Storage, existing: Plan, removed: list[str]) -> None:
    planned = len(existing.newest_rows())
    if len(removed) > planned * _REMOVAL_LIMIT:
        raise InputError(
            f"{storage.root}: {len(removed)} of its {planned} planned clips are not in this list (for instance "
            f"{removed[0]!r}), which looks like the list of another data set; "
            f"if they are really to be left out, say --accept-removals"
        )


def _write(storage: Storage, settings: PlanSettings, clips: ClipList, fresh: list[int], removed: list[str]) -> PlanFile:
    # A hash of the key, not a random generator: the shard of a clip does not depend on the order of the
    # list, nor on the version of a library.
    order = sorted(
        fresh, key=lambda i: (xxhash.xxh3_64_intdigest(clips.keys[i].encode(), settings.seed), clips.keys[i])
    )
    count, gone = len(order), len(removed)
    columns: dict[str, list[Any]] = {
        "key": [clips.keys[i] for i in order] + removed,
        "shard": [settings.first_shard + n // settings.shard_size for n in range(count)] + [-1] * gone,
        "row": [n % settings.shard_size for n in range(count)] + [-1] * gone,
        "source": [clips.sources[i] for i in order] + [""] * gone,
        "caption": [clips.captions[i] for i in order] + [""] * gone,
        "source_bytes": [clips.source_bytes[i] for i in order] + [None] * gone,
        "source_offset": [clips.source_offsets[i] for i in order] + [None] * gone,
        "bucket": [None] * (count + gone),
        "start_s": [clips.starts_s[i] for i in order] + [None] * gone,
        "end_s": [clips.ends_s[i] for i in order] + [None] * gone,
        "removed": [False] * count + [True] * gone,
    }
    extra = {
        (f"user_{name}" if name in OWN_COLUMNS.names else name): _extra_array(values, order, gone)
        for name, values in clips.extra.items()
    }
    data = write_plan(settings, columns, pa.table(extra) if extra else None)
    name = plan_name(settings.index)
    if not storage.create(name, data) and storage.read(name) != data:
        raise CacheError(f"{storage.root}/{name}: another process has just planned something else; run it again")
    return read_plan_file(data, f"{storage.root}/{name}")


def _extra_array(values: list[Any], order: list[int], gone: int) -> pa.Array:
    chosen = [values[i] for i in order] + [None] * gone
    with contextlib.suppress(pa.ArrowException, OverflowError, UnicodeEncodeError):
        array = pa.array(chosen)
        if _fits_parquet(array.type):
            return array
    # mixed types, integers of more than 64 bits, lone surrogates, empty objects: kept as JSON text
    return pa.array([None if value is None else _as_json(value) for value in chosen])


def _fits_parquet(kind: pa.DataType) -> bool:
    """Whether Parquet can hold it: no object without a field."""
    children = [kind.field(index).type for index in range(kind.num_fields)]
    return not (pa.types.is_struct(kind) and not children) and all(_fits_parquet(child) for child in children)


def _as_json(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if text.isascii() or text_problem(text) is None else json.dumps(value, default=str)
