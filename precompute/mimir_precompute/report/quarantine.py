"""Clips that were left out, by reason, with a picture of each where its file still gives one."""

from collections.abc import Iterable
from dataclasses import dataclass

from mimir_precompute.clips.rejection import UNTRIED_STAGES, ClipRejected
from mimir_precompute.quarantine import QuarantinedClip, feature_ledger
from mimir_precompute.report.scan import spread_evenly
from mimir_precompute.report.sources import SourceFrames
from mimir_shared.errors import MachineError
from mimir_shared.feature_folder import FeatureFolder
from mimir_shared.page.pictures import Still, still_picture
from mimir_shared.plan_file import Plan

EXAMPLES = 6
"""Clips that are shown of each reason."""
_LONGEST_SIDE = 256
_DANGEROUS: frozenset[str] = frozenset(("crashed_decoder", "timeout", "out_of_memory"))
"""Reasons of clips that are not tried again to make a page: a sandbox bears them, but each costs a minute."""


@dataclass(frozen=True, kw_only=True)
class QuarantineExample:
    quarantined: QuarantinedClip
    picture: Still | None
    note: str = ""
    """Why there is no picture."""


@dataclass(frozen=True, kw_only=True)
class QuarantineReason:
    feature: str
    stage: str
    reason: str
    count: int
    examples: tuple[QuarantineExample, ...]


def read_quarantine(plan: Plan, folders: Iterable[FeatureFolder]) -> list[QuarantinedClip]:
    """What was tried and failed; a clip that failed in the feature before is told there alone."""
    lines = (line for folder in folders for line in feature_ledger(plan, folder))
    return [line for line in lines if line.stage not in UNTRIED_STAGES]


def quarantine_reasons(
    plan: Plan, quarantined: Iterable[QuarantinedClip], sources: SourceFrames
) -> list[QuarantineReason]:
    """Groups by feature, stage and reason, the largest first."""
    groups: dict[tuple[str, str, str], list[QuarantinedClip]] = {}
    for one in quarantined:
        groups.setdefault((one.feature, one.stage, one.reason), []).append(one)
    return [
        QuarantineReason(
            feature=feature,
            stage=stage,
            reason=reason,
            count=len(clips),
            examples=tuple(_show(one, plan, sources) for one in spread_evenly(clips, EXAMPLES)),
        )
        for (feature, stage, reason), clips in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    ]


def _show(one: QuarantinedClip, plan: Plan, sources: SourceFrames) -> QuarantineExample:
    clip = plan.shard_clips(one.shard)[one.row]
    if one.reason in _DANGEROUS:
        return QuarantineExample(quarantined=one, picture=None, note="not tried again: its decoder failed")
    try:
        frame = sources.read_still(clip, _LONGEST_SIDE)
    except ClipRejected as rejected:
        return QuarantineExample(quarantined=one, picture=None, note=rejected.reason.replace("_", " "))
    except MachineError as fault:
        return QuarantineExample(quarantined=one, picture=None, note=str(fault))
    return QuarantineExample(quarantined=one, picture=still_picture(frame, longest_side=_LONGEST_SIDE))
