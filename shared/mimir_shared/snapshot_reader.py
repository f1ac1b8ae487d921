"""Reads a cache as one of its snapshots pins it, with numpy alone: any clip, any feature, every byte checked.

cache = open_snapshot("CACHE")
for key in cache:
    tensors = cache.sample(key)              # {"vae_moments": FeatureTensor, "t5_embeds": …}
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from mimir_shared.clip_table import Clip, ClipTable
from mimir_shared.errors import CacheError, InputError
from mimir_shared.feature_column import FeatureColumn
from mimir_shared.feature_folder import FeatureSpec, find_features
from mimir_shared.features import NUMPY_DTYPES, FeatureName, FeatureTensor
from mimir_shared.layout import FINGERPRINT_DIGITS, empty_name, plan_name, snapshot_directory
from mimir_shared.plan_file import read_plan
from mimir_shared.safetensors_bytes import read_tensors
from mimir_shared.sealed import check_sealed_tensors, claimed_seal
from mimir_shared.snapshot import Snapshot, incomplete_shards, list_snapshots, read_index, read_snapshot
from mimir_shared.storage.open import DEFAULT_LOCAL_CACHE_GB, open_storage
from mimir_shared.storage.protocol import Storage

_FOOTER_BYTES: Final = 1 << 20
"""Where a seal stands in a plan file, counted from its end: the footer is far smaller."""


class SnapshotReader:
    """A snapshot, open for reading. Clips have keys, and numbers: their rows of the index. Safe between threads."""

    def __init__(self, storage: Storage, snapshot: Snapshot, index: pa.Table) -> None:
        self.storage = storage
        self.snapshot = snapshot
        self._index = index.combine_chunks()
        self.clips = ClipTable(self._index)
        self._columns: dict[FeatureName, FeatureColumn] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Clips that are ok in every feature."""
        return len(self.clips)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({str(self.storage.root)!r}: {len(self)} clips of {', '.join(self.features)}; "
            f"snapshot {self.snapshot.digest[:FINGERPRINT_DIGITS]})"
        )

    def __iter__(self) -> Iterator[str]:
        """The keys, by shard and row."""
        return self.clips.keys()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.clips.number_of(key) is not None

    @property
    def features(self) -> tuple[FeatureName, ...]:
        """In the order in which they are made."""
        return tuple(self.snapshot.features)

    @cached_property
    def num_shards(self) -> int:
        """Shards with a clip in the index have smaller numbers than this."""
        return 1 + max((shard for feature in self.snapshot.features.values() for shard, _, _ in feature.records))

    def spec(self, feature: FeatureName) -> FeatureSpec:
        """What made a feature. Raises InputError where the snapshot does not have it."""
        pinned = self.snapshot.features.get(feature)
        if pinned is None:
            raise InputError(
                f"{self.storage.root}: snapshot {self.snapshot.digest[:12]} has no feature `{feature}`, only "
                f"{', '.join(self.snapshot.features)}; make it: `mimir-precompute encode --cache {self.storage.root} "
                f"--features {feature}` with its models"
            )
        return FeatureSpec(
            feature=feature, fingerprint=pinned.fingerprint, format=pinned.format, identity=pinned.identity
        )

    def clip(self, number: int) -> Clip:
        return self.clips[number]

    def number_of(self, key: str) -> int:
        """The number of a clip. Raises InputError for a key that the snapshot does not hold."""
        number = self.clips.number_of(key)
        if number is None:
            raise InputError(
                f"{self.storage.root}: snapshot {self.snapshot.digest[:12]} has no clip {key!r} among its {len(self)}; "
                f"`mimir-precompute inspect {self.storage.root} {key}` says what became of it"
            )
        return number

    def read(self, number: int, feature: FeatureName, *, verify: bool = True) -> dict[str, FeatureTensor]:
        """The tensors of one feature of a clip, in memory of their own.

        Args:
            verify: compare the bytes with their xxh3 in the commit record.
        Raises: CacheError naming clip, shard, row and source where the file is missing or the bytes are not those that
            were committed; MachineError where they cannot be read.
        """
        column = self.column(feature)
        tensors = {
            tensor.name: FeatureTensor(np.empty(tensor.shape[number], NUMPY_DTYPES[tensor.dtype]), tensor.dtype)
            for tensor in column.tensors
        }
        buffers = [tensor.array.reshape(-1).view(np.uint8).data for tensor in tensors.values()]
        column.read_into(number, buffers, verify=verify)
        return tensors

    def sample(
        self, key: str, features: Sequence[FeatureName] | None = None, *, verify: bool = True
    ) -> dict[str, FeatureTensor]:
        """All tensors of a clip by name, in memory of their own. Raises as `read`, and InputError for an unknown key.

        Args:
            features: to read; None: all of the snapshot.
        """
        number = self.number_of(key)
        wanted = self.features if features is None else features
        return {name: t for feature in wanted for name, t in self.read(number, feature, verify=verify).items()}

    def document(self, key: str, feature: FeatureName, *, verify: bool = True) -> dict[str, Any]:
        """The text of one feature of a clip, for instance the LLM's `answers`. Raises as `sample`."""
        number = self.number_of(key)
        return self.column(feature).read_document(number, verify=verify)

    def read_empty(self, feature: FeatureName) -> dict[str, FeatureTensor]:
        """The feature of the empty prompt. Raises CacheError where it is missing or damaged."""
        name = empty_name(feature, self.spec(feature).fingerprint)
        where = f"{self.storage.root}/{name}"
        try:
            data = self.storage.read(name)
        except FileNotFoundError as fault:
            raise CacheError(
                f"{where}: missing, the features of the empty prompt; train with --empty-text zeros, or encode "
                f"`{feature}` again"
            ) from fault
        check_sealed_tensors(data, where)
        return read_tensors(data, where)

    def column(self, feature: FeatureName) -> FeatureColumn:
        """Where a feature's bytes lie. Raises InputError where the snapshot does not have it."""
        spec = self.spec(feature)
        with self._lock:
            if feature not in self._columns:
                column = self._index[feature].combine_chunks()
                self._columns[feature] = FeatureColumn(self.storage, self.snapshot, spec, column, self.clips)
            return self._columns[feature]


