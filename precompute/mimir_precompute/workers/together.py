"""One feature as all its workers make it: what is committed, whoever did it, and what each says of itself."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mimir_precompute.workers.pace import rate_together, time_left_s
from mimir_precompute.workers.seen import SeenWorker, WorkerReport, read_workers
from mimir_shared.feature_folder import FeatureFolder
from mimir_shared.plan_file import Plan
from mimir_shared.storage.protocol import Storage
from mimir_shared.wording import describe_duration, format_size


@dataclass(frozen=True, kw_only=True)
class SharedWork:
    """What this worker makes together with others: where they commit, and what is to be there in the end."""

    storage: Storage
    folder: FeatureFolder
    clips_of_shard: Mapping[int, int]
    """The shards that are to be made."""
    generations: Mapping[int, int]
    """The generation that makes a shard done, where it is not the first."""

    def committed(self) -> set[int]:
        """The shards that are done by now, whoever did them."""
        newest = self.folder.generations()
        return {shard for shard in self.clips_of_shard if newest.get(shard, -1) >= self.generations.get(shard, 0)}


@dataclass(frozen=True, kw_only=True)
class Together:
    """One feature, as all workers have made it since this call began."""

    clips: int
    total: int
    workers: int
    clips_per_s: float | None
    nbytes: int
    quarantined: int


def work_left(folder: FeatureFolder, plan: Plan, shards: Iterable[int]) -> SharedWork:
    """Those of some shards that a feature lacks now."""
    done = folder.generations()
    sizes = {shard: plan.file_of(shard).num_clips(shard) for shard in shards if shard not in done}
    return SharedWork(storage=folder.storage, folder=folder, clips_of_shard=sizes, generations={})


def workers_at(shared: SharedWork) -> list[SeenWorker]:
    """Who works on a feature right now."""
    feature = (shared.folder.feature, shared.folder.fingerprint[:12])
    return [
        worker
        for worker in read_workers(shared.storage)
        if worker.state == "working" and (worker.report.feature, worker.report.fingerprint) == feature
    ]


def add_up(
    reports: Sequence[WorkerReport], total: int, shared: SharedWork | None, committed: Collection[int]
) -> Together:
    """What all workers of a feature have made together.

    Args:
        reports: of those that are at it.
        total: clips that were to be made when this call began.
        shared: None where there is one worker, whose own count says all.
        committed: those of its shards that are done by now.
    """
    clips = sum(report.clips for report in reports)
    if shared is not None:
        # a report may be older than the commit of the shard that it speaks of
        begun = [report.clips_in_shard for report in reports if report.shard not in committed]
        clips = sum(begun) + sum(shared.clips_of_shard.get(shard, 0) for shard in committed)
    return Together(
        clips=min(clips, total),
        total=total,
        workers=len(reports),
        clips_per_s=rate_together(report.clips_per_s for report in reports),
        nbytes=sum(report.bytes for report in reports),
        quarantined=sum(report.quarantined for report in reports),
    )


def describe_together(together: Together) -> str:
    """Speed, size, losses and time left, in one line."""
    rate = together.clips_per_s
    parts = ["… clips/s" if rate is None else f"{rate:.1f} clips/s"]
    if together.workers > 1:
        parts[0] += f" by {together.workers} workers"
    parts += [format_size(together.nbytes), f"{together.quarantined} quarantined"]
    left_s = time_left_s(together.total - together.clips, rate)
    if left_s is not None:
        parts.append(f"{describe_duration(left_s)} left")
    return " · ".join(parts)
