"""The order of packs: every clip once an epoch, within the budget, for any world size, from any step on, for ever."""

import json
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimir_shared.errors import InputError
from mimir_train.order.clip_order import BucketShards, ClipPlace
from mimir_train.order.packs import PackedOrder, plan_packs
from tests.train.order.test_order import SEEDS, SIZES, bucket

TOKENS = {"video": 17, "image": 5, "short": 8}


def order_of(
    *buckets: BucketShards,
    seed: int = 0,
    packs: int = 2,
    budget: int = 40,
    block: int = 3,
    tokens: dict[str, int] = TOKENS,
) -> PackedOrder:
    return PackedOrder(buckets, tokens, seed=seed, packs_per_step=packs, tokens_per_pack=budget, shards_per_block=block)


def packs_of_epoch(order: PackedOrder, epoch: int = 0) -> list[list[tuple[str, ClipPlace]]]:
    """The clips of each pack, in the order in which they are trained on."""
    found = []
    for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
        batch = order.batch(step)
        assert (batch.epoch, batch.step, batch.bucket) == (epoch, step, "packed")
        clips = list(zip(batch.buckets, batch.places, strict=True))
        found += [[clips[position] for position in pack] for pack in order.packs_of(step)]
    return found


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    tokens=st.lists(st.integers(1, 30), min_size=4, max_size=4),
    budget=st.integers(30, 100),
)
def test_every_clip_is_put_into_a_pack_that_holds_it(counts: list[int], tokens: list[int], budget: int) -> None:
    tokens = tokens[: len(counts)]
    kinds = plan_packs(counts, tokens, budget)
    assert [sum(kind.count * kind.clips[b] for kind in kinds) for b in range(len(counts))] == counts
    for kind in kinds:
        assert kind.count > 0
        assert 0 < sum(n * t for n, t in zip(kind.clips, tokens, strict=True)) <= budget


@settings(max_examples=60, deadline=None)
@given(
    sizes=SIZES, more=SIZES, seed=SEEDS, packs=st.integers(1, 5), budget=st.integers(17, 90), epoch=st.integers(0, 3)
)
def test_an_epoch_shows_every_clip_once_but_for_packs_left_over(
    sizes: list[int], more: list[int], seed: int, packs: int, budget: int, epoch: int
) -> None:
    buckets = [bucket("video", sizes), bucket("image", more)]
    kinds = plan_packs([b.num_clips for b in buckets], [TOKENS[b.name] for b in buckets], budget)
    if sum(kind.count for kind in kinds) < packs:
        with pytest.raises(InputError, match="fewer than one step takes"):
            order_of(*buckets, seed=seed, packs=packs, budget=budget)
        return
    order = order_of(*buckets, seed=seed, packs=packs, budget=budget)
    shown = packs_of_epoch(order, epoch)
    seen = Counter(clip for pack in shown for clip in pack)
    assert max(seen.values()) == 1
    possible = {
        (b.name, ClipPlace(shard=s, number=n))
        for b in buckets
        for s, size in zip(b.shards, b.sizes, strict=True)
        for n in range(size)
    }
    assert set(seen) <= possible
    assert len(possible) - len(seen) == order.left_over(epoch)
    assert order.num_packs - len(shown) == order.num_packs % packs
    for pack in shown:
        assert sum(TOKENS[name] for name, _ in pack) <= budget


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12, 24])
def test_ranks_share_the_same_packs_whatever_their_number(world_size: int) -> None:
    order = order_of(bucket("video", [40, 60, 30]), bucket("image", [50, 70]), packs=24)
    for step in range(order.steps_per_epoch):
        shares = [order.parts(step, rank, world_size) for rank in range(world_size)]
        assert {len(share) for share in shares} == {24 // world_size}, "each rank runs the model equally often"
        assert [pack for share in shares for pack in share] == order.packs_of(step)
        positions = [position for share in shares for pack in share for position in pack]
        assert positions == list(range(order.num_clips(step)))
        assert all(sum(map(len, share)) <= order.most_clips(world_size) for share in shares)
        whole = order.batch(step)
        for share in shares:
            part = order.batch(step, [position for pack in share for position in pack])
            assert part.places == whole.places[share[0].start : share[-1].stop]
            assert part.buckets == whole.buckets[share[0].start : share[-1].stop]


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, seed=SEEDS, start=st.integers(0, 60))
def test_an_order_begun_at_any_step_goes_on_alike(sizes: list[int], seed: int, start: int) -> None:
    buckets = [bucket("video", sizes), bucket("image", [9, 9])]
    whole = order_of(*buckets, seed=seed)
    expected = [(whole.batch(step), whole.packs_of(step)) for step in range(start + 5)][start:]
    resumed = order_of(*buckets, seed=seed)
    assert [(resumed.batch(step), resumed.packs_of(step)) for step in range(start, start + 5)] == expected


def test_any_step_of_a_long_training_costs_as_little_as_the_first() -> None:
    """No list of clips is made: half a million clips in 2,000 shards, asked for in a far epoch."""
    order = order_of(bucket("video", [200] * 2000), bucket("image", [56] * 2000), block=32, packs=8)
    far = 1000 * order.steps_per_epoch + order.steps_per_epoch // 2
    assert order.batch(far).epoch == 1000
    assert all(len(sequence._entered) <= 16 for sequence in order._sequences._made.values())


