"""MAIN PATH of stage one: `encode_cache` → `encode_feature` → `encode_shards`.

The unit of work and of commit is one shard of one feature. A shard whose commit record exists is never
made again; everything else may be killed at any moment and started again by the same command.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal, Protocol

from mimir_precompute.commit import commit_shard
from mimir_precompute.completion import write_snapshot_if_complete
from mimir_precompute.data_format import choose_format, refuse_other_format
from mimir_precompute.decoding.clip_pixels import ClipDecoder, DecodeInProcess
from mimir_precompute.drift import refuse_other_identity
from mimir_precompute.empty_prompt import lacks_empty_prompt, publish_empty, require_answers
from mimir_precompute.encoders.base import Encoder, JsonValue, Pending, start_encoding
from mimir_precompute.overlap import Channel, Crew
from mimir_precompute.planning.plan import geometry_of
from mimir_precompute.prepare import (
    Claims,
    ClipPreparer,
    Copied,
    Prepared,
    Ready,
    Rejected,
    Sent,
    Untried,
    in_batches,
    prepare_shards,
)
from mimir_precompute.provenance import RunLog
from mimir_precompute.quarantine import refuse_large_share, refuse_mass_loss, unusable_clips
from mimir_precompute.remake import Remake, Remaking
from mimir_precompute.shard_writer import ShardWriter
from mimir_precompute.workers.lease import Leases, ShardClaims
from mimir_precompute.workers.progress import Progress
from mimir_precompute.workers.seen_lease import HEARTBEAT_S
from mimir_precompute.workers.together import SharedWork, work_left
from mimir_shared.device_faults import device_faults
from mimir_shared.feature_folder import FeatureFolder, FeatureSpec
from mimir_shared.features import DEPENDENCIES, FEATURES, FeatureName
from mimir_shared.fingerprint import fingerprint
from mimir_shared.formats.open_format import open_shard_format
from mimir_shared.layout import spec_name
from mimir_shared.manifest import CacheFormat
from mimir_shared.plan_file import Plan
from mimir_shared.snapshot import Snapshot
from mimir_shared.storage.folder import machine_faults
from mimir_shared.storage.protocol import Storage

_CLIPS_TO_WRITE = 16
"""Encoded clips of a shard that may wait to be written, some 75 MB: seconds of work for the accelerator while the shard
before is synced to disk and committed."""


class EncoderSource(Protocol):
    """Where encoders come from. Identities are asked for before any model is loaded."""

    def identity(
        self, feature: FeatureName, dependencies: Mapping[FeatureName, Mapping[str, JsonValue]]
    ) -> dict[str, JsonValue]:
        """Everything that changes a byte of the feature, given the identities of the features that it builds on."""
        ...

    def batch_size(self, feature: FeatureName) -> int: ...

    def build(self, feature: FeatureName) -> Encoder:
        """Load the model."""
        ...


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """What one call of `encode` is to do."""

    storage: Storage
    plan: Plan
    encoders: EncoderSource
    shards: tuple[int, ...]
    features: tuple[FeatureName, ...] = FEATURES
    on_mismatch: Literal["error", "new"] = "error"
    data_format: CacheFormat | None = None
    """None: the format that the cache has."""
    max_quarantined: float = 0.01
    """Share of the clips in `shards` above which the call fails, after all is committed."""
    accept_quarantine: bool = False
    """Commit shards even if half of their clips are lost."""
    remaking: Remaking | None = None
    """What to make again of shards that are committed; then nothing else is made."""
    decode_workers: int = 2
    decoder: ClipDecoder = field(default_factory=DecodeInProcess)
    """How clips are decoded: by the command in a sandbox. Whoever made it closes it; a job that fails does, too."""
    heartbeat_s: float = HEARTBEAT_S
    """How often this worker tells the others that it lives."""
    others_make: frozenset[FeatureName] = frozenset()
    """Features that other workers of the same run see to: what is made from them waits for them."""
    begin_with: frozenset[int] = frozenset()
    """Shards that this worker makes before others."""
    poll_s: float | None = None
    """How often it looks, at most, while others have all that is left; None: as the storage has it."""


@dataclass(kw_only=True)
class FeatureOutcome:
    """What became of one feature in one call."""

    feature: FeatureName
    shards_done_before: int = 0
    shards_made: int = 0
    encoded: int = 0
    copied: int = 0
    quarantined: int = 0
    nbytes: int = 0


@dataclass(kw_only=True)
class EncodeOutcome:
    features: list[FeatureOutcome] = field(default_factory=list)
    snapshot: Snapshot | None = None
    """Of the whole cache; None while shards are missing."""
    quarantined: dict[str, str] = field(default_factory=dict)
    """key → "stage: reason", for every clip in the job's shards that is not ok in every feature."""
    others_conclude: bool = False
    """All is done, and another worker is about to judge it and write the snapshot."""

    @property
    def nothing_to_do(self) -> bool:
        return all(feature.shards_made == 0 for feature in self.features)


