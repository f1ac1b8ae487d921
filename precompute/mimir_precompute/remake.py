"""Making a committed shard again, as its next generation: what is to be encoded anew, and what is copied.

`retry` and `verify --repair` choose the rows; the pipeline does the rest as for any shard. A row that is not chosen is
taken over as it stands: the bytes of a good sample, checked against their hashes, or the line of a quarantined one.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from mimir_precompute.shard_writer import answers_hash
from mimir_shared.feature_folder import FeatureFolder
from mimir_shared.features import DEPENDENCIES
from mimir_shared.manifest import CommitRecord, SampleRecord
from mimir_shared.plan_file import Plan


@dataclass(frozen=True, kw_only=True)
class Remake:
    """One shard that is to be made again."""

    generation: int
    """The one that is made."""
    base: CommitRecord | None
    """Of the generation that rows are taken over from; None: the whole shard is encoded anew."""
    rows: frozenset[int]
    """Those that are encoded anew, where there is a base."""

    def takes_over(self, row: int) -> SampleRecord | None:
        """The sample that is taken over as it stands; None for a row that is to be encoded anew."""
        return None if self.base is None or row in self.rows else self.base.samples[row]

    @property
    def tries_before(self) -> dict[int, int]:
        """Row → how often its clip was tried, where it was quarantined."""
        samples = () if self.base is None else self.base.samples
        return {sample.row: sample.attempt or 0 for sample in samples if sample.status == "quarantined"}


class Remaking(Protocol):
    """Which shards of a feature are to be made again."""

    def shards(self, folder: FeatureFolder, answers: FeatureFolder | None) -> Mapping[int, Remake]:
        """Asked feature after feature, when all before it are made.

        Args:
            answers: the folder of `answers`, for `llm`.
        """
        ...


def answers_of(folder: FeatureFolder, folders: Iterable[FeatureFolder]) -> FeatureFolder | None:
    """The folder of `answers` that a folder of `llm` was made from; None for other features, and where it is gone."""
    if "answers" not in DEPENDENCIES[folder.feature]:
        return None
    wanted = str(folder.read_spec().identity["answers"])
    return next((one for one in folders if one.feature == "answers" and wanted.startswith(one.fingerprint)), None)


def outdated_shards(plan: Plan, folder: FeatureFolder, answers: FeatureFolder) -> Iterator[tuple[int, frozenset[int]]]:
    """(shard, rows) of `llm` that do not follow from the answers as they are now."""
    newest = answers.generations()
    for shard, generation in sorted(folder.generations().items()):
        if shard in newest and shard < plan.num_shards:
            rows = outdated_rows(folder.read_record(shard, generation), answers.read_record(shard, newest[shard]))
            if rows:
                yield shard, rows


def outdated_rows(record: CommitRecord, answers: CommitRecord) -> frozenset[int]:
    """Rows of `llm` that do not follow from the answers as they are now: other text, or ok where those are lost."""
    return frozenset(
        sample.row
        for sample, answer in zip(record.samples, answers.samples, strict=True)
        if "superseded" not in (sample.reason, answer.reason) and _is_outdated(sample, answer)
    )


def _is_outdated(sample: SampleRecord, answer: SampleRecord) -> bool:
    if answer.status == "ok":
        return sample.stage == "answers" or sample.source_xxh3 != answers_hash(answer)
    return (sample.stage, sample.reason, sample.detail) != ("answers", answer.reason, answer.detail)
