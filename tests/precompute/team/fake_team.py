"""`encode --workers` as the command does it, with fake encoders in real processes."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mimir_precompute.clips.clip_list import read_clip_list
from mimir_precompute.config import DecodeLimits, TeamOptions
from mimir_precompute.decoding.sandbox import DecodeSandbox
from mimir_precompute.pipeline import EncodeOutcome, encode_cache
from mimir_precompute.planning.plan import PlanRequest, update_plan
from mimir_precompute.provenance import RunLog
from mimir_precompute.team.encode_team import Starter, choose_team, encode_together
from mimir_precompute.team.local_workers import LocalWorker
from mimir_precompute.team.view import TeamView
from mimir_precompute.team.worker_task import WorkerTask, make_job
from mimir_precompute.termination import working_on
from mimir_precompute.workers.progress import Progress
from mimir_shared.features import FEATURES, FeatureName
from mimir_shared.manifest import CacheFormat
from mimir_shared.plan_file import read_plan
from mimir_shared.storage.folder import LocalStorage
from tests.precompute.team.fake_worker import Misfortune, UnluckyEncoders

FAKE_WORKER = ("-m", "tests.precompute.team.fake_worker")
LUCK = Misfortune()


def plan_clips(cache: Path, clips: Path, shard_size: int = 1) -> None:
    request = PlanRequest(preset="tiny", shard_size=shard_size)
    update_plan(LocalStorage(cache), None, read_clip_list(str(clips)), request)


def encode_with(
    cache: Path,
    workers: int,
    *,
    place: Sequence[str] = (),
    features: tuple[FeatureName, ...] = FEATURES,
    data_format: CacheFormat | None = None,
    misfortune: Misfortune = LUCK,
    backoff_s: float = 0.01,
    start: Starter | None = None,
) -> EncodeOutcome:
    """Encode a planned cache by some processes, or in this one where they are one.

    Args:
        start: how a worker is started; None: as a process on this machine.
    """
    storage = LocalStorage(cache)
    plan = read_plan(storage)
    models = misfortune.models()
    team = choose_team(TeamOptions(workers=str(workers), place=tuple(place)), models, features, None)
    task = WorkerTask(
        cache=str(cache),
        models=models,
        features=features,
        shards=tuple(range(plan.num_shards)),
        data_format=data_format,
        on_mismatch="error",
        decode_workers=1,
        decode_limits=DecodeLimits(),
        max_quarantined=0.01,
        accept_quarantine=False,
    )
    with working_on(storage), DecodeSandbox() as decoder:
        job = make_job(task, storage, plan, UnluckyEncoders(misfortune), decoder)
        if workers == 1:
            return encode_cache(job, Progress(quiet=True), RunLog(storage, "cpu"))
        return encode_together(job, task, replace(team, start=start or start_fake_worker), backoff_s=backoff_s)


def start_fake_worker(task: WorkerTask, view: TeamView) -> LocalWorker:
    return LocalWorker(task, name=f"worker {task.number}", environment={}, say=view.say, program=FAKE_WORKER)


def count_records(cache: Path) -> int:
    return len(list(cache.glob("*/*/manifests/*.parquet")))


def wait_for(claim: Any, what: str, within_s: float = 60) -> None:
    """Wait until something is so; how long that takes is the machine's affair."""
    deadline_s = time.monotonic() + within_s
    while not claim():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)
