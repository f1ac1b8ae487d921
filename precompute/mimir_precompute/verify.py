"""Reads a whole cache again and says everything that is wrong with it."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np

from mimir_precompute.rejection import ClipRejected
from mimir_precompute.shard_writer import caption_hash, check_tensors
from mimir_shared.errors import CacheError
from mimir_shared.feature_folder import FeatureFolder, FeatureSpec, find_features
from mimir_shared.layout import empty_name
from mimir_shared.manifest import CommitRecord, DataFile, SampleRecord
from mimir_shared.plan_file import Plan, read_plan
from mimir_shared.sealed import check_sealed_tensors, read_sealed_json
from mimir_shared.shard_files import ShardFiles
from mimir_shared.snapshot import list_snapshots, read_index
from mimir_shared.storage_protocol import Storage
from mimir_shared.stored_file import open_stored_file


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong. `shard` and `row` are None where it concerns more than one."""

    feature: str
    shard: int | None
    row: int | None
    kind: str
    """missing, length, sha256, record, spec, plan, law, sample, tensor, empty, snapshot"""
    detail: str


@dataclass(kw_only=True)
class VerifyReport:
    shards: int = 0
    """Shards of features that were read."""
    samples: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    unfinished: dict[str, int] = field(default_factory=dict)
    """feature → shards without a commit record: work to be done, no damage."""

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, object]:
        return {
            "ok": self.ok,
            "shards": self.shards,
            "samples": self.samples,
            "bytes": self.bytes,
            "problems": [asdict(problem) for problem in self.problems],
        }


def verify_cache(storage: Storage) -> VerifyReport:
    """Check plan, specs, records, data files, every sample and every snapshot.

    Raises: InputError where there is no plan, CacheError where the plan itself is damaged.
    """
    plan = read_plan(storage)
    report = VerifyReport()
    for folder in find_features(storage):
        try:
            spec = folder.read_spec()
        except CacheError as fault:
            _add(report, folder, None, "spec", str(fault))
            continue
        report.problems += _check_empty(folder, spec)
        _check_feature(plan, folder, spec, report)
    report.problems += _check_snapshots(storage)
    return report


def _check_feature(plan: Plan, folder: FeatureFolder, spec: FeatureSpec, report: VerifyReport) -> None:
    generations = folder.generations()
    missing = plan.num_shards - sum(shard < plan.num_shards for shard in generations)
    if missing:
        report.unfinished[f"{folder.feature}/{folder.fingerprint[:12]}"] = missing
    for shard, generation in sorted(generations.items()):
        report.shards += 1
        try:
            record = folder.read_record(shard, generation)
        except CacheError as fault:
            _add(report, folder, shard, "record", str(fault))
            continue
        report.problems += _check_law(plan, folder, record)
        if _check_files(folder, record, report):
            report.problems += _check_samples(folder, spec, record)
        report.samples += record.metadata.ok


def _add(report: VerifyReport, folder: FeatureFolder, shard: int | None, kind: str, detail: str) -> None:
    report.problems.append(Problem(feature=folder.feature, shard=shard, row=None, kind=kind, detail=detail))


def _check_law(plan: Plan, folder: FeatureFolder, record: CommitRecord) -> Iterator[Problem]:
    """Every planned row is there, ok or quarantined, exactly once, and made from the planned caption."""
    shard = record.metadata.shard

    def problem(kind: str, detail: str, row: int | None = None) -> Problem:
        return Problem(feature=folder.feature, shard=shard, row=row, kind=kind, detail=detail)

    if shard >= plan.num_shards:
        yield problem("plan", f"the plan has shards 0 to {plan.num_shards - 1}")
        return
    if record.metadata.plan != plan.file_of(shard).seal:
        yield problem("plan", "the record was made from another plan than the cache has")
    planned = plan.shard_clips(shard)
    if [sample.key for sample in record.samples] != [clip.key for clip in planned]:
        yield problem("law", f"{len(record.samples)} rows whose keys are not the {len(planned)} planned ones")
        return
    for clip, sample in zip(planned, record.samples, strict=True):
        if sample.caption_xxh3 != caption_hash(clip.caption):
            yield problem("law", "made from another caption than the plan has", sample.row)
        if (sample.status == "ok") != (sample.stored is not None) or sample.status not in ("ok", "quarantined"):
            yield problem("law", f"status {sample.status!r} with{'' if sample.stored else 'out'} bytes", sample.row)