def test_the_budget_is_filled_with_the_largest_clips_first_and_small_ones_beside_them() -> None:
    order = order_of(bucket("video", [5]), bucket("image", [4]), packs=1)
    packs = sorted(tuple(sorted(name for name, _ in pack)) for pack in packs_of_epoch(order))
    assert packs == [("image", "image", "video"), ("image", "video", "video"), ("image", "video", "video")]
    assert order.fill == (5 * 17 + 4 * 5) / (3 * 40)


def test_buckets_and_shards_are_mixed_over_the_epoch() -> None:
    order = order_of(bucket("video", [100] * 4), bucket("short", [100] * 4), budget=17)
    kinds = [pack[0][0] for pack in packs_of_epoch(order)]
    changes = sum(one != other for one, other in pairwise(kinds))
    assert 150 < changes < 400  # of packs of one video or of two short clips; one kind after the other would give 1


def test_epochs_and_seeds_have_packs_of_their_own() -> None:
    buckets = bucket("video", [50] * 20), bucket("image", [50] * 20)
    first = packs_of_epoch(order_of(*buckets))
    for other in (packs_of_epoch(order_of(*buckets), 1), packs_of_epoch(order_of(*buckets, seed=1))):
        assert sum(one == another for one, another in zip(first, other, strict=True)) < 5
        together = [{frozenset(pack) for pack in packs if len(pack) > 1} for packs in (first, other)]
        assert len(together[0] & together[1]) < 5, "other clips share a sequence"


def test_clips_of_a_pack_come_from_one_block_of_shards_of_each_bucket() -> None:
    order = order_of(bucket("image", [100] * 40), budget=100, packs=1, block=4)
    shards = [{place.shard for _, place in pack} for pack in packs_of_epoch(order)]
    assert sum(len(found) for found in shards) / len(shards) > 3, "mixed within the block"
    assert sum(len(found) > 4 for found in shards) <= 10, "a pack may stretch over the border of two blocks"


def test_the_state_is_a_handful_of_scalars() -> None:
    state = order_of(bucket("video", [8] * 1000)).state(123)
    assert state["next_step"] == 123
    assert len(json.dumps(state)) < 200
    assert all(isinstance(value, int) for value in state.values())


def test_a_pack_smaller_than_a_clip_names_the_clip() -> None:
    with pytest.raises(InputError, match=r"--tokens-per-pack 16: a clip of video has 17 tokens .*; give at least 17"):
        order_of(bucket("image", [9]), bucket("video", [9]), budget=16)


def test_fewer_packs_than_a_step_takes_are_refused() -> None:
    message = r"--global-batch-size 9: the 4 training clips make 2 packs of 40 tokens, fewer than one step takes"
    with pytest.raises(InputError, match=message):
        order_of(bucket("video", [4]), packs=9)


def test_no_clip_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="the 0 training clips make 0 packs of 40 tokens"):
        order_of()


def test_fill_and_what_is_left_over_are_told() -> None:
    order = order_of(bucket("video", [5]), bucket("image", [4]), packs=2)
    first, second = order.describe()
    assert first == (
        "9 clips in 2 buckets make 3 packs of 3 clips, 87.5% of 40 tokens on average and none of them to fill up; "
        "1 step of 2 packs an epoch"
    )
    assert second == "left over in every epoch, other ones each time: 1 pack, with 3 clips in the first"


def test_a_stand_in_is_of_the_bucket_of_the_clip() -> None:
    order = order_of(bucket("video", [20]), bucket("image", [3, 4]), packs=3)
    for step in range(order.steps_per_epoch):
        batch = order.batch(step)
        for position, name in enumerate(batch.buckets):
            stand_ins = [order.substitute(step, position, attempt) for attempt in (1, 2, 3)]
            assert len({place.number for place in stand_ins}) > 1 or name == "image"
            assert {place.shard for place in stand_ins} <= set({"video": [0], "image": [0, 3]}[name])


def test_packs_never_change_between_releases() -> None:
    """Changed packs would make a run that goes on see clips twice and others never: raise PACK_SCHEME instead."""
    order = order_of(bucket("video", [7, 3, 11]), bucket("image", [4, 6, 2]), seed=42, block=2)
    assert (order.num_packs, order.steps_per_epoch) == (11, 5)
    found = []
    for step in range(14):
        batch = order.batch(step)
        clips = [f"{b[0]}{p.shard}:{p.number}" for b, p in zip(batch.buckets, batch.places, strict=True)]
        found.append(" | ".join(" ".join(clips[pack.start : pack.stop]) for pack in order.packs_of(step)))
    assert found == GOLDEN


GOLDEN = [
    "v6:7 v6:4 i0:3 | v0:6 v0:1 i3:0",
    "v6:0 v6:8 i0:0 | v0:5 i3:4 i3:1",
    "v6:2 v6:10 i0:1 | v0:0 v0:4 i3:3",
    "v6:9 v6:6 i3:5 | v3:1 v6:3 i6:0",
    "v6:1 v3:2 i6:1 | v0:2 v0:3 i3:2",
    "v6:6 v6:9 i0:3 | v6:3 v6:10 i0:0",
    "v3:1 v6:0 i3:4 | v6:1 v3:0 i3:1",
    "v3:2 v6:8 i0:2 | v0:4 v0:2 i3:0",
    "v0:6 v0:5 i3:2 | v6:2 v6:7 i3:5",
    "v6:5 v6:4 i0:1 | v0:0 i6:0 i6:1",
    "v0:2 v0:1 i3:3 | v3:0 v0:6 i3:4",
    "v6:2 v6:7 i3:1 | v6:6 v6:8 i6:0",
    "v6:0 v6:1 i3:2 | v0:5 v0:0 i3:0",
    "v0:4 v0:3 i6:1 | v6:3 v6:5 i0:3",
]
