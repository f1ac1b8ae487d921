"""Reads a whole cache again and says everything that is wrong with it."""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath

import numpy as np

from mimir_precompute.clips.rejection import ClipRejected
from mimir_precompute.remake import answers_of, outdated_rows
from mimir_precompute.shard_writer import caption_hash, check_tensors
from mimir_shared.errors import CacheError, MachineError
from mimir_shared.feature_folder import FeatureFolder, FeatureSpec, find_features
from mimir_shared.features import FEATURES, FeatureTensor, TensorSpec
from mimir_shared.layout import empty_name, feature_directory, spec_name
from mimir_shared.manifest import CommitRecord, DataFile, SampleRecord
from mimir_shared.plan_file import Plan, read_plan
from mimir_shared.safetensors_bytes import read_tensors
from mimir_shared.sealed import check_sealed_tensors, read_sealed_json
from mimir_shared.shard_files import SEE_VERIFY, ShardFiles
from mimir_shared.snapshot import list_snapshots, read_index, readable_snapshots
from mimir_shared.storage.protocol import Storage
from mimir_shared.storage.stored_file import open_stored_file


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong. `shard` and `row` are None where it concerns more than one."""

    feature: str
    shard: int | None
    row: int | None
    kind: str
    """missing, length, sha256, extra, record, spec, plan, law, order, outdated, sample, tensor, empty, snapshot"""
    detail: str
    fingerprint: str = ""
    """First 12 digits, of the feature's folder."""


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
    folders = find_features(storage)
    for folder in folders:
        verify_feature(plan, folder, folders, report)
    report.problems += _find_lost_specs(storage)
    report.problems += find_lost_records(storage)
    report.problems += check_snapshots(storage)
    return report


def verify_feature(
    plan: Plan,
    folder: FeatureFolder,
    folders: Sequence[FeatureFolder],
    report: VerifyReport,
    shards: Collection[int] | None = None,
) -> None:
    """Check one feature and add what is found to a report.

    Args:
        folders: all of the cache: `llm` is checked against the answers that it was made from.
        shards: check these alone, of those that are committed; None: all.
    """
    try:
        spec = folder.read_spec()
    except CacheError as fault:
        _add(report, folder, None, "spec", str(fault))
        return
    report.problems += _check_empty(folder, spec)
    answers = answers_of(folder, folders)
    generations = folder.generations()
    missing = plan.num_shards - sum(shard < plan.num_shards for shard in generations)
    if missing and shards is None:
        report.unfinished[f"{folder.feature}/{folder.fingerprint[:12]}"] = missing
    for shard, generation in sorted(generations.items()):
        if shards is not None and shard not in shards:
            continue
        report.shards += 1
        try:
            record = folder.read_record(shard, generation)
        except CacheError as fault:
            _add(report, folder, shard, "record", str(fault))
            continue
        if record.metadata.format != spec.format:
            detail = f"is of format {record.metadata.format}, spec.json says {spec.format}; one of both was edited"
            _add(report, folder, shard, "spec", detail)
        report.problems += _check_law(plan, folder, record)
        report.problems += _check_order(folder, record)
        if answers is not None and shard < plan.num_shards:
            report.problems += _check_answers(answers, folder, record)
        if _check_files(folder, record, report):
            report.problems += _check_samples(folder, spec, record)
        report.samples += record.metadata.ok


def _find_lost_specs(storage: Storage) -> Iterator[Problem]:
    """Folders with commit records that no spec explains, so that nobody finds them."""
    for feature in FEATURES:
        for name in storage.list(feature):
            if not storage.exists(spec_name(feature, name)) and storage.list(
                f"{feature_directory(feature, name)}/manifests"
            ):
                folder = FeatureFolder(storage, feature, name)
                yield _problem(
                    folder, None, "spec", f"{spec_name(feature, name)}: missing, though shards are committed"
                )


def find_lost_records(storage: Storage) -> Iterator[Problem]:
    """Commit records that a snapshot names and the cache has no more; else they would pass for work to be done."""
    seen = set()
    for snapshot in readable_snapshots(storage):
        for feature, one in snapshot.features.items():
            folder = FeatureFolder(storage, feature, one.fingerprint)
            for shard, generation, _ in one.records:
                name = folder.record_path(shard, generation)
                if name not in seen and not storage.exists(name):
                    yield _problem(folder, shard, "record", f"{name}: missing, though {snapshot.directory} names it")
                seen.add(name)


def _problem(folder: FeatureFolder, shard: int | None, kind: str, detail: str, row: int | None = None) -> Problem:
    place = {"feature": folder.feature, "fingerprint": folder.fingerprint[:12]}
    return Problem(**place, shard=shard, row=row, kind=kind, detail=detail)


def _add(report: VerifyReport, folder: FeatureFolder, shard: int | None, kind: str, detail: str) -> None:
    report.problems.append(_problem(folder, shard, kind, detail))


