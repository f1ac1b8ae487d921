"""From the options of the commands that make shards again, checked, to one call of the work."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from mimir_precompute.cli.messages import describe_verification
from mimir_precompute.config import DecodeLimits, ModelOptions
from mimir_precompute.decoding.clip_pixels import ClipDecoder
from mimir_precompute.device import choose_device
from mimir_precompute.inspection.verify import VerifyReport, verify_cache
from mimir_precompute.open_encoders import open_encoders
from mimir_precompute.pipeline import EncodeJob
from mimir_precompute.provenance import RunLog
from mimir_precompute.remake import Remaking
from mimir_precompute.repair import RepairOutcome, repair_cache
from mimir_precompute.retry import JobMaker, RetryChoice, RetryOutcome, retry_clips
from mimir_precompute.termination import working_on
from mimir_precompute.workers.progress import Progress
from mimir_shared.features import FeatureName
from mimir_shared.plan_file import Plan, read_plan
from mimir_shared.storage.open import open_storage
from mimir_shared.storage.protocol import Storage


@dataclass(frozen=True, kw_only=True)
class RemakeRequest:
    """The options that `retry` and `verify --repair` share, as typed."""

    cache: str
    models: ModelOptions
    decode_workers: int
    decode_limits: DecodeLimits
    max_quarantined: float
    accept_quarantine: bool


def run_retry(request: RemakeRequest, choice: RetryChoice) -> RetryOutcome:
    """Try quarantined clips again with the models that were asked for."""
    read_plan(open_storage(request.cache))  # a folder without a plan is no cache: nothing is made there
    with _opened(request) as (storage, make_job, progress, log):
        return retry_clips(storage, choice, make_job, progress, log, max_quarantined=request.max_quarantined)


def run_verify(request: RemakeRequest, *, repair: bool) -> tuple[VerifyReport, RepairOutcome | None]:
    """Verify a cache and, if asked to and there is something, mend it."""
    report = verify_cache(open_storage(request.cache))
    if not repair or report.ok:
        return report, None
    with _opened(request) as (storage, make_job, progress, log):
        progress.say(describe_verification(request.cache, report, repairing=True))
        return report, repair_cache(storage, report, make_job, progress, log)


@contextmanager
def _opened(request: RemakeRequest) -> Iterator[tuple[Storage, JobMaker, Progress, RunLog]]:
    from mimir_precompute.decoding.sandbox import DecodeSandbox

    device = choose_device(request.models.device)
    storage = open_storage(request.cache)
    with working_on(storage):
        storage.check_writable()
        decoder = DecodeSandbox(request.decode_limits)

        def make_job(plan: Plan, features: tuple[FeatureName, ...], remaking: Remaking) -> EncodeJob:
            return remake_job(request, storage, plan, features, remaking, decoder)

        with closing(decoder):
            yield storage, make_job, Progress(), RunLog(storage, device)


def remake_job(
    request: RemakeRequest,
    storage: Storage,
    plan: Plan,
    features: tuple[FeatureName, ...],
    remaking: Remaking,
    decoder: ClipDecoder,
) -> EncodeJob:
    """A job over all shards of some features. Raises InputError for models that are missing."""
    return EncodeJob(
        storage=storage,
        plan=plan,
        encoders=open_encoders(plan, request.models, features),
        shards=tuple(range(plan.num_shards)),
        features=features,
        max_quarantined=request.max_quarantined,
        accept_quarantine=request.accept_quarantine,
        remaking=remaking,
        decode_workers=request.decode_workers,
        decoder=decoder,
    )