def _check_files(folder: FeatureFolder, record: CommitRecord, report: VerifyReport) -> bool:
    """Length and sha256 of every data file; whether the samples are worth looking into."""
    readable = True
    for data_file in record.metadata.files:
        problem = _check_file(folder, data_file, report)
        if problem is not None:
            kind, detail = problem
            _add(report, folder, record.metadata.shard, kind, f"{folder.directory}/{data_file.path}: {detail}")
            readable &= kind != "missing"
    return readable


def _check_file(folder: FeatureFolder, data_file: DataFile, report: VerifyReport) -> tuple[str, str] | None:
    """What is wrong with one data file: (kind, detail)."""
    try:
        with open_stored_file(folder.storage, f"{folder.directory}/{data_file.path}") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
    except FileNotFoundError:
        return "missing", "missing, though the commit record names it; restore it from a copy"
    except OSError as fault:
        return "missing", f"cannot be read: {fault.strerror}"
    report.bytes += size
    if size != data_file.bytes:
        return "length", f"{size} bytes, the record says {data_file.bytes}"
    if digest != data_file.sha256:
        return "sha256", f"{digest[:12]}…, expected {data_file.sha256[:12]}…"
    return None


def _check_samples(folder: FeatureFolder, spec: FeatureSpec, record: CommitRecord) -> Iterator[Problem]:
    shard = record.metadata.shard
    files = folder.open_shard(record)
    for sample in record.samples:
        if sample.stored is not None:
            found = _check_sample(files, spec, sample)
            if found is not None:
                kind, detail = found
                yield Problem(feature=folder.feature, shard=shard, row=sample.row, kind=kind, detail=detail)


def _check_sample(files: ShardFiles, spec: FeatureSpec, sample: SampleRecord) -> tuple[str, str] | None:
    try:
        document = files.read_document(sample)
        tensors = files.read_tensors(sample)
        if document.get("key") != sample.key:
            return "sample", f"{sample.key!r}: its text is of {document.get('key')!r}"
        check_tensors(tensors, spec.tensor_specs(sample.bucket or ""))
    except (CacheError, ValueError) as fault:
        return "sample", str(fault)
    except ClipRejected as rejection:
        return "tensor", f"{sample.key!r}: {rejection.detail}"
    return None


def _check_empty(folder: FeatureFolder, spec: FeatureSpec) -> Iterator[Problem]:
    name = empty_name(folder.feature, folder.fingerprint)
    if folder.feature == "latents":
        return
    if not folder.storage.exists(name):
        if folder.generations():
            detail = f"{name} is missing, though shards are committed"
            yield Problem(feature=folder.feature, shard=None, row=None, kind="empty", detail=detail)
        return
    try:
        data = folder.storage.read(name)
        if name.endswith(".json"):
            read_sealed_json(data, name)
        else:
            check_sealed_tensors(data, name)
    except CacheError as fault:
        yield Problem(feature=folder.feature, shard=None, row=None, kind="empty", detail=str(fault))


def _check_snapshots(storage: Storage) -> Iterator[Problem]:
    try:
        for snapshot in list_snapshots(storage):
            index = read_index(storage, snapshot)
            if index.num_rows != snapshot.clips:
                raise CacheError(f"{snapshot.directory}: {index.num_rows} rows, snapshot.json says {snapshot.clips}")
            if len(np.unique(np.asarray(index["key"]))) != index.num_rows:
                raise CacheError(f"{snapshot.directory}: a key stands in its index twice")
    except CacheError as fault:
        yield Problem(feature="", shard=None, row=None, kind="snapshot", detail=str(fault))