def _check_order(folder: FeatureFolder, record: CommitRecord) -> Iterator[Problem]:
    """Rows are numbered from 0 on, and in every file the samples lie in row order and apart."""
    ends: dict[int, int] = {}
    for number, sample in enumerate(record.samples):
        stored = sample.stored
        places = [] if stored is None else [(stored.json_file, stored.json_offset, stored.json_nbytes)]
        places += [] if stored is None else [(place.file, place.offset, place.nbytes) for place in stored.tensors]
        if sample.row != number:
            yield _problem(folder, record.metadata.shard, "order", f"row {sample.row} stands at place {number}", number)
        for file, offset, nbytes in places:
            if offset < ends.get(file, 0):
                detail = (
                    f"{sample.key!r} begins at byte {offset} of file {file}, before the end of the sample before it"
                )
                yield _problem(folder, record.metadata.shard, "order", detail, sample.row)
            ends[file] = offset + nbytes


def _check_answers(answers: FeatureFolder, folder: FeatureFolder, record: CommitRecord) -> Iterator[Problem]:
    shard = record.metadata.shard
    generation = answers.generations().get(shard)
    if generation is not None:
        try:
            rows = outdated_rows(record, answers.read_record(shard, generation))
        except CacheError:
            return  # told where `answers` is checked
        for row in sorted(rows):
            yield _problem(folder, shard, "outdated", "made from other answers than the cache has now", row)


def _check_law(plan: Plan, folder: FeatureFolder, record: CommitRecord) -> Iterator[Problem]:
    """Every planned row is there, ok or quarantined, exactly once, and made from the planned caption."""
    shard = record.metadata.shard

    def problem(kind: str, detail: str, row: int | None = None) -> Problem:
        return _problem(folder, shard, kind, detail, row)

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
    for name in extra_files(folder, record):
        detail = f"{name}: belongs to no shard; `verify --repair` or `gc` removes it"
        _add(report, folder, record.metadata.shard, "extra", detail)
    return readable


def extra_files(folder: FeatureFolder, record: CommitRecord) -> Iterator[str]:
    """Files in the folder of a shard that do not belong to it: a reader of the format might take them for data."""
    known = {f"{folder.directory}/{data_file.path}" for data_file in record.metadata.files}
    parents = {str(parent) for name in known for parent in PurePosixPath(name).parents}
    data = f"{folder.directory}/data/"
    for directory in sorted(parent for parent in parents if parent.startswith(data)):
        for entry in folder.storage.list(directory):
            if f"{directory}/{entry}" not in known | parents:
                yield f"{directory}/{entry}"


def _check_file(folder: FeatureFolder, data_file: DataFile, report: VerifyReport) -> tuple[str, str] | None:
    """What is wrong with one data file: (kind, detail)."""
    try:
        with open_stored_file(folder.storage, f"{folder.directory}/{data_file.path}") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
    except FileNotFoundError:
        return "missing", "missing, though the commit record names it; `verify --repair` makes it again"
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
            found = check_sample(files, spec, sample)
            if found is not None:
                yield _problem(folder, shard, *found, sample.row)


def check_sample(files: ShardFiles, spec: FeatureSpec, sample: SampleRecord) -> tuple[str, str] | None:
    """What is wrong with one good sample's bytes, or with what they hold: (kind, detail)."""
    try:
        document = files.read_document(sample)
        tensors = files.read_tensors(sample)
        if document.get("key") != sample.key:
            return "sample", f"{sample.key!r}: its text is of {document.get('key')!r}"
        check_tensors(tensors, spec.tensor_specs(sample.bucket or ""))
    except (CacheError, MachineError, ValueError) as fault:
        return "sample", str(fault).removesuffix(SEE_VERIFY)
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
            yield _problem(folder, None, "empty", detail)
        return
    try:
        data = folder.storage.read(name)
        if name.endswith(".json"):
            read_sealed_json(data, name)
        else:
            check_sealed_tensors(data, name)
            mismatch = _empty_mismatch(read_tensors(data, name), spec.tensor_specs(""))
            if mismatch is not None:
                raise CacheError(f"{name}: {mismatch}; it is of another feature: restore it from a copy")
    except CacheError as fault:
        yield _problem(folder, None, "empty", str(fault))


def _empty_mismatch(tensors: Mapping[str, FeatureTensor], specs: Sequence[TensorSpec]) -> str | None:
    """How the tensors of the empty prompt depart from those of every clip; None where they fit."""
    expected = sorted(spec.name for spec in specs)
    if sorted(tensors) != expected:
        return f"has tensors {sorted(tensors)}, expected {expected}"
    found = (spec.mismatch(tensors[spec.name].array, tensors[spec.name].dtype) for spec in specs)
    return next((mismatch for mismatch in found if mismatch is not None), None)


def check_snapshots(storage: Storage) -> Iterator[Problem]:
    """Every snapshot parses, and its index is the one that it names. Ends at the first that does not."""
    try:
        for snapshot in list_snapshots(storage):
            index = read_index(storage, snapshot)
            if index.num_rows != snapshot.clips:
                raise CacheError(f"{snapshot.directory}: {index.num_rows} rows, snapshot.json says {snapshot.clips}")
            if len(np.unique(np.asarray(index["key"]))) != index.num_rows:
                raise CacheError(f"{snapshot.directory}: a key stands in its index twice")
    except CacheError as fault:
        yield Problem(feature="", shard=None, row=None, kind="snapshot", detail=str(fault))
