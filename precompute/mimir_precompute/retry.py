"""`retry`: try quarantined clips again, and commit the shards in which they stand as the next generation.

Good samples are copied byte for byte. A clip that fails again has one try more in the new record: it was tried. What
`answers` gives now and did not give before, `llm` is made again from. Killed at any point, the same command goes on:
what is ok by then is not tried again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from mimir_precompute.clips.rejection import UNTRIED_STAGES, RejectionReason, RejectionStage
from mimir_precompute.completion import write_snapshot_if_complete
from mimir_precompute.option_values import parse_features
from mimir_precompute.pipeline import EncodeJob, encode_cache
from mimir_precompute.provenance import RunLog
from mimir_precompute.quarantine import QuarantinedClip, feature_ledger, read_ledger
from mimir_precompute.remake import Remake, Remaking, answers_of, outdated_shards
from mimir_precompute.workers.progress import Progress
from mimir_shared.errors import InputError
from mimir_shared.feature_folder import FeatureFolder, find_features
from mimir_shared.features import FEATURES, FeatureName
from mimir_shared.plan_file import Plan, read_plan
from mimir_shared.snapshot import Snapshot, list_snapshots
from mimir_shared.storage.protocol import Storage


@dataclass(frozen=True, kw_only=True)
class RetryChoice:
    """Which quarantined clips are tried again; an empty set leaves a question open."""

    reasons: frozenset[str] = frozenset()
    stages: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()
    features: tuple[FeatureName, ...] = FEATURES

    def takes(self, line: QuarantinedClip) -> bool:
        """Whether a line of the ledger is chosen; one that follows from `answers` never is, but the answers are."""
        return (
            line.stage not in UNTRIED_STAGES
            and line.feature in self.features
            and (not self.reasons or line.reason in self.reasons)
            and (not self.stages or line.stage in self.stages)
            and (not self.keys or line.key in self.keys)
        )


def parse_choice(reasons: str | None, stages: str | None, keys: list[str], features: str) -> RetryChoice:
    """Read the options of `retry`. Raises InputError for a reason or stage that does not exist."""
    return RetryChoice(
        reasons=_parse_names("--reason", reasons, get_args(RejectionReason), but={"superseded"}),
        stages=_parse_names("--stage", stages, get_args(RejectionStage), but=set(UNTRIED_STAGES)),
        keys=frozenset(keys),
        features=parse_features(features),
    )


def _parse_names(option: str, text: str | None, names: tuple[str, ...], but: set[str]) -> frozenset[str]:
    chosen = frozenset(name.strip() for name in (text or "").split(",") if name.strip())
    known = [name for name in names if name not in but]
    for name in sorted(chosen):
        if name not in known:
            raise InputError(f"{option} {name!r}: expected some of {', '.join(known)}")
    return chosen


class Retrying:
    """The `remaking` of a job that tries quarantined clips again."""

    def __init__(self, plan: Plan, choice: RetryChoice) -> None:
        self._plan = plan
        self._choice = choice
        self.tried: list[QuarantinedClip] = []
        """Lines of the ledger, as they were before, of the clips that are tried again."""

    def shards(self, folder: FeatureFolder, answers: FeatureFolder | None) -> dict[int, Remake]:
        """Shards with a chosen clip, and those of `llm` in which a clip's answers are others than before."""
        rows: dict[int, set[int]] = {}
        for line in feature_ledger(self._plan, folder):
            if self._choice.takes(line):
                rows.setdefault(line.shard, set()).add(line.row)
                self.tried.append(line)
        if answers is not None:
            for shard, outdated in outdated_shards(self._plan, folder, answers):
                rows.setdefault(shard, set()).update(outdated)
        generations = folder.generations()
        return {
            shard: Remake(
                generation=generations[shard] + 1,
                base=folder.read_record(shard, generations[shard]),
                rows=frozenset(chosen),
            )
            for shard, chosen in rows.items()
        }


@dataclass(frozen=True, kw_only=True)
class RetryOutcome:
    """What became of the clips that were tried again."""

    tried: int = 0
    failed_again: tuple[QuarantinedClip, ...] = ()
    """Their lines of the ledger as they are now."""
    snapshot: Snapshot | None = None
    """Of the whole cache; None while shards are missing."""


JobMaker = Callable[[Plan, tuple[FeatureName, ...], Remaking], EncodeJob]
"""A job for all shards and some features, with the models and settings that were asked for."""


def retry_clips(
    storage: Storage,
    choice: RetryChoice,
    make_job: JobMaker,
    progress: Progress,
    log: RunLog,
    *,
    max_quarantined: float = 0.01,
) -> RetryOutcome:
    """Try the chosen clips again, features in dependency order, and snapshot the cache where it is complete.

    Only features with something to try have their models loaded.

    Args:
        max_quarantined: share of unusable clips above which a retry that finds nothing to try writes no snapshot; the
            job has its own for one that does.
    Raises: as encode_cache.
    """
    plan = read_plan(storage)
    features = features_to_retry(storage, plan, choice)
    if not features:
        # what was killed between its last commit and its snapshot has only that left to do
        if not list_snapshots(storage):
            return RetryOutcome()
        return RetryOutcome(snapshot=write_snapshot_if_complete(storage, plan, {}, max_quarantined=max_quarantined))
    remaking = Retrying(plan, choice)
    encoded = encode_cache(make_job(plan, features, remaking), progress, log)
    tried = {(line.feature, line.fingerprint, line.key) for line in remaking.tried}
    failed = (line for line in read_ledger(storage) if (line.feature, line.fingerprint, line.key) in tried)
    return RetryOutcome(tried=len(tried), failed_again=tuple(failed), snapshot=encoded.snapshot)


def features_to_retry(storage: Storage, plan: Plan, choice: RetryChoice) -> tuple[FeatureName, ...]:
    """Features of the cache with something to do, so that no other model need be named or found.

    `llm` is among them with `answers`, for it may follow.
    """
    folders = find_features(storage)
    wanted = {folder.feature for folder in folders if any(map(choice.takes, feature_ledger(plan, folder)))}
    for folder in folders:
        answers = answers_of(folder, folders)
        if answers is not None and ("answers" in wanted or any(outdated_shards(plan, folder, answers))):
            wanted.add(folder.feature)
    return tuple(feature for feature in FEATURES if feature in wanted)
