"""Which shards are kept back for validation."""

from mimir_shared.errors import InputError


def held_out_shards(wanted: int | None, num_shards: int) -> tuple[int, ...]:
    """The shards of the highest numbers; by default one in 50, at most 4.

    Raises: InputError where none would be left to train on.
    """
    count = min(4, num_shards // 50) if wanted is None else wanted
    if count >= num_shards:
        raise InputError(
            f"--validation-shards {count}: the cache has {num_shards} shards, and at least one must be trained on"
        )
    return tuple(range(num_shards - count, num_shards))
