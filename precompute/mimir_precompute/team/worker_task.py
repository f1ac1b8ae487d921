"""What one worker is told, and the work itself: the same code for this process, one beside it and a Ray actor."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from mimir_precompute.config import DecodeLimits, ModelOptions
from mimir_precompute.decoding.clip_pixels import ClipDecoder
from mimir_precompute.decoding.sandbox import DecodeSandbox
from mimir_precompute.open_encoders import open_encoders
from mimir_precompute.pipeline import EncodeJob, EncoderSource, FeatureOutcome, encode_features, open_features
from mimir_precompute.provenance import RunLog
from mimir_precompute.team.crowd import poll_s
from mimir_precompute.workers.progress import Progress
from mimir_shared.features import FeatureName
from mimir_shared.manifest import CacheFormat
from mimir_shared.plan_file import Plan, read_plan
from mimir_shared.storage.protocol import Storage

EncodersOf = Callable[[Plan, ModelOptions, Sequence[FeatureName]], EncoderSource]
"""open_encoders, or what a test puts in its place."""


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """All that a worker must be told; plain values, for it may be a process on another machine."""

    number: int = 0
    cache: str
    models: ModelOptions
    """With the device, as this worker sees it."""
    features: tuple[FeatureName, ...]
    """In the order in which this worker makes them."""
    others_make: frozenset[FeatureName] = frozenset()
    shards: tuple[int, ...]
    data_format: CacheFormat | None
    on_mismatch: Literal["error", "new"]
    decode_workers: int
    decode_limits: DecodeLimits
    max_quarantined: float
    accept_quarantine: bool
    begin_with: frozenset[int] = frozenset()
    crowd: int = 1
    """Workers that may be at this cache, as far as is known."""


def make_job(
    task: WorkerTask, storage: Storage, plan: Plan, encoders: EncoderSource, decoder: ClipDecoder
) -> EncodeJob:
    """A task together with what it is done with."""
    return EncodeJob(
        storage=storage,
        plan=plan,
        encoders=encoders,
        shards=task.shards,
        features=task.features,
        on_mismatch=task.on_mismatch,
        data_format=task.data_format,
        max_quarantined=task.max_quarantined,
        accept_quarantine=task.accept_quarantine,
        decode_workers=task.decode_workers,
        decoder=decoder,
        others_make=task.others_make,
        begin_with=task.begin_with,
        poll_s=poll_s(task.crowd, storage.lease_store().poll_s),
    )


def run_worker(
    task: WorkerTask, storage: Storage, progress: Progress, device: str, encoders_of: EncodersOf = open_encoders
) -> list[FeatureOutcome]:
    """Make what is left of the task, shard by shard, among other workers.

    Args:
        storage: of the task's cache, the one that is told when the process is to end.
        device: where the models run, for the log.
    Raises: MimirError; what is committed by then stays.
    """
    plan = read_plan(storage)
    with closing(DecodeSandbox(task.decode_limits)) as decoder:
        job = make_job(task, storage, plan, encoders_of(plan, task.models, task.features), decoder)
        return encode_features(job, open_features(job), progress, RunLog(storage, device))
