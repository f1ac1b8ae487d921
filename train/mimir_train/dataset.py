"""Batches of a cache for trainers of others: a torch IterableDataset whose order nothing disturbs.

dataset = open_cache("CACHE").dataset(global_batch_size=8, seed=42, rank=0, world_size=1)
for batch in DataLoader(dataset, batch_size=None):
    batch["vae_moments"], batch["t5_embeds"], batch["t5_embeds_lengths"], batch["keys"]
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from mimir_shared.errors import InputError
from mimir_shared.features import FeatureName
from mimir_train.cache_reader import Cache
from mimir_train.order.clip_order import TrainingOrder, check_batch_sizes
from mimir_train.reading.batch_layout import TensorRequest
from mimir_train.reading.step_reader import ReadOptions, StepBatch, StepReader

Batch = dict[str, Tensor | list[str] | int | str]
"""name → tensor (B, …), and of tensors that may be padded name_lengths → (B,); keys, captions, bucket, step, epoch."""


class CacheDataset(IterableDataset[Batch]):
    """One rank's batches. An iteration is an epoch, or what is left of it; the next goes on with the next epoch."""

    def __init__(
        self, cache: Cache, order: TrainingOrder, features: Sequence[FeatureName], options: ReadOptions, *,
        rank: int, world_size: int,
    ) -> None:  # fmt: skip
        self._cache = cache
        self._order = order
        self._rank = rank
        self._world_size = world_size
        self._options = options
        self._requests = [
            TensorRequest(feature=feature, name=tensor.name)
            for feature in features
            for tensor in cache.column(feature).tensors
        ]
        self._next_step = 0

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self._order.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        """Raises: InputError in a DataLoader with workers; CacheError and MachineError as training does."""
        worker = get_worker_info()
        if worker is not None:
            raise InputError(
                f"a CacheDataset reads by threads of its own, and each of {worker.num_workers} DataLoader workers "
                f"would read every batch: give DataLoader(dataset, batch_size=None, num_workers=0)"
            )
        per_epoch = self._order.steps_per_epoch
        stop = (self._next_step // per_epoch + 1) * per_epoch
        with StepReader(
            self._cache, self._order, self._requests, self._options, rank=self._rank, world_size=self._world_size
        ) as reader:
            for batch in reader.steps(self._next_step, stop):
                self._next_step = batch.step + 1
                yield self._as_document(batch)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch will be found; scalars alone. Batches count when they were handed out."""
        return {"snapshot": self._cache.snapshot.digest, "order": self._order.state(self._next_step)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the last batch of another run of this order, on any number of ranks.

        Raises: InputError naming what differs, where the state is of another cache, seed, batch size or order, or
            is none of ours.
        """
        order = state.get("order")
        if "snapshot" not in state or not isinstance(order, Mapping) or "next_step" not in order:
            got = ", ".join(state) or "nothing"
            raise InputError(f"this is no state of such a dataset: expected `snapshot` and `order`, got {got}")
        expected = {"snapshot": self._cache.snapshot.digest, **self._order.state(int(order["next_step"]))}
        given = {"snapshot": state["snapshot"], **order}
        different = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
        if different:
            told = "; ".join(f"{name}: {given.get(name)} → {expected.get(name)}" for name in different)
            raise InputError(
                f"the state is of another order of clips ({told}); give the settings that it was made with"
            )
        self._next_step = int(order["next_step"])

    def _as_document(self, batch: StepBatch) -> Batch:
        clips = [self._cache.clip(number) for number in batch.numbers]
        return {
            **batch.host.tensors,
            **{f"{name}_lengths": lengths for name, lengths in batch.host.lengths.items()},
            "keys": [clip.key for clip in clips],
            "captions": [clip.caption for clip in clips],
            "bucket": batch.bucket,
            "step": batch.step,
            "epoch": batch.epoch,
        }


def build_dataset(
    cache: Cache, *, global_batch_size: int, seed: int, rank: int, world_size: int, features: Sequence[FeatureName],
    held_out: Sequence[int], shards_per_block: int, options: ReadOptions,
) -> CacheDataset:  # fmt: skip
    """As Cache.dataset. Raises InputError where rank, batch and world size do not fit."""
    if not 0 <= rank < world_size:
        raise InputError(f"rank {rank} of {world_size}: ranks are numbered from 0 to {world_size - 1}")
    check_batch_sizes(global_batch_size, world_size, None)
    order = TrainingOrder(
        cache.buckets(held_out), seed=seed, global_batch_size=global_batch_size, shards_per_block=shards_per_block
    )
    return CacheDataset(cache, order, features, options, rank=rank, world_size=world_size)