def open_snapshot(
    location: str,
    wanted: Mapping[str, str] | None = None,
    *,
    snapshot: str | None = None,
    local_cache_dir: str | None = None,
    local_cache_gb: float = DEFAULT_LOCAL_CACHE_GB,
) -> SnapshotReader:
    """Open the newest snapshot of a cache, whatever features it has.

    Args: and Raises: as find_snapshot.
    """
    return SnapshotReader(
        *find_snapshot(
            location, wanted or {}, snapshot=snapshot, local_cache_dir=local_cache_dir, local_cache_gb=local_cache_gb
        )
    )


def find_snapshot(
    location: str,
    wanted: Mapping[str, str],
    *,
    snapshot: str | None = None,
    needed: Sequence[FeatureName] = (),
    local_cache_dir: str | None = None,
    local_cache_gb: float = DEFAULT_LOCAL_CACHE_GB,
) -> tuple[Storage, Snapshot, pa.Table]:
    """The newest snapshot of a cache that fits, and its index. Of several ways to make a feature one must be wanted.

    Args:
        wanted: feature → beginning of its fingerprint, where the cache has a feature more than once.
        snapshot: digest (or its beginning) of the one to take instead.
        needed: features that the snapshot must have.
        local_cache_dir: folder that keeps what is read from a bucket, with at most `local_cache_gb` 10^9 bytes.
    Raises: InputError where there is none, saying what to run, or where those that fit have a feature at several
        fingerprints; CacheError where it is damaged, is gone, or is of another plan than the one that lies there.
    """
    storage = open_storage(location, local_cache_dir=local_cache_dir, local_cache_gb=local_cache_gb)
    if isinstance(storage.root, Path) and not storage.root.is_dir():
        raise InputError(f"--cache {location}: no such folder")
    chosen = _choose(storage, wanted, snapshot, needed)
    _check_plans(storage, chosen)
    return storage, chosen, read_index(storage, chosen)


def _choose(storage: Storage, wanted: Mapping[str, str], digest: str | None, needed: Sequence[FeatureName]) -> Snapshot:
    if digest is not None and len(digest) >= FINGERPRINT_DIGITS:
        # asked for by name, and not looked for: a listing may be late
        named = read_snapshot(storage, snapshot_directory(digest))
        if named is not None and named.digest.startswith(digest):
            return named
    snapshots = list_snapshots(storage)
    if digest is not None:
        chosen = next((found for found in snapshots if found.digest.startswith(digest)), None)
        if chosen is None:
            raise CacheError(
                f"{storage.root}: snapshot {digest[:12]} is not here; the cache has "
                f"{', '.join(found.digest[:12] for found in snapshots) or 'none'}; give the cache that the run began "
                f"with"
            )
        return chosen
    fitting = [found for found in snapshots if _fits(found, wanted, needed)]
    if not fitting:
        raise InputError(_no_snapshot(storage, snapshots, wanted, needed))
    _refuse_several_makes(storage, fitting)
    return fitting[-1]


