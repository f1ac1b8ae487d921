"""A cache, open for training. Torch is imported only where tensors are asked for.

cache = open_cache("CACHE")
cache["clip-17"]["vae_moments"]              # (2C, T, h, w) bfloat16
cache.dataset(global_batch_size=8, seed=42)  # an IterableDataset: ordered, sharded over ranks, resumable
"""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np

from mimir_shared.features import FeatureName
from mimir_shared.snapshot_reader import SnapshotReader, find_snapshot
from mimir_shared.storage.open import DEFAULT_LOCAL_CACHE_GB
from mimir_shared.wording import noun_for
from mimir_train.order.clip_order import DEFAULT_SHARDS_PER_BLOCK, BucketShards, ClipPlace

if TYPE_CHECKING:
    from torch import Tensor

    from mimir_train.dataset import CacheDataset
    from mimir_train.reading.step_reader import ReadOptions

NEEDED: Final[tuple[FeatureName, ...]] = ("latents", "t5")
"""Without these there is nothing to train on; `llm` is needed by some fusers only."""


class Cache(SnapshotReader):
    """A snapshot as training sees it: clips by bucket and place, tensors of torch, batches in order."""

    def buckets(self, held_out: Collection[int] = ()) -> tuple[BucketShards, ...]:
        """The clips of each bucket, but for those in the shards that are held out; by name."""
        found = []
        for name, (shards, _, sizes) in self._shards_of_bucket.items():
            kept = [(int(s), int(n)) for s, n in zip(shards, sizes, strict=True) if int(s) not in held_out]
            if kept:
                found.append(BucketShards(name=name, shards=tuple(s for s, _ in kept), sizes=tuple(n for _, n in kept)))
        return tuple(found)

    def clip_number(self, bucket: str, place: ClipPlace) -> int:
        """The index number of a clip that an order names."""
        first = self._first_of_shard[bucket][place.shard]
        number: int = self.clips.numbers_of_bucket[bucket].item(first + place.number)
        assert self.clips.shards.item(number) == place.shard, f"{place} of {bucket}"
        return number

    def clip_numbers(self, bucket: BucketShards) -> list[int]:
        """The index numbers of all clips of a bucket, by shard and row."""
        return [
            self.clip_number(bucket.name, ClipPlace(shard=shard, number=number))
            for shard, size in zip(bucket.shards, bucket.sizes, strict=True)
            for number in range(size)
        ]

    def __getitem__(self, key: str) -> "dict[str, Tensor]":
        """All tensors of a clip by name, in memory of their own; bfloat16 bit for bit.

        Raises: InputError for an unknown key; CacheError and MachineError as `read`.
        """
        from mimir_train.tensors import to_tensor

        return {name: to_tensor(stored) for name, stored in self.sample(key).items()}

    def dataset(
        self,
        global_batch_size: int,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
        *,
        features: Sequence[FeatureName] | None = None,
        held_out: Sequence[int] = (),
        shards_per_block: int = DEFAULT_SHARDS_PER_BLOCK,
        options: "ReadOptions | None" = None,
    ) -> "CacheDataset":
        """Batches in the order of training, as a torch IterableDataset with state_dict() and load_state_dict().

        Args:
            global_batch_size: clips of a step over all ranks; each rank gets its share.
            features: to read; None: all of the snapshot that have tensors.
            held_out: shards that are left out.
            options: checksums, threads, steps read ahead, what becomes of bad clips, and `borrow`: batches that are
                overwritten when the next one is asked for, in place of memory that is left alone while it is in use.
        Raises: InputError where rank, batch and world size do not fit.
        """
        from mimir_train.dataset import build_dataset
        from mimir_train.reading.step_reader import ReadOptions

        return build_dataset(
            self, global_batch_size=global_batch_size, seed=seed, rank=rank, world_size=world_size,
            features=self.features if features is None else features, held_out=held_out,
            shards_per_block=shards_per_block, options=options or ReadOptions(),
        )  # fmt: skip

    @cached_property
    def _first_of_shard(self) -> dict[str, dict[int, int]]:
        """bucket → shard → where its clips begin in the numbers of the bucket's clips."""
        return {
            name: dict(zip(shards.tolist(), first.tolist(), strict=True))
            for name, (shards, first, _) in self._shards_of_bucket.items()
        }

    @cached_property
    def _shards_of_bucket(self) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """bucket → its shards, rising; where each begins in the numbers of its clips; how many clips each has."""
        return {
            name: np.unique(self.clips.shards[numbers], return_index=True, return_counts=True)
            for name, numbers in self.clips.numbers_of_bucket.items()
        }


def open_cache(
    location: str,
    wanted: Mapping[str, str] | None = None,
    *,
    snapshot: str | None = None,
    local_cache_dir: str | None = None,
    local_cache_gb: float = DEFAULT_LOCAL_CACHE_GB,
) -> Cache:
    """Open the newest snapshot of a cache that can be trained on.

    Args:
        location: a folder, or s3://, gs:// or az:// with bucket and prefix.
        wanted: feature → beginning of its fingerprint, where the cache has a feature more than once.
        snapshot: digest (or its beginning) of the one to open instead.
        local_cache_dir: folder that keeps what is read from a bucket, with at most `local_cache_gb` 10^9 bytes.
    Raises: InputError where there is none, saying what to run, and where the cache has a feature more than once and
        neither `wanted` nor `snapshot` says which; CacheError where it is damaged, or where the snapshot asked for is
        gone; MachineError where a bucket cannot be read.
    """
    found = find_snapshot(
        location, wanted or {}, snapshot=snapshot, needed=NEEDED, local_cache_dir=local_cache_dir,
        local_cache_gb=local_cache_gb,
    )  # fmt: skip
    return Cache(*found)


def newer_plan(cache: Cache) -> str | None:
    """Say so where clips were planned since the snapshot that are not part of it."""
    plans = [name for name in cache.storage.list("plan") if name.endswith(".parquet")]
    later = len(plans) - len(cache.snapshot.plans)
    if later <= 0:
        return None
    return (
        f"{cache.storage.root}: {later} plan {noun_for(later, 'file')} came after snapshot "
        f"{cache.snapshot.digest[:12]}; to train on their clips too: "
        f"`mimir-precompute encode --cache {cache.storage.root} --shards all`"
    )
