"""The reader for trainers of others: ten lines, one epoch an iteration, and a state that goes on anywhere."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from mimir_shared.errors import CacheError, InputError
from mimir_train.cache_reader import Cache, open_cache
from mimir_train.dataset import Batch
from mimir_train.reading.step_reader import ReadOptions
from tests.train.caches import IMAGE, VIDEO, build_cache, flipped_byte, place_of
from tests.train.naive_reader import bits, read_cache, stack

WORLDS = (1, 2, 3, 4, 6, 8, 12, 24)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("dataset") / "cache", {VIDEO: 83, IMAGE: 59}, shard_size=9)


@pytest.fixture
def cache(root: Path) -> Cache:
    return open_cache(str(root))


def keys_of(batch: Batch) -> list[str]:
    keys = batch["keys"]
    assert isinstance(keys, list)
    return keys


def test_a_clip_is_read_by_its_key(root: Path, cache: Cache) -> None:
    naive = read_cache(root)
    for key in list(cache)[::17]:
        found = cache[key]
        assert found.keys() == naive[key].keys()
        assert all(torch.equal(bits(found[name]), bits(tensor)) for name, tensor in naive[key].items())
        assert found["vae_moments"].dtype == torch.bfloat16
    found["t5_ids"][:] = 7
    assert not torch.equal(cache[key]["t5_ids"], found["t5_ids"])  # a copy


def test_batches_hold_every_tensor_of_the_features_asked_for(root: Path, cache: Cache) -> None:
    naive = read_cache(root)
    loader = DataLoader(cache.dataset(8, seed=1), batch_size=None, num_workers=0)
    batches = list(loader)
    assert len(batches) == len(loader) == 17
    for batch in batches:
        for name in ("vae_moments", "t5_embeds", "t5_ids", "query_hidden", "answer_hidden_0", "instruction_hidden_0"):
            expected = stack([naive[key][name] for key in keys_of(batch)])
            assert torch.equal(bits(batch[name]), bits(expected))
        lengths = [len(naive[key]["query_hidden"]) for key in keys_of(batch)]
        assert batch["query_hidden_lengths"].tolist() == lengths
        assert len(batch["captions"]) == 8
    only_t5 = next(iter(cache.dataset(8, features=["t5"])))
    assert {name for name, value in only_t5.items() if torch.is_tensor(value)} == {"t5_embeds", "t5_ids", "t5_offsets"}


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_ranks_and_threads_emits_the_same_clips_in_the_same_order(cache: Cache, threads: int) -> None:
    def emitted(world_size: int) -> list[list[str]]:
        """Of each step, the keys in the order of the ranks."""
        options = ReadOptions(threads=threads, prefetch=threads)
        ranks = [
            cache.dataset(24, seed=9, rank=rank, world_size=world_size, features=["t5"], options=options)
            for rank in range(world_size)
        ]
        steps: list[list[str]] = []
        for _ in range(3):  # epochs
            for batches in zip(*ranks, strict=True):
                assert len({batch["step"] for batch in batches}) == 1
                steps.append([key for batch in batches for key in keys_of(batch)])
        return steps

    alone = emitted(1)
    assert len(alone) == 3 * 5
    for epoch in range(3):
        keys = [key for step in alone[5 * epoch : 5 * epoch + 5] for key in step]
        assert len(keys) == len(set(keys)) == 24 * 5  # none twice
    assert alone[:5] != alone[5:10]
    for world_size in WORLDS[1:]:
        assert emitted(world_size) == alone


def test_a_run_that_is_resumed_again_and_again_on_other_ranks_emits_what_an_unbroken_one_does(root: Path) -> None:
    def run(hops: list[tuple[int, int]], *, forget: bool = False) -> list[str]:
        """Keys in the order in which they were emitted, for (world size, steps) of each hop."""
        emitted = []
        state = None
        for world_size, steps in hops:
            cache = open_cache(str(root))
            ranks = [
                cache.dataset(24, seed=4, rank=r, world_size=world_size, features=["t5"]) for r in range(world_size)
            ]
            for dataset in ranks:
                if state is not None:
                    dataset.load_state_dict(json.loads(state))
            left = steps
            while left:
                for batches in zip(*ranks, strict=True):
                    emitted += [key for batch in batches for key in keys_of(batch)]
                    left -= 1
                    if not left:
                        break
            states = {json.dumps(dataset.state_dict()) for dataset in ranks}
            assert len(states) == 1
            state = states.pop()
            assert len(state) < 1000
            if forget:  # as a state that counts what was read, not what was trained on
                broken = json.loads(state)
                broken["order"]["next_step"] += 1
                state = json.dumps(broken)
        return emitted

    whole = run([(1, 23)])
    hops = [(8, 3), (2, 1), (1, 4), (24, 2), (4, 7), (12, 5), (3, 1)]
    assert run(hops) == whole
    broken = run(hops, forget=True)
    assert len(broken) == len(whole)
    assert broken != whole


def test_an_iteration_that_is_left_goes_on_with_the_next_batch(cache: Cache) -> None:
    dataset = cache.dataset(8, features=["t5"])
    steps = []
    for batch in dataset:
        steps.append(batch["step"])
        if batch["step"] == 4:
            break
    steps += [batch["step"] for batch in dataset]
    assert steps == list(range(17))
    assert next(iter(dataset))["epoch"] == 1


@pytest.mark.parametrize("change", [{"seed": 2}, {"global_batch_size": 16}, {"shards_per_block": 3}])
def test_a_state_of_another_order_is_refused(cache: Cache, change: dict[str, int]) -> None:
    settings = {"global_batch_size": 8, "seed": 1, **change}
    state = cache.dataset(8, seed=1).state_dict()
    with pytest.raises(InputError, match=rf"another order of clips \({next(iter(change))}: "):
        cache.dataset(**settings).load_state_dict(state)  # type: ignore[arg-type]
    state["snapshot"] = "0" * 64
    with pytest.raises(InputError, match="snapshot: 0000"):
        cache.dataset(8, seed=1).load_state_dict(state)


@pytest.mark.parametrize("state", [{}, {"step": 3}, {"snapshot": "0", "order": 3}, {"snapshot": "0", "order": {}}])
def test_what_is_no_state_is_refused(cache: Cache, state: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"no state of such a dataset: .* got {', '.join(state) or 'nothing'}"):
        cache.dataset(8).load_state_dict(state)


def test_workers_are_refused_aloud(cache: Cache) -> None:
    loader = DataLoader(cache.dataset(8), batch_size=None, num_workers=1)
    with pytest.raises(InputError, match="num_workers=0"):
        next(iter(loader))


def test_ranks_and_batches_that_do_not_fit_are_refused(cache: Cache) -> None:
    with pytest.raises(InputError, match="multiple of 3"):
        cache.dataset(8, rank=0, world_size=3)
    with pytest.raises(InputError, match="rank 2 of 2: ranks are numbered from 0 to 1"):
        cache.dataset(8, rank=2, world_size=2)


def test_a_bad_clip_is_an_error_or_replaced(root: Path, tmp_path: Path) -> None:
    cache = open_cache(str(shutil.copytree(root, tmp_path / "copy")))
    key = cache.clip(20).key
    with flipped_byte(*place_of(cache, 20)):
        with pytest.raises(CacheError, match=key):
            list(cache.dataset(4, features=["t5"]))
        options = ReadOptions(on_bad_sample="substitute")
        assert all(key not in keys_of(batch) for batch in cache.dataset(4, features=["t5"], options=options))
