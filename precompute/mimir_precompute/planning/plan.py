"""Which clips there are, and in which shard and row each will stand: compared with the plan that exists."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mimir_precompute.clips.columns import LISTED, ClipList
from mimir_precompute.config import Bucket, Geometry
from mimir_precompute.planning.difference import Difference, PlannedContents
from mimir_precompute.planning.hash_order import HashOrder
from mimir_precompute.presets import find_preset
from mimir_shared.errors import CacheError, InputError
from mimir_shared.layout import plan_name
from mimir_shared.plan_file import Plan, PlanFile, PlanSettings, PlanWriter, read_plan_file
from mimir_shared.storage.protocol import Storage

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
    geometry = geometry_of(previous) if previous else request.geometry()
    settings = PlanSettings(
        index=len(existing.files) if existing else 0,
        previous=existing.files[-1].seal if existing else None,
        preset=previous.preset if previous else request.preset,
        buckets=tuple(str(bucket) for bucket in geometry.buckets),
        fps=geometry.fps,
        shard_size=previous.shard_size if previous else (request.shard_size or DEFAULT_SHARD_SIZE),
        seed=previous.seed if previous else (request.seed or 0),
        source_root=str(clips.root),
        first_shard=existing.num_shards if existing else 0,
        num_shards=0,
    )
    order = HashOrder(clips, settings.seed, at_least=max((f.num_rows for f in existing.files), default=0)
                      if existing else 0)  # fmt: skip
    writer = None if dry_run else PlanWriter(pa.schema(list(order.schema)[len(LISTED) :]))
    difference = Difference()
    planned = PlannedContents(existing, order.bounds) if existing else None
    for part, listed in enumerate(order):
        fresh = planned.compare(part, listed, difference) if planned else listed
        if planned is None:
            difference.new += listed.num_rows
        if writer is not None and fresh.num_rows:
            writer.add(_planned_rows(fresh, settings, difference.num_fresh - fresh.num_rows))
    if existing is not None and not request.accept_removals:
        _check_removals(storage, existing, difference.removed)
    settings = settings.model_copy(update={"num_shards": -(-difference.num_fresh // settings.shard_size)})
    moved = previous is not None and previous.source_root != settings.source_root
    write = existing is None or bool(difference.num_fresh) or bool(difference.removed) or moved
    report = PlanReport(
        clips=len(clips),
        new=difference.new,
        changed=difference.changed,
        removed=len(difference.removed),
        unchanged=len(clips) - difference.num_fresh,
        missing_files=clips.num_missing,
        new_shards=settings.num_shards,
        shards=settings.first_shard + settings.num_shards,
        written=write and not dry_run,
    )
    if writer is None or not report.written:
        return existing, report
    writer.add(_tombstones(sorted(difference.removed)))
    file = _publish(storage, settings, writer)
    return Plan([*(existing.files if existing else ()), file]), report


def _planned_rows(clips: pa.Table, settings: PlanSettings, number: int) -> pa.Table:
    """Rows of a plan, from clips of which the first has this number among those of the plan file."""
    numbers = np.arange(number, number + clips.num_rows)
    for name, values in (
        ("shard", settings.first_shard + numbers // settings.shard_size),
        ("row", numbers % settings.shard_size),
    ):
        clips = clips.append_column(name, pa.array(values.astype(np.int32)))
    return clips.append_column("removed", pa.array(np.zeros(clips.num_rows, bool)))


def _tombstones(keys: list[str]) -> pa.Table:
    nowhere, nothing = np.full(len(keys), -1, np.int32), pa.array([""] * len(keys), pa.string())
    return pa.table(
        {
            "key": pa.array(keys, pa.string()),
            "shard": nowhere,
            "row": nowhere,
            "source": nothing,
            "caption": nothing,
            "removed": np.ones(len(keys), bool),
        }
    )


def _publish(storage: Storage, settings: PlanSettings, writer: PlanWriter) -> PlanFile:
    data = writer.finish(settings)
    name = plan_name(settings.index)
    if not storage.create(name, data) and storage.read(name) != data:
        raise CacheError(f"{storage.root}/{name}: another process has just planned something else; run it again")
    return read_plan_file(pa.py_buffer(data), f"{storage.root}/{name}")


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
    planned = existing.num_current
    if len(removed) > planned * _REMOVAL_LIMIT:
        raise InputError(
            f"{storage.root}: {len(removed)} of its {planned} planned clips are not in this list (for instance "
            f"{min(removed)!r}), which looks like the list of another data set; "
            f"if they are really to be left out, say --accept-removals"
        )
