"""`verify --repair`: make what is damaged again, as the next generation, and copy what is good.

The commit record is the truth about a shard. Where the newest one is damaged, the one before it vouches for what it
names; where there is none, the whole shard is encoded anew. What a record names and the disk does not hold intact is
encoded anew, the rest is copied once its hashes were checked.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mimir_precompute.clips.rejection import UNTRIED_STAGES
from mimir_precompute.completion import write_snapshot_if_complete
from mimir_precompute.inspection.verify import (
    Problem,
    VerifyReport,
    check_sample,
    check_snapshots,
    extra_files,
    find_lost_records,
    verify_feature,
)
from mimir_precompute.pipeline import asked_identities, encode_cache
from mimir_precompute.provenance import RunLog
from mimir_precompute.remake import Remake, answers_of, outdated_rows
from mimir_precompute.retry import JobMaker
from mimir_precompute.shard_writer import caption_hash
from mimir_precompute.workers.progress import Progress
from mimir_shared.errors import CacheError
from mimir_shared.feature_folder import FeatureFolder, FeatureSpec, find_features
from mimir_shared.features import FEATURES, FeatureName
from mimir_shared.fingerprint import fingerprint
from mimir_shared.layout import empty_name, spec_name
from mimir_shared.manifest import CommitRecord
from mimir_shared.plan_file import Plan, read_plan
from mimir_shared.snapshot import Snapshot, read_index, read_snapshot, rebuild_index
from mimir_shared.storage.folder import machine_faults
from mimir_shared.storage.protocol import Storage

Folder = tuple[FeatureName, str]
"""A feature's folder: name and first 12 digits of the fingerprint."""


@dataclass(frozen=True, kw_only=True)
class RepairOutcome:
    """What was wrong, what was done about it, and what is still wrong."""

    found: VerifyReport
    remaining: tuple[Problem, ...]
    shards_made: int = 0
    encoded: int = 0
    copied: int = 0
    snapshot: Snapshot | None = None
    """Of the cache as it is now; None while shards are missing."""
    lost_snapshots: tuple[str, ...] = ()
    """Folders of snapshots that could not be read and do not follow from the records any more: taken away."""

    @property
    def ok(self) -> bool:
        return not self.remaining

    def to_json(self) -> dict[str, object]:
        """As of `verify`, of what is still wrong, with what was done beside it."""
        report = replace(self.found, problems=list(self.remaining)).to_json()
        repaired = {"problems": len(self.found.problems), "shards": self.shards_made, "encoded": self.encoded}
        snapshot = None if self.snapshot is None else self.snapshot.digest
        return {**report, "repaired": {**repaired, "copied": self.copied, "snapshot": snapshot}}


def repair_cache(
    storage: Storage, report: VerifyReport, make_job: JobMaker, progress: Progress, log: RunLog
) -> RepairOutcome:
    """Mend what `verify` found, and verify what was mended.

    Raises: as encode_cache: models other than those that made the cache are refused by field.
    """
    plan = read_plan(storage)
    lost_snapshots = mend_snapshots(storage, plan)
    mended_specs = mend_specs(storage, plan, report, make_job)
    cleared = clear_extra_files(storage, plan, report)
    damaged = damaged_shards((p for p in report.problems if p.kind not in ("extra", "spec")), plan)
    empties = {place for problem in report.problems if problem.kind == "empty" and (place := _place(problem))}
    for feature, name in empties:
        _take_away(storage, empty_name(feature, name))
    features = _features(storage, damaged.keys() | empties | mended_specs)
    outcome = None
    if features:
        outcome = encode_cache(make_job(plan, features, Repairing(plan, damaged)), progress, log)
    snapshot = outcome.snapshot if outcome else write_snapshot_if_complete(storage, plan, {})
    made = outcome.features if outcome else []
    return RepairOutcome(
        found=report,
        remaining=tuple(_verify_again(storage, plan, report, [cleared, damaged], features)),
        shards_made=sum(feature.shards_made for feature in made),
        encoded=sum(feature.encoded for feature in made),
        copied=sum(feature.copied for feature in made),
        snapshot=snapshot,
        lost_snapshots=lost_snapshots,
    )


