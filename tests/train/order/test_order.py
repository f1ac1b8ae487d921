"""The order of the clips: exactly once an epoch, for any world size, from any step on, today as yesterday."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimir_shared.errors import InputError
from mimir_train.order.clip_order import (
    BucketShards,
    ClipPlace,
    TrainingOrder,
    check_batch_sizes,
    permutation,
    permute,
    rank_positions,
    splitmix64,
)

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=12)
SEEDS = st.integers(0, 2**63)


def bucket(name: str, sizes: list[int]) -> BucketShards:
    # numbers with gaps: a shard need not hold clips of every bucket
    return BucketShards(name=name, shards=tuple(3 * i for i in range(len(sizes))), sizes=tuple(sizes))


def order_of(*buckets: BucketShards, seed: int = 0, batch: int = 4, block: int = 3) -> TrainingOrder:
    return TrainingOrder(buckets, seed=seed, global_batch_size=batch, shards_per_block=block)


@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_a_keyed_permutation_hits_every_number_once(size: int, key: int) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_a_permutation_of_all_numbers_at_once_is_that_of_each(size: int, key: int) -> None:
    assert permutation(size, key).tolist() == [permute(i, size, key) for i in range(size)]


def test_splitmix64_gives_the_published_values() -> None:
    # the first outputs of the reference implementation for the seed 1234567: states are multiples of the gamma
    gamma, state = 0x9E3779B97F4A7C15, 1234567
    outputs = [splitmix64((state + i * gamma) % 2**64) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, more=SIZES, seed=SEEDS, batch=st.integers(1, 12), block=st.integers(1, 14), epoch=st.integers(0, 5))
def test_an_epoch_shows_every_clip_once_but_for_the_remainder(
    sizes: list[int], more: list[int], seed: int, batch: int, block: int, epoch: int
) -> None:
    buckets = [bucket("video", sizes), bucket("image", more)]
    if all(b.num_clips < batch for b in buckets):
        with pytest.raises(InputError):
            order_of(*buckets, batch=batch)
        return
    order = order_of(*buckets, seed=seed, batch=batch, block=block)
    first = epoch * order.steps_per_epoch
    batches = [order.batch(step) for step in range(first, first + order.steps_per_epoch)]
    assert {b.epoch for b in batches} == {epoch}
    seen = Counter((b.bucket, place) for b in batches for place in b.places)
    assert max(seen.values()) == 1
    for kept in order.buckets:
        shown = {place for name, place in seen if name == kept.name}
        possible = {
            ClipPlace(shard=s, number=n) for s, size in zip(kept.shards, kept.sizes, strict=True) for n in range(size)
        }
        assert shown <= possible
        assert len(possible) - len(shown) == order.dropped[kept.name] == kept.num_clips % batch
    left_out = {b.name for b in buckets if b.num_clips < batch}
    assert {b.name for b in order.left_out} == left_out
    assert not left_out & {name for name, _ in seen}


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, seed=SEEDS, start=st.integers(0, 60))
def test_an_order_begun_at_any_step_goes_on_alike(sizes: list[int], seed: int, start: int) -> None:
    batch = min(4, sum(sizes))
    whole = order_of(bucket("video", sizes), seed=seed, batch=batch)
    expected = [whole.batch(step) for step in range(start + 5)][start:]
    resumed = order_of(bucket("video", sizes), seed=seed, batch=batch)
    assert [resumed.batch(step) for step in range(start, start + 5)] == expected


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12, 24])
def test_ranks_share_the_same_global_batch_whatever_their_number(world_size: int) -> None:
    order = order_of(bucket("video", [10, 20, 30]), batch=24)
    for step in range(5):
        places = order.batch(step).places
        shares = [[places[i] for i in rank_positions(24, rank, world_size)] for rank in range(world_size)]
        assert [place for share in shares for place in share] == list(places)
        assert len({len(share) for share in shares}) == 1


def test_epochs_seeds_and_buckets_have_orders_of_their_own() -> None:
    sizes = [50] * 20

    def sequence(seed: int, epoch: int, name: str = "video") -> list[ClipPlace]:
        order = order_of(bucket(name, sizes), seed=seed, batch=100)
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        return [place for step in steps for place in order.batch(step).places]

    first = sequence(0, 0)
    for other in (sequence(0, 1), sequence(1, 0), sequence(0, 0, "image")):
        same = sum(a == b for a, b in zip(first, other, strict=True))
        assert same < 15, f"{same} of 1000 positions are alike; about one is expected"


def test_buckets_are_mixed_over_the_epoch() -> None:
    order = order_of(bucket("a", [200]), bucket("b", [200]), batch=4)
    names = [order.batch(step).bucket for step in range(order.steps_per_epoch)]
    assert names.count("a") == names.count("b") == 50
    changes = sum(x != y for x, y in pairwise(names))
    assert 30 < changes < 70  # half of 99 is expected of a fair mix; one after the other would give 1


def test_consecutive_clips_come_from_one_block_of_shards() -> None:
    order = order_of(bucket("video", [100] * 40), batch=100, block=4)
    sequence_of_shards = []
    for step in range(order.steps_per_epoch):
        sequence_of_shards.append({place.shard for place in order.batch(step).places})
    assert all(len(shards) <= 4 for shards in sequence_of_shards)
    assert all(len(shards) >= 3 for shards in sequence_of_shards)  # mixed within the block


def test_the_state_is_a_handful_of_scalars() -> None:
    state = order_of(bucket("video", [8] * 1000)).state(123)
    assert len(str(state)) < 200
    assert all(isinstance(value, int) for value in state.values())


def test_a_batch_larger_than_every_bucket_names_the_sizes() -> None:
    with pytest.raises(InputError, match=r"--global-batch-size 9 .*video has 8, image has 3.*at most 8"):
        order_of(bucket("video", [4, 4]), bucket("image", [3]), batch=9)


def test_remainders_and_left_out_buckets_are_told() -> None:
    assert order_of(bucket("video", [5]), bucket("image", [1]), batch=4).describe() == [
        "5 clips in 1 bucket, 1 step of 4 an epoch",
        "bucket video: 1 clip is left over in every epoch, other ones each time",
        "bucket image is left out: it has 1 clip, fewer than a batch of 4",
    ]
    lines = order_of(bucket("video", [4, 6]), bucket("image", [3]), batch=4).describe()
    assert any("bucket video: 2 clips are left over" in line for line in lines)
    assert any("bucket image is left out: it has 3 clips, fewer than a batch of 4" in line for line in lines)


@pytest.mark.parametrize(("batch", "world", "micro"), [(64, 3, None), (8, 2, 3), (2, 4, None)])
def test_a_batch_that_cannot_be_shared_out_names_valid_ones(batch: int, world: int, micro: int | None) -> None:
    with pytest.raises(InputError, match="multiple of") as caught:
        check_batch_sizes(batch, world, micro)
    unit = world * (micro or 1)
    valid = str(caught.value).split("for instance ")[1].split(";")[0]
    for size in valid.split(", "):
        assert int(size) % unit == 0
        check_batch_sizes(int(size), world, micro)


def test_the_order_never_changes_between_releases() -> None:
    """A changed order would make a run that goes on see clips twice and others never: raise SCHEME instead."""
    order = order_of(bucket("video", [7, 3, 11, 5, 9]), bucket("image", [4, 6, 2]), seed=42, batch=4, block=2)
    assert order.steps_per_epoch == 11
    found = []
    for step in range(32):
        batch = order.batch(step)
        found.append(f"{batch.bucket} {' '.join(f'{place.shard}:{place.number}' for place in batch.places)}")
    assert found == GOLDEN


GOLDEN = [
    "video 9:2 0:2 0:1 9:3",
    "video 12:4 6:6 12:0 6:2",
    "image 3:2 3:3 3:4 3:1",
    "video 12:2 12:5 6:3 6:4",
    "video 9:0 9:4 0:0 0:3",
    "video 12:6 12:8 6:1 6:10",
    "video 6:0 12:1 6:7 12:7",
    "image 6:1 6:0 3:5 3:0",
    "video 0:5 9:1 0:4 0:6",
    "video 6:8 6:5 12:3 6:9",
    "image 0:2 0:3 0:1 0:0",
    "video 0:1 0:3 9:1 6:10",
    "image 3:0 3:3 6:0 6:1",
    "image 3:4 0:3 3:1 3:2",
    "video 12:5 12:4 12:0 12:8",
    "video 6:3 6:7 12:7 12:6",
    "image 0:1 3:5 0:2 0:0",
    "video 6:9 6:2 9:3 6:0",
    "video 3:1 3:0 0:5 3:2",
    "video 0:2 0:4 0:6 0:0",
    "video 9:2 9:0 6:6 6:5",
    "video 6:4 9:4 6:8 6:1",
    "video 0:1 0:3 9:0 9:1",
    "video 6:8 6:10 6:3 6:5",
    "video 6:4 6:1 6:6 6:7",
    "image 3:0 6:1 3:3 3:4",
    "video 3:2 12:7 12:4 12:3",
    "video 12:2 3:0 12:1 12:8",
    "video 0:4 0:6 9:4 0:5",
    "video 9:2 0:2 9:3 0:0",
    "image 0:3 0:2 0:1 0:0",
    "video 12:5 12:6 3:1 12:0",
]
