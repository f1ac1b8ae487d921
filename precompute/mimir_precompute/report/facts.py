"""What stands at the head of the page: what the cache is, how far it is, how large, and what to run next."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mimir_precompute.inspection.status import CacheStatus, FeatureStatus
from mimir_precompute.quarantine import QuarantinedClip
from mimir_precompute.report.scan import CacheScan
from mimir_shared.feature_folder import FeatureFolder, find_features
from mimir_shared.features import FEATURES, FeatureName
from mimir_shared.storage.protocol import Storage

Json = Any
"""A value of an identity; `json` gives it no type."""

_GIGABYTE = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class FeatureFacts:
    """One feature at one fingerprint."""

    name: FeatureName
    fingerprint: str
    format: str
    shards_done: int
    ok: int
    quarantined: int
    nbytes: int
    models: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]
    identity: str
    """All of it, as indented JSON."""
    is_shown: bool
    """Charts and gallery are about this one; a cache may hold a feature more than once."""

    @property
    def bytes_per_clip(self) -> float | None:
        return self.nbytes / self.ok if self.ok else None


@dataclass(frozen=True, kw_only=True)
class NextStep:
    """What to do with the cache now."""

    says: str
    command: str


@dataclass(frozen=True, kw_only=True)
class CacheFacts:
    name: str
    features: tuple[FeatureFacts, ...]
    missing_features: tuple[FeatureName, ...]
    is_complete: bool
    usable: int
    planned: int
    quarantined: int
    """Clips that at least one feature could not be made of."""
    next_step: NextStep

    @property
    def nbytes(self) -> int:
        return sum(feature.nbytes for feature in self.features)

    @property
    def bytes_per_clip(self) -> float | None:
        """Of the features that charts and gallery are about, together."""
        sizes = [feature.bytes_per_clip for feature in self.features if feature.is_shown]
        known = [size for size in sizes if size is not None]
        return sum(known) if known and len(known) == len(sizes) else None

    @property
    def clips_per_gigabyte(self) -> float | None:
        return _GIGABYTE / self.bytes_per_clip if self.bytes_per_clip else None


def collect_facts(
    storage: Storage, name: str, status: CacheStatus, scan: CacheScan, quarantined: Sequence[QuarantinedClip]
) -> CacheFacts:
    """Put the head of the page together.

    Args:
        name: of the cache, as the page calls it.
    """
    features = tuple(
        _describe_feature(folder, _status_of(status, folder), scan)
        for folder in sorted(find_features(storage), key=lambda folder: FEATURES.index(folder.feature))
    )
    return CacheFacts(
        name=name,
        features=features,
        missing_features=tuple(feature for feature in FEATURES if feature not in scan.features),
        is_complete=status.complete,
        usable=len(scan.usable),
        planned=len(scan.planned),
        quarantined=len({one.key for one in quarantined}),
        next_step=_find_next_step(shlex.quote(name), status, scan),
    )


def _status_of(status: CacheStatus, folder: FeatureFolder) -> FeatureStatus:
    return next(one for one in status.features[folder.feature] if one.fingerprint == folder.fingerprint)


def _describe_feature(folder: FeatureFolder, status: FeatureStatus, scan: CacheScan) -> FeatureFacts:
    identity = folder.read_spec().identity
    is_shown = scan.features[folder.feature].fingerprint == folder.fingerprint
    counts = scan.counts[folder.feature] if is_shown else status
    return FeatureFacts(
        name=folder.feature,
        fingerprint=folder.fingerprint,
        format=status.format,
        shards_done=status.shards_done,
        ok=counts.ok,
        quarantined=counts.quarantined,
        nbytes=status.bytes,
        models=tuple(_name_model(identity[part]) for part in ("model", "tokenizer") if part in identity),
        settings=_plain_settings(identity),
        identity=json.dumps(identity, indent=1, ensure_ascii=False),
        is_shown=is_shown,
    )


def _plain_settings(identity: Mapping[str, Json]) -> tuple[tuple[str, str], ...]:
    """The settings that are one word or number; the rest stands in the identity as a whole."""
    words = {True: "yes", False: "no"}
    return tuple(
        (key.replace("_", " "), words[value] if isinstance(value, bool) else str(value))
        for key, value in identity.items()
        if isinstance(value, str | int | float)
        and key not in ("feature", "version")
        and len(str(value).strip()) in range(1, 40)
    )


def _name_model(model: Mapping[str, Json]) -> str:
    """Id, part and revision; of a model without a revision the digest of its weights."""
    digests: Mapping[str, str] = model.get("sha256") or {}
    weights = next((digest for file, digest in sorted(digests.items()) if file.endswith(".safetensors")), None)
    version = f"revision {model['commit'][:12]}" if model.get("commit") else ""
    if not version:
        digest = weights or next(iter(digests.values()), None)
        version = f"sha256 {digest[:12]}" if digest else ""
    where = "/".join(part for part in (model["name"], model.get("subfolder")) if part)
    return " · ".join(part for part in (where, version) if part)


def _find_next_step(cache: str, status: CacheStatus, scan: CacheScan) -> NextStep:
    encode = f"mimir-precompute encode --cache {cache} --shards all"
    missing = [feature for feature in FEATURES if feature not in scan.features]
    if not status.features:
        says, command = "The clips are planned and nothing is encoded yet; with --models or a preset's own:", encode
    elif not status.complete:
        says, command = "Shards are missing. The same command goes on where it stopped, with the same models:", encode
    elif missing:
        says = f"What was begun is complete; training from it needs {', '.join(missing)} as well:"
        command = f"{encode} --features {','.join(missing)}"
    elif not status.snapshots:
        says = "Every shard is there; a snapshot pins them for training:"
        command = f"mimir-precompute finalize {cache}"
    else:
        says = "Ready to train from. Before that, every byte can be read again and checked:"
        command = f"mimir-precompute verify {cache}"
    return NextStep(says=says, command=command)