class Repairing:
    """The `remaking` of a job that mends shards."""

    def __init__(self, plan: Plan, damaged: Mapping[Folder, Collection[int]]) -> None:
        self._plan = plan
        self._damaged = damaged

    def shards(self, folder: FeatureFolder, answers: FeatureFolder | None) -> dict[int, Remake]:
        """The damaged shards of a folder, and those of `llm` in which a clip's answers are others than before."""
        damaged = self._damaged.get((folder.feature, folder.fingerprint[:12]), ())
        spec = folder.read_spec()
        answered = {} if answers is None else answers.generations()
        remakes: dict[int, Remake] = {}
        generations = folder.generations()
        for shard in sorted(generations.keys() | set(damaged)):
            newest = generations.get(shard, -1)
            remake = self._remake(folder, spec, shard, newest) if shard in damaged else None
            if answers is not None and shard in answered and shard < self._plan.num_shards:
                base = folder.read_record(shard, newest) if remake is None else remake.base
                follows = answers.read_record(shard, answered[shard])
                rows = frozenset() if base is None else outdated_rows(base, follows)
                if rows:
                    rows |= frozenset() if remake is None else remake.rows
                    remake = Remake(generation=newest + 1, base=base, rows=rows)
            if remake is not None:
                remakes[shard] = remake
        return remakes

    def _remake(self, folder: FeatureFolder, spec: FeatureSpec, shard: int, newest: int) -> Remake:
        base = newest_readable(folder, shard, newest)
        planned = self._plan.shard_clips(shard)
        if base is None or [sample.key for sample in base.samples] != [clip.key for clip in planned]:
            return Remake(generation=newest + 1, base=None, rows=frozenset())
        files = folder.open_shard(base)
        rows = set()
        for clip, sample in zip(planned, base.samples, strict=True):
            good = sample.status == "ok" and sample.stored is not None and check_sample(files, spec, sample) is None
            # what an older generation could not use, the lost one may have had
            kept = sample.status == "quarantined" and sample.stored is None and base.metadata.generation == newest
            follows = sample.status == "quarantined" and sample.stage in UNTRIED_STAGES
            if not (good or kept or follows) or sample.caption_xxh3 != caption_hash(clip.caption):
                rows.add(sample.row)
        return Remake(generation=newest + 1, base=base, rows=frozenset(rows))


def newest_readable(folder: FeatureFolder, shard: int, newest: int) -> CommitRecord | None:
    """The commit record of the highest generation that is not damaged; None where there is none."""
    for generation in range(newest, -1, -1):
        try:
            return folder.read_record(shard, generation)
        except CacheError:
            continue
    return None


def damaged_shards(problems: Iterable[Problem], plan: Plan) -> dict[Folder, set[int]]:
    """Folder → shards that something is wrong with; shards that the plan does not have cannot be made again."""
    damaged: dict[Folder, set[int]] = {}
    for problem in problems:
        place = _place(problem)
        if place is not None and problem.shard is not None and problem.shard < plan.num_shards:
            damaged.setdefault(place, set()).add(problem.shard)
    return damaged


def _place(problem: Problem) -> Folder | None:
    return next(((name, problem.fingerprint) for name in FEATURES if name == problem.feature), None)


def _features(storage: Storage, places: Collection[Folder]) -> tuple[FeatureName, ...]:
    """The features of some folders, and `llm` where it is made from one of them: it may have to follow."""
    wanted = {feature for feature, _ in places}
    folders = find_features(storage)
    for folder in folders:
        answers = answers_of(folder, folders) if "answers" in wanted else None
        if answers is not None and (answers.feature, answers.fingerprint[:12]) in places:
            wanted.add(folder.feature)
    return tuple(feature for feature in FEATURES if feature in wanted)