@dataclass(frozen=True, kw_only=True)
class FeatureWork:
    """What the stages of one feature share."""

    job: EncodeJob
    spec: FeatureSpec
    folder: FeatureFolder
    preparer: ClipPreparer
    remakes: Mapping[int, Remake]
    claims: Claims
    encoder: Encoder
    outcome: FeatureOutcome
    """Filled in by the stage that writes."""
    progress: Progress
    log: RunLog


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """Rows on their way from the encoder to the shard, in order."""

    rows: tuple[Sent | Copied | Rejected | Untried, ...]
    pending: Pending
    """The features of the rows that were sent to the encoder."""


def encode_cache(job: EncodeJob, progress: Progress, log: RunLog) -> EncodeOutcome:
    """Make every feature of the job in its shards, and a snapshot when the cache is complete.

    Raises: CacheError where a feature was made otherwise than now asked for; TooManyQuarantinedError after
        all work is done; MachineError for faults of the disk.
    """
    specs = open_features(job)
    outcome = EncodeOutcome(features=encode_features(job, specs, progress, log))
    conclude(job, specs, outcome)
    return outcome


def encode_features(
    job: EncodeJob, specs: Mapping[FeatureName, FeatureSpec], progress: Progress, log: RunLog
) -> list[FeatureOutcome]:
    """Make one feature after the other: the work of one worker, be it alone or one of many."""
    of_device = device_faults(f"{job.storage.root}: encoding", for_want_of_memory="let no other program use it")
    with of_device, Leases(job.storage.lease_store(), heartbeat_s=job.heartbeat_s) as leases:
        leases.remove_abandoned()
        if job.remaking is None:
            progress.expect(missing_clips(job, specs))
        return [encode_feature(job, specs, feature, leases, progress, log) for feature in job.features]


def conclude(job: EncodeJob, specs: Mapping[FeatureName, FeatureSpec], outcome: EncodeOutcome) -> None:
    """Judge what was lost in the job's shards, and write the snapshot of a cache that is complete."""
    folders = {feature: FeatureFolder(job.storage, feature, specs[feature].fingerprint) for feature in job.features}
    outcome.quarantined = unusable_clips(job.plan, folders.values(), frozenset(job.shards))
    refuse_large_share(job.storage.root, job.plan, job.shards, outcome.quarantined, job.max_quarantined)
    outcome.snapshot = write_snapshot_if_complete(job.storage, job.plan, folders)


def open_features(job: EncodeJob) -> dict[FeatureName, FeatureSpec]:
    """Compare what is asked for with what the cache holds, before any model loads; then write new specs.

    What killed workers left half written is removed first.
    """
    job.storage.remove_abandoned()
    job.storage.settle("plan")
    specs: dict[FeatureName, FeatureSpec] = {}
    for feature, identity in asked_identities(job.encoders, job.features).items():
        digest = fingerprint(identity)
        data_format = choose_format(job.storage, feature, digest, job.data_format)
        spec = FeatureSpec(feature=feature, fingerprint=digest, format=data_format, identity=identity)
        if job.on_mismatch == "error":
            refuse_other_identity(job.storage, spec)
        specs[feature] = spec
    for feature in job.features:
        spec = specs[feature]
        name = spec_name(feature, spec.fingerprint)
        if not job.storage.exists_durably(name):
            job.storage.create(name, spec.model_dump_json(indent=1).encode() + b"\n")
        # as another worker may have written it first
        specs[feature] = FeatureFolder(job.storage, feature, spec.fingerprint).read_spec()
        refuse_other_format(job.storage, specs[feature], job.data_format)
    return specs


