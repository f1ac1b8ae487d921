"""How two caches differ: what made them, which clips they hold, and how far their features are apart."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mimir_shared.feature_folder import FeatureFolder, select_features
from mimir_shared.features import FEATURES, FeatureTensor
from mimir_shared.fingerprint import differences
from mimir_shared.plan_file import read_plan
from mimir_shared.storage.protocol import Storage


@dataclass(kw_only=True)
class TensorDifference:
    """Of one tensor over all clips that both caches hold with the same shape."""

    clips: int = 0
    equal: int = 0
    """Clips whose tensors agree in every bit."""
    other_shape: int = 0
    rms_error: float = 0.0
    """Root mean square of B − A over that of A."""
    max_error: float = 0.0
    """Largest |B − A| over the largest |A|."""


@dataclass(kw_only=True)
class FeatureDifference:
    only: str | None = None
    """"A" or "B", where the other cache does not have the feature."""
    fields: list[tuple[str, Any, Any]] = field(default_factory=list)
    """Fields of the identity: name, in A, in B."""
    clips: int = 0
    """Ok in both."""
    only_a: list[str] = field(default_factory=list)
    """Keys that are ok in A alone."""
    only_b: list[str] = field(default_factory=list)
    other_text: int = 0
    """Clips whose `.json` differs, for instance in the answers."""
    tensors: dict[str, TensorDifference] = field(default_factory=dict)

    @property
    def is_equal(self) -> bool:
        same = all(t.equal == t.clips and not t.other_shape for t in self.tensors.values())
        return same and not (self.only or self.only_a or self.only_b or self.other_text)


@dataclass(kw_only=True)
class CacheDifference:
    only_a: list[str]
    """Planned keys that A alone has."""
    only_b: list[str]
    other_captions: int
    features: dict[str, FeatureDifference]

    @property
    def is_equal(self) -> bool:
        """Whether both hold the same features of the same clips, bit for bit; who made them may differ."""
        plans = not (self.only_a or self.only_b or self.other_captions)
        return plans and all(feature.is_equal for feature in self.features.values())

    def to_json(self) -> dict[str, Any]:
        return {"equal": self.is_equal, **asdict(self)}


def compare_caches(a: Storage, b: Storage, wanted_a: Mapping[str, str], wanted_b: Mapping[str, str]) -> CacheDifference:
    """Compare plans, identities and every clip that both hold.

    Args:
        wanted_a, wanted_b: feature → fingerprint, for features that a cache has more than once.
    Raises: InputError for a missing plan or an ambiguous feature, CacheError for damage.
    """
    captions_a, captions_b = _captions(a), _captions(b)
    folders_a, folders_b = select_features(a, wanted_a), select_features(b, wanted_b)
    features: dict[str, FeatureDifference] = {}
    for name in FEATURES:
        if name in folders_a and name in folders_b:
            features[name] = _compare_feature(folders_a[name], folders_b[name])
        elif name in folders_a or name in folders_b:
            features[name] = FeatureDifference(only="A" if name in folders_a else "B")
    both = captions_a.keys() & captions_b.keys()
    return CacheDifference(
        only_a=sorted(captions_a.keys() - both),
        only_b=sorted(captions_b.keys() - both),
        other_captions=sum(captions_a[key] != captions_b[key] for key in both),
        features=features,
    )


def _captions(storage: Storage) -> dict[str, str]:
    plan = read_plan(storage)
    clips = (clip for shard in range(plan.num_shards) for clip in plan.shard_clips(shard))
    return {clip.key: clip.caption for clip in clips if not plan.is_superseded(clip)}


@dataclass(frozen=True)
class _Place:
    shard: int
    generation: int
    row: int


def _places(folder: FeatureFolder) -> dict[str, _Place]:
    """key → where its newest ok sample lies."""
    plan = read_plan(folder.storage)
    places = {}
    for shard, generation in sorted(folder.generations().items()):
        record = folder.read_record(shard, generation)
        for clip, sample in zip(plan.shard_clips(shard), record.samples, strict=True):
            if sample.status == "ok" and not plan.is_superseded(clip):
                places[sample.key] = _Place(shard, generation, sample.row)
    return places


def _compare_feature(a: FeatureFolder, b: FeatureFolder) -> FeatureDifference:
    places_a, places_b = _places(a), _places(b)
    both = sorted(places_a.keys() & places_b.keys(), key=lambda key: (places_a[key].shard, places_a[key].row))
    difference = FeatureDifference(
        fields=differences(a.read_spec().identity, b.read_spec().identity),
        clips=len(both),
        only_a=sorted(places_a.keys() - places_b.keys()),
        only_b=sorted(places_b.keys() - places_a.keys()),
    )
    sums: dict[str, np.ndarray] = {}
    samples_a = _samples(a, [places_a[key] for key in both])
    samples_b = _samples(b, [places_b[key] for key in both])
    for (text_a, tensors_a), (text_b, tensors_b) in zip(samples_a, samples_b, strict=True):
        difference.other_text += text_a != text_b
        for name in sorted(tensors_a.keys() | tensors_b.keys()):
            _add(difference, sums, name, tensors_a.get(name), tensors_b.get(name))
    for name, (squares, error_squares, largest, largest_error) in sums.items():
        tensor = difference.tensors[name]
        tensor.rms_error = float(np.sqrt(error_squares / squares)) if squares else float(error_squares > 0)
        tensor.max_error = float(largest_error / largest) if largest else float(largest_error > 0)
    return difference


def _add(
    difference: FeatureDifference,
    sums: dict[str, np.ndarray],
    name: str,
    a: FeatureTensor | None,
    b: FeatureTensor | None,
) -> None:
    """Count one clip's tensor; `sums` holds squares of A and of the error, and the largest of each."""
    tensor = difference.tensors.setdefault(name, TensorDifference())
    tensor.clips += 1
    if a is None or b is None or a.array.shape != b.array.shape:
        tensor.other_shape += 1
        return
    tensor.equal += a.dtype == b.dtype and a.array.tobytes() == b.array.tobytes()
    values = a.to_float32().astype(np.float64)
    error = b.to_float32().astype(np.float64) - values
    total = sums.setdefault(name, np.zeros(4))
    total[:2] += (np.square(values).sum(), np.square(error).sum())
    if values.size:
        total[2:] = np.maximum(total[2:], (np.abs(values).max(), np.abs(error).max()))


def _samples(folder: FeatureFolder, places: list[_Place]) -> Iterator[tuple[dict[str, Any], dict[str, FeatureTensor]]]:
    """Text and tensors of some samples; a record is read again only where the shard changes."""
    record = None
    for place in places:
        if record is None or (record.metadata.shard, record.metadata.generation) != (place.shard, place.generation):
            record = folder.read_record(place.shard, place.generation)
        yield folder.read_sample(record, record.samples[place.row])
