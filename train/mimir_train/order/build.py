"""The order that settings and a cache make: batches of one bucket, or packs of a token budget."""

from collections.abc import Collection
from dataclasses import dataclass

from mimir_train.cache_reader import Cache
from mimir_train.config import TrainConfig
from mimir_train.order.clip_order import ClipOrder, TrainingOrder, check_batch_sizes
from mimir_train.order.packs import PackedOrder


@dataclass(frozen=True, kw_only=True)
class OrderSettings:
    """What decides which clip is trained on when, besides the cache."""

    seed: int
    global_batch_size: int
    """Clips of a step, or packs of it where `tokens_per_pack` is given; over all ranks."""
    shards_per_block: int
    tokens_per_pack: int | None = None
    patch_size: int = 2
    """Of the transformer: it decides how many tokens a clip has."""


def order_settings(config: TrainConfig) -> OrderSettings:
    """Those of a run whose transformer is settled."""
    return OrderSettings(
        seed=config.run.seed,
        global_batch_size=config.data.global_batch_size,
        shards_per_block=config.data.shards_per_block,
        tokens_per_pack=config.data.tokens_per_pack,
        patch_size=config.model.transformer.patch_size,
    )


def build_order(
    cache: Cache, settings: OrderSettings, *, held_out: Collection[int], world_size: int, micro_batch_size: int | None
) -> ClipOrder:
    """Raises: InputError for a batch that fits neither the ranks nor any bucket, and for packs too small for a clip."""
    buckets = cache.buckets(held_out)
    if settings.tokens_per_pack is None:
        check_batch_sizes(settings.global_batch_size, world_size, micro_batch_size)
        return TrainingOrder(
            buckets,
            seed=settings.seed,
            global_batch_size=settings.global_batch_size,
            shards_per_block=settings.shards_per_block,
        )
    check_batch_sizes(settings.global_batch_size, world_size, None)
    return PackedOrder(
        buckets,
        tokens_of_clips(cache, settings.patch_size),
        seed=settings.seed,
        packs_per_step=settings.global_batch_size,
        tokens_per_pack=settings.tokens_per_pack,
        shards_per_block=settings.shards_per_block,
    )


def tokens_of_clips(cache: Cache, patch_size: int) -> dict[str, int]:
    """bucket → tokens of a clip with its text.

    The stabilizer's tokens count wherever the cache has them, used or not: so that all fusers see the same packs.
    """
    from mimir_train.batch import find_layout  # torch comes with it

    layout = find_layout(cache, llm="llm" in cache.snapshot.features)
    num_text_tokens = layout.t5_rows + (layout.num_instructions or 0)
    return {
        bucket: num_text_tokens + frames * (height // patch_size) * (width // patch_size)
        for bucket, (frames, height, width) in layout.latent_sizes.items()
    }
