"""A cache written once more in another format: the same plan, identities, records and samples, by the same commits.

What is converted is committed shard by shard, so that the same command goes on where it was stopped, and takes over
what was encoded, retried or repaired in the source since.
"""

from dataclasses import dataclass, field, replace

from mimir_precompute.commit import commit_shard
from mimir_precompute.shard_writer import FinishedShard
from mimir_precompute.workers.progress import Progress
from mimir_shared.errors import CacheError
from mimir_shared.feature_folder import FeatureFolder, FeatureSpec, find_features
from mimir_shared.formats.open_format import open_shard_format
from mimir_shared.layout import empty_name, spec_name
from mimir_shared.manifest import CacheFormat, CommitRecord, SampleRecord
from mimir_shared.plan_file import Plan, read_plan
from mimir_shared.snapshot import Snapshot, incomplete_shards, write_snapshot
from mimir_shared.storage.folder import machine_faults
from mimir_shared.storage.protocol import Storage


@dataclass(kw_only=True)
class ConvertOutcome:
    shards: int = 0
    """Of all features, converted by this call."""
    shards_done_before: int = 0
    nbytes: int = 0
    """Written by this call."""
    unfinished: dict[str, int] = field(default_factory=dict)
    """feature → shards that the source does not have yet."""
    snapshot: Snapshot | None = None
    """Of the converted cache; None while shards are missing, or where it has a feature more than once."""


def convert_cache(source: Storage, target: Storage, data_format: CacheFormat, progress: Progress) -> ConvertOutcome:
    """Bring `target` up to what `source` has committed, with every shard in one format.

    Raises: InputError where the source has no plan; CacheError where a sample of it is damaged, or where the target
        holds something else; MachineError for faults of the disk.
    """
    plan = read_plan(source)
    _copy_plans(source, target)
    outcome = ConvertOutcome()
    for folder in find_features(source):
        _convert_feature(plan, folder, target, data_format, outcome, progress)
    for name in source.list("logs"):
        # what made the shards is told there; a log that grew since is not worth an error
        target.create(f"logs/{name}", source.read(f"logs/{name}"))
    outcome.snapshot = _snapshot_if_complete(target, plan)
    return outcome


def _copy_plans(source: Storage, target: Storage) -> None:
    names = source.list("plan")
    strange = sorted(set(target.list("plan")) - set(names))
    if strange:
        raise CacheError(
            f"{target.root}/plan/{strange[0]}: {source.root} has no such plan; --out holds another cache: give an "
            f"empty folder"
        )
    for name in names:
        _copy_file(source, target, f"plan/{name}")


def _copy_file(source: Storage, target: Storage, name: str) -> None:
    data = source.read(name)
    if not target.create(name, data) and target.read(name) != data:
        raise CacheError(
            f"{target.root}/{name}: differs from {source.root}/{name}; --out holds another cache: give an empty folder"
        )


def _convert_feature(
    plan: Plan,
    source: FeatureFolder,
    target_storage: Storage,
    data_format: CacheFormat,
    outcome: ConvertOutcome,
    progress: Progress,
) -> None:
    spec = _copy_spec(source, target_storage, data_format)
    target = FeatureFolder(target_storage, source.feature, source.fingerprint)
    empty = empty_name(source.feature, source.fingerprint)
    if source.storage.exists(empty):
        _copy_file(source.storage, target_storage, empty)
    generations, done = source.generations(), target.generations()
    missing = plan.num_shards - len(generations)
    if missing:
        outcome.unfinished[f"{source.feature}/{source.fingerprint[:12]}"] = missing
    num_clips = sum(plan.file_of(shard).num_clips(shard) for shard in generations)
    with progress.feature(source.feature, shards=len(generations), clips=num_clips, verb="convert"):
        for shard, generation in sorted(generations.items()):
            record = source.read_record(shard, generation)
            nbytes = 0
            if shard in done and _same_content(target.read_record(shard, done[shard]), record):
                outcome.shards_done_before += 1
            else:
                finished = _convert_shard(source, target, spec, record, done.get(shard, -1) + 1)
                nbytes = finished.nbytes
                outcome.shards += 1
                outcome.nbytes += nbytes
            progress.advance(len(record.samples), quarantined=record.metadata.quarantined)
            progress.shard_done(shard, nbytes=nbytes, quarantined=record.metadata.quarantined)


def _copy_spec(source: FeatureFolder, target: Storage, data_format: CacheFormat) -> FeatureSpec:
    """The same identity and fingerprint: a format makes no other feature."""
    spec = source.read_spec().model_copy(update={"format": data_format})
    name = spec_name(source.feature, source.fingerprint)
    if target.create(name, spec.model_dump_json(indent=1).encode() + b"\n"):
        return spec
    found = FeatureFolder(target, source.feature, source.fingerprint).read_spec()
    if found != spec:
        raise CacheError(
            f"{target.root}/{name}: the converted `{source.feature}` is begun in format {found.format!r} → "
            f"{data_format!r} now; go on with --format {found.format}, or give an empty folder as --out"
        )
    return spec


def _convert_shard(
    source: FeatureFolder, target: FeatureFolder, spec: FeatureSpec, record: CommitRecord, generation: int
) -> FinishedShard:
    """Write and commit one shard; every sample is checked against its hashes as it is read."""
    shard = record.metadata.shard
    files = source.open_shard(record)
    storage = target.storage
    with (
        machine_faults(f"{storage.root}: writing shard {shard} of {target.feature}"),
        open_shard_format(storage, spec.format, shard) as shard_format,
    ):
        for sample in record.samples:
            if sample.stored is not None:
                tensors, specs = files.read_tensors(sample), spec.tensor_specs(sample.bucket or "")
                shard_format.add(sample.row, files.read_document(sample), tensors, specs, sample.bucket)
        written = shard_format.finish()
        finished = FinishedShard(
            files=written.files,
            samples=tuple(replace(sample, stored=written.stored.get(sample.row)) for sample in record.samples),
            statistics=record.metadata.statistics,
        )
        commit_shard(
            target,
            finished,
            data_format=spec.format,
            shard=shard,
            fingerprint=spec.fingerprint,
            plan_seal=record.metadata.plan,
            generation=generation,
        )
    return finished


def _same_content(first: CommitRecord, second: CommitRecord) -> bool:
    """Whether two records say the same of every clip, whatever the format: hashes are over the samples alone."""

    def content(sample: SampleRecord) -> tuple[SampleRecord, int | None, int | None]:
        stored = sample.stored
        hashes = (stored.xxh3, stored.json_xxh3) if stored is not None else (None, None)
        return replace(sample, stored=None), *hashes

    return [content(sample) for sample in first.samples] == [content(sample) for sample in second.samples]


def _snapshot_if_complete(storage: Storage, plan: Plan) -> Snapshot | None:
    folders = find_features(storage)
    chosen = {folder.feature: folder for folder in folders}
    if not chosen or len(chosen) < len(folders) or incomplete_shards(plan, folders):
        return None
    return write_snapshot(storage, plan, chosen)