def mend_specs(storage: Storage, plan: Plan, report: VerifyReport, make_job: JobMaker) -> set[Folder]:
    """Write damaged spec.json files again where the models at hand are those that their folder is named for.

    What could not be checked without them is checked now, and added to the report.
    """
    broken = {place for problem in report.problems if problem.kind == "spec" and (place := _place(problem))}
    if not broken:
        return set()
    features = tuple(feature for feature in FEATURES if feature in {name for name, _ in broken})
    job = make_job(plan, features, Repairing(plan, {}))
    mended = set()
    for feature, identity in asked_identities(job.encoders, features).items():
        digest = fingerprint(identity)
        if (feature, digest[:12]) in broken:
            folder = FeatureFolder(storage, feature, digest)
            records = [newest_readable(folder, shard, newest) for shard, newest in folder.generations().items()]
            formats = {record.metadata.format for record in records if record is not None}
            data_format = formats.pop() if len(formats) == 1 else "webdataset"
            spec = FeatureSpec(feature=feature, fingerprint=digest, format=data_format, identity=identity)
            _take_away(storage, spec_name(feature, digest))
            storage.create(spec_name(feature, digest), spec.model_dump_json(indent=1).encode() + b"\n")
            verify_feature(plan, folder, find_features(storage), report)
            mended.add((feature, digest[:12]))
    return mended


def mend_snapshots(storage: Storage, plan: Plan) -> tuple[str, ...]:
    """Make damaged indexes again from the records that they were made from, and take away what cannot be read.

    Returns: folders of the snapshots that were taken away. The same snapshot is written again if the newest records
        are still those that it named.
    """
    lost = []
    for name in storage.list("snapshots"):
        directory = f"snapshots/{name}"
        try:
            snapshot = read_snapshot(storage, directory)
            if snapshot is None:
                continue  # another process is writing it, or did not come to its end
        except CacheError:
            _take_away(storage, directory)
            lost.append(directory)
            continue
        try:
            read_index(storage, snapshot)
        except CacheError:
            try:
                index = rebuild_index(storage, plan, snapshot)
            except CacheError:
                _take_away(storage, directory)
                lost.append(directory)
                continue
            _take_away(storage, f"{directory}/index.arrow")
            storage.create(f"{directory}/index.arrow", index)
    return tuple(lost)


def clear_extra_files(storage: Storage, plan: Plan, report: VerifyReport) -> dict[Folder, set[int]]:
    """Take away what lies in the folder of a shard and does not belong to it. Returns: folder → those shards."""
    found = damaged_shards((problem for problem in report.problems if problem.kind == "extra"), plan)
    for (feature, name), shards in found.items():
        folder = FeatureFolder(storage, feature, name)
        generations = folder.generations()
        for shard in shards:
            record = newest_readable(folder, shard, generations[shard])
            for extra in () if record is None else list(extra_files(folder, record)):
                _take_away(storage, extra)
    return found


def _take_away(storage: Storage, name: str) -> None:
    with machine_faults(f"{storage.root}/{name}: removing what is damaged"):
        storage.remove_tree(name)


def _verify_again(
    storage: Storage,
    plan: Plan,
    report: VerifyReport,
    touched: Sequence[Mapping[Folder, Collection[int]]],
    features: Collection[FeatureName],
) -> list[Problem]:
    """What is still wrong: of what was mended all shards are checked in which something was made or damaged."""
    folders = find_features(storage)
    again = VerifyReport()
    checked = set()
    for folder in folders:
        place = (folder.feature, folder.fingerprint[:12])
        if folder.feature in features or any(place in shards for shards in touched):
            shards = {shard for shard, generation in folder.generations().items() if generation > 0}
            shards.update(*(some.get(place, ()) for some in touched))
            verify_feature(plan, folder, folders, again, shards)
            checked.add(place)
    left = [p for p in report.problems if p.kind != "snapshot" and _place(p) not in checked]
    return [*left, *again.problems, *find_lost_records(storage), *check_snapshots(storage)]
