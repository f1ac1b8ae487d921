"""The quarantine ledger: which clips could not be used, where and why, and how often they were tried.

The commit records are the ledger; what is made of them here can be thrown away and made again.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from mimir_precompute.clips.rejection import UNTRIED_STAGES
from mimir_shared.errors import MachineError, TooManyQuarantinedError
from mimir_shared.feature_folder import FeatureFolder, find_features
from mimir_shared.manifest import SampleRecord
from mimir_shared.plan_file import Plan, read_plan
from mimir_shared.storage.protocol import Storage

MASS_LOSS_CLIPS: Final = 8
MASS_LOSS_SHARE: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class QuarantinedClip:
    """One line of the ledger: a clip that one feature could not use, by the newest generation of its shard."""

    feature: str
    fingerprint: str
    """First 12 digits, as the folder has them."""
    key: str
    stage: str
    reason: str
    detail: str
    attempt: int | None
    """How many times it was tried; None where it follows from `answers`, whose line has the count."""
    shard: int
    row: int
    generation: int
    source: str
    """As planned."""


LEDGER_SCHEMA = pa.schema(
    [
        pa.field("feature", pa.string(), nullable=False),
        pa.field("fingerprint", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("attempt", pa.int32()),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("generation", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)


def read_ledger(storage: Storage) -> list[QuarantinedClip]:
    """Every quarantined clip of every feature, in shard order; rows that a later plan replaced are no clips any more.

    Raises: InputError where there is no plan, CacheError where a record is damaged.
    """
    plan = read_plan(storage)
    return [line for folder in find_features(storage) for line in feature_ledger(plan, folder)]


def feature_ledger(
    plan: Plan, folder: FeatureFolder, shards: Collection[int] | None = None
) -> Iterator[QuarantinedClip]:
    """The lines of one feature; of the committed ones of `shards` alone, where they are given."""
    for shard, generation in sorted(folder.generations().items()):
        if shards is not None and shard not in shards:
            continue
        metadata, _ = folder.read_record_metadata(shard, generation)
        if not metadata.quarantined or shard >= plan.num_shards:
            continue
        record = folder.read_record(shard, generation)
        for clip, sample in zip(plan.shard_clips(shard), record.samples, strict=True):
            if sample.status == "quarantined" and not plan.is_superseded(clip):
                yield QuarantinedClip(
                    feature=folder.feature,
                    fingerprint=folder.fingerprint[:12],
                    key=sample.key,
                    stage=sample.stage or "",
                    reason=sample.reason or "",
                    detail=sample.detail or "",
                    attempt=sample.attempt,
                    shard=shard,
                    row=sample.row,
                    generation=generation,
                    source=clip.source,
                )


def unusable_clips(
    plan: Plan, folders: Iterable[FeatureFolder], shards: Collection[int] | None = None
) -> dict[str, str]:
    """key → "stage: reason" of the clips that some of these features could not use; of all shards, or of some."""
    found: dict[str, str] = {}
    for folder in folders:
        for line in feature_ledger(plan, folder, shards):
            found.setdefault(line.key, f"{line.stage}: {line.reason}")
    return found


def is_within_share(plan: Plan, shards: Iterable[int], unusable: Collection[str], max_quarantined: float) -> bool:
    """Whether no larger share of the clips planned in some shards is unusable than allowed."""
    return len(unusable) <= sum(plan.num_current_clips(shard) for shard in shards) * max_quarantined


def refuse_large_share(
    where: object, plan: Plan, shards: Collection[int], unusable: Mapping[str, str], max_quarantined: float
) -> None:
    """Stop before a snapshot is written that leaves out too many clips.

    Args:
        where: the cache.
        unusable: as unusable_clips gives it for these shards.
    Raises: TooManyQuarantinedError where their share is above `max_quarantined`.
    """
    if is_within_share(plan, shards, unusable, max_quarantined):
        return
    clips = sum(plan.num_current_clips(shard) for shard in shards)
    shown = ", ".join(f"{key} ({why})" for key, why in sorted(unusable.items())[:5])
    raise TooManyQuarantinedError(
        f"{where}: {len(unusable)} of {clips} clips are quarantined, more than --max-quarantined {max_quarantined:g} "
        f"allows: {shown}{', …' if len(unusable) > 5 else ''}; what is good is committed, but no snapshot was "
        f"written. Mend the clips and run `mimir-precompute retry {where}` with the same models, or accept the loss "
        f"with a larger --max-quarantined"
    )


def ledger_parquet(lines: Sequence[QuarantinedClip]) -> bytes:
    """The ledger as one Parquet file, with LEDGER_SCHEMA; a file without rows where nothing is quarantined."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([asdict(line) for line in lines], schema=LEDGER_SCHEMA), sink)
    return bytes(sink.getvalue())


def refuse_mass_loss(where: str, samples: Sequence[SampleRecord], lost_before: Collection[int] = ()) -> None:
    """Stop before a shard is committed that has lost so many clips that something else than the clips must be wrong.

    Args:
        where: the shard, for the message.
        samples: its rows as they would be committed.
        lost_before: rows that were quarantined in the generation before: no news.
    Raises: MachineError for half of the shard's clips or more, if they are at least eight. Rows that a later plan
        replaced are no clips, and what failed in `answers` is not lost by `llm`.
    """
    clips = [sample for sample in samples if sample.stage not in UNTRIED_STAGES]
    lost = [sample for sample in clips if sample.status == "quarantined" and sample.row not in lost_before]
    if len(lost) < MASS_LOSS_CLIPS or len(lost) < MASS_LOSS_SHARE * len(clips):
        return
    counts = Counter((sample.stage, sample.reason) for sample in lost)
    (stage, reason), count = counts.most_common(1)[0]
    example = next(sample for sample in lost if (sample.stage, sample.reason) == (stage, reason))
    raise MachineError(
        f"{where}: {len(lost)} of {len(clips)} clips cannot be used, {count} of them for {stage}: {reason} "
        f"(for instance {example.key!r}: {example.detail}); that looks like a broken mount or model, not like bad "
        f"clips, so the shard is not committed: mend it and run the same command again, or take the loss with "
        f"--accept-quarantine"
    )
