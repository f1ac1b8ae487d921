"""Reads samples of single clips, and remembers what was damaged instead of ending: the page is to tell of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mimir_shared.errors import CacheError
from mimir_shared.feature_folder import FeatureFolder
from mimir_shared.features import FeatureName, FeatureTensor
from mimir_shared.manifest import CommitRecord, SampleRecord
from mimir_shared.plan_file import PlannedClip


@dataclass(frozen=True, kw_only=True)
class ClipSample:
    """What a feature holds of one clip."""

    record: SampleRecord
    document: Mapping[str, Any]
    tensors: Mapping[str, FeatureTensor]


class SampleReader:
    """Every sample that it gives was checked against its hashes."""

    def __init__(self, folders: Mapping[FeatureName, FeatureFolder]) -> None:
        self._folders = folders
        self._generations = {feature: folder.generations() for feature, folder in folders.items()}
        # clips come in shard order, so the records of one shard are enough
        self._record = lru_cache(maxsize=2 * len(folders) or 1)(self._read_record)
        self.damage: dict[str, str] = {}
        """key of the clip → what is wrong with it; of each clip one fault."""

    def read(self, clip: PlannedClip, feature: FeatureName) -> ClipSample | None:
        """None where the clip is not encoded, quarantined, or damaged."""
        generation = self._generations.get(feature, {}).get(clip.shard)
        if generation is None:
            return None
        record = self._record(feature, clip.shard, generation)
        sample = record.samples[clip.row]
        if sample.stored is None:
            return None
        try:
            document, tensors = self._folders[feature].read_sample(record, sample)
        except CacheError as fault:
            self.damage.setdefault(clip.key, f"{feature}: {fault}")
            return None
        return ClipSample(record=sample, document=document, tensors=tensors)

    def _read_record(self, feature: FeatureName, shard: int, generation: int) -> CommitRecord:
        return self._folders[feature].read_record(shard, generation)