def asked_identities(
    encoders: EncoderSource, features: Collection[FeatureName]
) -> dict[FeatureName, dict[str, JsonValue]]:
    """What would make some features, and those that they build on."""
    identities: dict[FeatureName, dict[str, JsonValue]] = {}
    for feature in FEATURES:
        if feature in features or any(feature in DEPENDENCIES[wanted] for wanted in features):
            identities[feature] = encoders.identity(feature, {name: identities[name] for name in DEPENDENCIES[feature]})
    return identities


def missing_clips(job: EncodeJob, specs: Mapping[FeatureName, FeatureSpec]) -> dict[FeatureName, int]:
    """How many clips of the job's shards each of its features lacks."""
    folders = [FeatureFolder(job.storage, feature, specs[feature].fingerprint) for feature in job.features]
    return {folder.feature: sum(work_left(folder, job.plan, job.shards).clips_of_shard.values()) for folder in folders}


def encode_feature(
    job: EncodeJob,
    specs: Mapping[FeatureName, FeatureSpec],
    feature: FeatureName,
    leases: Leases,
    progress: Progress,
    log: RunLog,
) -> FeatureOutcome:
    """Make one feature in the job's shards; loads its model only if there is something to make."""
    spec = specs[feature]
    folder = FeatureFolder(job.storage, feature, spec.fingerprint)
    answers = None
    if "answers" in DEPENDENCIES[feature]:
        answers = FeatureFolder(job.storage, "answers", specs["answers"].fingerprint)
    remakes = {} if job.remaking is None else job.remaking.shards(folder, answers)
    done = folder.generations()
    todo = [shard for shard in job.shards if (shard not in done if job.remaking is None else shard in remakes)]
    outcome = FeatureOutcome(feature=feature, shards_done_before=len(job.shards) - len(todo))
    if not todo and not lacks_empty_prompt(folder, done):
        return outcome
    if answers is not None:
        require_answers(answers, wait="answers" in job.others_make)
    preparer = ClipPreparer(job.plan, geometry_of(job.plan.settings), folder, answers, job.decoder, remakes)
    sizes = {shard: job.plan.file_of(shard).num_clips(shard) for shard in todo}
    generations = {shard: remake.generation for shard, remake in remakes.items()}
    claims = ShardClaims(
        folder,
        todo,
        leases,
        generations=generations,
        needs=[] if answers is None else [answers],
        needs_will_come="answers" in job.others_make,
        begin_with=job.begin_with,
        poll_s=job.poll_s,
        say=progress.say,
    )
    shared = SharedWork(storage=job.storage, folder=folder, clips_of_shard=sizes, generations=generations)
    in_view = progress.feature(feature, shards=len(todo), clips=sum(sizes.values()), shared=shared)
    with in_view, closing(job.encoders.build(feature)) as encoder:
        changed = log.feature_started(feature, spec.fingerprint)
        if changed is not None:
            progress.warn(changed)
        publish_empty(folder, encoder, answers)
        encode_shards(
            FeatureWork(
                job=job,
                spec=spec,
                folder=folder,
                preparer=preparer,
                remakes=remakes,
                claims=claims,
                encoder=encoder,
                outcome=outcome,
                progress=progress,
                log=log,
            )
        )
        if (told := log.encoder_finished(feature, encoder)) is not None and outcome.encoded:
            progress.say(told)
    return outcome