def _fits(snapshot: Snapshot, wanted: Mapping[str, str], needed: Sequence[FeatureName]) -> bool:
    pinned: dict[str, str] = {name: feature.fingerprint for name, feature in snapshot.features.items()}
    return all(feature in pinned for feature in needed) and all(
        pinned.get(feature, "-").startswith(beginning) for feature, beginning in wanted.items()
    )


def _refuse_several_makes(storage: Storage, fitting: Sequence[Snapshot]) -> None:
    """Raise InputError where it would depend on who encoded last which models' features are read."""
    makes: dict[FeatureName, dict[str, list[str]]] = {}
    for snapshot in fitting:
        for name, pinned in snapshot.features.items():
            makes.setdefault(name, {}).setdefault(pinned.fingerprint[:FINGERPRINT_DIGITS], []).append(
                snapshot.digest[:FINGERPRINT_DIGITS]
            )
    several = {name: found for name, found in makes.items() if len(found) > 1}
    if several:
        told = "; ".join(
            f"{name}: " + ", ".join(f"{make} (snapshot {', '.join(digests)})" for make, digests in found.items())
            for name, found in several.items()
        )
        example = " ".join(f"--feature {name}={list(found)[-1]}" for name, found in several.items())
        raise InputError(
            f"{storage.root}: made in several ways, expected to be told which to read: {told}; say it by --feature "
            f"NAME=FINGERPRINT, for the newest: {example}"
        )


def _check_plans(storage: Storage, snapshot: Snapshot) -> None:
    """Raise CacheError where the plan files are not those that the snapshot was made of."""
    for index, seal in enumerate(snapshot.plans):
        name = plan_name(index)
        found = _claimed_seal(storage, name) if storage.exists(name) else None
        if found != seal:
            raise CacheError(
                f"{storage.root}/{name}: {f'is the plan {found[:12]}' if found else 'missing'}, but snapshot "
                f"{snapshot.digest[:12]} was made of the plan {seal[:12]}; these are parts of two caches: restore the "
                f"plan from a copy, or encode the one that lies there: `mimir-precompute encode --cache {storage.root}`"
            )


def _claimed_seal(storage: Storage, name: str) -> str | None:
    """By the end of the file alone: a plan may have gigabytes, and it is not what training reads."""
    size = storage.size(name)
    tail = bytearray(min(size, _FOOTER_BYTES))
    storage.read_into(name, size - len(tail), [memoryview(tail)])
    return claimed_seal(bytes(tail))


def _no_snapshot(
    storage: Storage, snapshots: list[Snapshot], wanted: Mapping[str, str], needed: Sequence[FeatureName]
) -> str:
    """Why there is none to open, and what to run."""
    root = storage.root
    plan = read_plan(storage)  # says it better where there is no plan at all
    folders = find_features(storage)
    absent = [feature for feature in needed if feature not in {folder.feature for folder in folders}]
    missing = incomplete_shards(plan, folders)
    encode = f"`mimir-precompute encode --cache {root} --shards all`"
    if absent:
        return f"{root}: the cache is not finished: no {' and no '.join(absent)} yet; run {encode} with its models"
    for feature, beginning in wanted.items():
        present = [folder.fingerprint for folder in folders if folder.feature == feature]
        if not any(fingerprint.startswith(beginning) for fingerprint in present):
            return f"--feature {feature}={beginning}: {root} has {', '.join(present) or 'no such feature'}"
    if missing:
        counts = ", ".join(f"{feature}: {count} of {plan.num_shards} shards" for feature, count in missing.items())
        return f"{root}: the cache is not finished ({counts} missing); run {encode} with the same models"
    choices = "".join(f" --feature {feature}={beginning}" for feature, beginning in wanted.items())
    reason = "of these features" if snapshots else "yet"
    return f"{root}: no snapshot {reason}; write one: `mimir-precompute finalize {root}{choices}`"