def encode_shards(work: FeatureWork) -> None:
    """Prepare, encode, write and commit shard after shard; the three go on at once, each in order.

    Threads prepare rows ahead of this one, which feeds the encoder across the borders of shards; one thread behind it
    writes. The first failure of any ends all, and what is not committed then was never there.
    """
    batch_size = work.job.encoders.batch_size(work.folder.feature)
    with closing(work.claims), Crew() as crew:
        encoded_shards: Channel[tuple[int, Channel[EncodedBatch]]] = crew.channel(1)
        spent: Channel[list[Prepared]] = crew.channel(1)
        crew.start("write", lambda: write_shards(work, encoded_shards))
        crew.start("let go", lambda: let_go(spent))
        for shard, rows in prepare_shards(crew, work.preparer, work.claims, work.job.decode_workers):
            batches: Channel[EncodedBatch] = crew.channel(max(2, _CLIPS_TO_WRITE // batch_size))
            encoded_shards.put((shard, batches))
            with machine_faults(f"{work.job.storage.root}: encoding shard {shard} of {work.folder.feature}"):
                for batch in in_batches(rows, batch_size):
                    batches.put(encode_batch(work.encoder, batch))
                    spent.put(batch)
            batches.close()
        encoded_shards.close()
        spent.close()


def encode_batch(encoder: Encoder, batch: Sequence[Prepared]) -> EncodedBatch:
    """Encode the clips of a batch at once; what goes on to be written has no pixels."""
    ready = [row.item for row in batch if isinstance(row, Ready)]
    pending = start_encoding(encoder, ready)
    rows = tuple(row.without_input() if isinstance(row, Ready) else row for row in batch)
    return EncodedBatch(rows=rows, pending=pending)


def let_go(spent: Iterable[list[Prepared]]) -> None:
    """Give the pixels of encoded batches back to the system: 10 ms a clip, for which the encoder must not wait."""
    for batch in spent:
        batch.clear()


def write_shards(work: FeatureWork, encoded_shards: Iterable[tuple[int, Iterable[EncodedBatch]]]) -> None:
    """Write and commit shards as they are encoded: the work of the writing thread."""
    for shard, batches in encoded_shards:
        write_shard(work, shard, batches)
        work.claims.finished(shard)


def write_shard(work: FeatureWork, shard: int, batches: Iterable[EncodedBatch]) -> None:
    """Write and commit one shard; nothing of it is visible before the commit."""
    job, folder, outcome, progress = work.job, work.folder, work.outcome, work.progress
    where = f"{job.storage.root}: writing shard {shard} of {folder.feature}"
    data_format = work.spec.format
    with (
        machine_faults(where),
        work.log.shard(folder.feature, shard) as entry,
        open_shard_format(job.storage, data_format, shard) as shard_format,
    ):
        progress.shard_begun(shard)
        remake = work.remakes.get(shard)
        tries_before = {} if remake is None else remake.tries_before
        writer = ShardWriter(shard_format, tries_before)
        for batch in batches:
            write_batch(work.spec, batch, writer, outcome)
            progress.advance(len(batch.rows), quarantined=writer.num_quarantined)
        finished = writer.finish()
        if not job.accept_quarantine:
            refuse_mass_loss(where, finished.samples, lost_before=tries_before)
        result = commit_shard(
            folder,
            finished,
            data_format=data_format,
            shard=shard,
            fingerprint=work.spec.fingerprint,
            plan_seal=job.plan.file_of(shard).seal,
            generation=0 if remake is None else remake.generation,
        )
        if result == "other":
            progress.warn(
                f"{folder.feature} shard {shard}: another worker committed other bytes first, which stay; "
                f"the encoders do not repeat themselves between the two (see logs/ for devices and versions)"
            )
        entry.finished(result, finished)
        outcome.shards_made += 1
        outcome.nbytes += finished.nbytes
        outcome.quarantined += writer.num_quarantined
        progress.shard_done(shard, nbytes=finished.nbytes, quarantined=writer.num_quarantined)


def write_batch(spec: FeatureSpec, batch: EncodedBatch, writer: ShardWriter, outcome: FeatureOutcome) -> None:
    """Check and write all rows of a batch in order, once the device has finished it."""
    encoded = iter(batch.pending.result())
    for row in batch.rows:
        match row:
            case Sent():
                specs = spec.tensor_specs(row.bucket or "")
                writer.add(row.clip, next(encoded), specs, bucket=row.bucket, source_xxh3=row.source_xxh3)
                outcome.encoded += 1
            case Copied():
                bucket, source_xxh3 = row.original.bucket, row.original.source_xxh3
                specs = spec.tensor_specs(bucket or "")
                writer.add(row.clip, row.read(), specs, bucket=bucket, source_xxh3=source_xxh3)
                outcome.copied += 1
            case Rejected():
                writer.add_quarantined(row.clip, row.rejection, bucket=row.bucket, source_xxh3=row.source_xxh3)
            case Untried():
                writer.add_untried(row.original)
