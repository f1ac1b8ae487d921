"""Clips that cannot be read: the run ends by the first, or others stand in, the same for any number of ranks."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from mimir_shared.errors import CacheError
from mimir_train.cache_reader import Cache, open_cache
from mimir_train.loop import train
from mimir_train.order.clip_order import TrainingOrder
from mimir_train.reading.bad_samples import ALWAYS_ALLOWED, MAX_ATTEMPTS, BadSampleLog, find_bad_samples
from mimir_train.reading.batch_layout import TensorRequest
from mimir_train.reading.step_reader import ReadOptions, StepReader
from tests.train.caches import (
    IMAGE,
    VIDEO,
    build_cache,
    flipped_byte,
    losses_of,
    metrics_of,
    place_of,
    resumed_config,
    tiny_config,
)

BAD = (5, 11, 30)
"""Numbers of clips with a flipped byte."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("bad") / "cache", {VIDEO: 25, IMAGE: 18}, shard_size=6)


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Iterator[Path]:
    root = Path(shutil.copytree(whole, tmp_path / "copy"))
    cache = open_cache(str(root))
    with ExitStack() as stack:
        for number in BAD:
            stack.enter_context(flipped_byte(*place_of(cache, number)))
        yield root


def order_of(cache: Cache) -> TrainingOrder:
    return TrainingOrder(cache.buckets(), seed=5, global_batch_size=4)


def read(root: Path, world_size: int, steps: int) -> list[tuple[list[str], list[int], torch.Tensor]]:
    """Keys, stand-ins and latents of global batches, put together from what the ranks read."""
    found: list[tuple[list[str], list[int], torch.Tensor]] = [([], [], torch.empty(0)) for _ in range(steps)]
    requests = [TensorRequest(feature="latents", name="vae_moments"), TensorRequest(feature="t5", name="t5_embeds")]
    for rank in range(world_size):
        cache = open_cache(str(root))
        options = ReadOptions(on_bad_sample="substitute", threads=1 + rank)
        with StepReader(cache, order_of(cache), requests, options, rank=rank, world_size=world_size) as reader:
            for batch in reader.steps(0, steps):
                keys, attempts, latents = found[batch.step]
                moments = batch.host.tensors["vae_moments"].flatten()
                found[batch.step] = (
                    keys + [cache.clip(number).key for number in batch.numbers],
                    attempts + list(batch.attempts),
                    torch.cat([latents, moments.float()]),
                )
    return found


def test_stand_ins_are_the_same_for_any_number_of_ranks(damaged: Path, whole: Path) -> None:
    cache = open_cache(str(damaged))
    order = order_of(cache)
    steps = 3 * order.steps_per_epoch
    alone = read(damaged, 1, steps)
    for world_size in (2, 4):
        for one, many in zip(alone, read(damaged, world_size, steps), strict=True):
            assert one[:2] == many[:2]
            assert torch.equal(one[2], many[2])
    bad_keys = {cache.clip(number).key for number in BAD}
    stood_in = 0
    for step, (keys, attempts, _) in enumerate(alone):
        planned = [cache.clip(cache.clip_number(order.batch(step).bucket, p)) for p in order.batch(step).places]
        assert not bad_keys & set(keys)
        assert {cache.clip(cache.number_of(key)).bucket for key in keys} == {order.batch(step).bucket}
        for clip, key, tried in zip(planned, keys, attempts, strict=True):
            assert (tried > 0) == (clip.key in bad_keys)
            assert (clip.key == key) == (tried == 0)
            stood_in += tried > 0
        found = find_bad_samples(cache, order, step, attempts)
        assert len(found) == sum(attempts)
        assert {sample.bad.key for sample in found} <= bad_keys
        assert all(sample.substitute.key == keys[sample.position] for sample in found)
    assert stood_in >= 2 * len(BAD)
    clean = read(whole, 1, steps)
    assert all(sum(attempts) == 0 for _, attempts, _ in clean)


def test_a_run_ends_by_a_bad_clip_unless_others_may_stand_in(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"`t5` of clip .* do not match the hash"):
        train(tiny_config(damaged, tmp_path / "run", data__global_batch_size=4, run__max_train_steps=20))
    # the run that ended so goes on with stand-ins
    settings = {"data__on_bad_sample": "substitute", "run__max_train_steps": 20, "data__global_batch_size": 4}
    train(tiny_config(damaged, tmp_path / "whole", **settings))
    lines = [json.loads(line) for line in (tmp_path / "whole/bad_samples.jsonl").read_text().splitlines()]
    cache = open_cache(str(damaged))
    assert {line["key"] for line in lines} == {cache.clip(number).key for number in BAD}
    for line in lines:
        clip = cache.clip(cache.number_of(line["key"]))
        assert (line["shard"], line["row"], line["source"]) == (clip.shard, clip.row, clip.source)
        assert line["substitute"] in cache
    told = {line["step"]: line["bad_samples"] for line in metrics_of(tmp_path / "whole") if "bad_samples" in line}
    assert sum(told.values()) == len(lines)
    assert told.keys() == {line["step"] for line in lines}
    # stopped and gone on with, it sees the same, and writes nothing down twice
    train(tiny_config(damaged, tmp_path / "parts", run__stop_at_step=9, **settings))
    train(resumed_config(tmp_path / "parts"), "latest")
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    name = "bad_samples.jsonl"
    assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_a_shard_that_is_gone_is_more_than_stand_ins_mend(whole: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "copy"))
    for number in (0, 8, 14):
        place_of(open_cache(str(root)), number, "latents")[0].unlink(missing_ok=True)
    config = tiny_config(root, tmp_path / "run", data__global_batch_size=4, data__on_bad_sample="substitute",
                         run__max_train_steps=60, run__checkpointing_steps=1)  # fmt: skip
    with pytest.raises(
        CacheError, match=r"1\d of \d+ reads of a clip failed.*, the last of .*data.max_bad_share, 0.01"
    ):
        train(config)
    assert (tmp_path / "run/bad_samples.jsonl").read_text().count("\n") > ALWAYS_ALLOWED


def test_a_cache_without_a_readable_clip_is_given_up(whole: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "copy"))
    for path in root.glob("t5/*/data/*.tar"):
        path.unlink()
    cache = open_cache(str(root))
    options = ReadOptions(on_bad_sample="substitute")
    request = TensorRequest(feature="t5", name="t5_embeds")
    with StepReader(cache, order_of(cache), [request], options, world_size=4) as reader:
        with pytest.raises(CacheError, match=rf"step 0: none of {MAX_ATTEMPTS} clips in a row could be read.*missing"):
            next(reader.steps(0, 1))


def test_few_bad_clips_of_many_are_borne(whole: Path) -> None:
    cache = open_cache(str(whole))
    log = BadSampleLog(cache, order_of(cache), max_share=0.01)
    for step in range(ALWAYS_ALLOWED):
        assert log.note(step, [0, 1, 0, 0]) == 1
    for step in range(ALWAYS_ALLOWED, 1000):
        assert log.note(step, [0, 0, 0, 0]) == 0
    for step in range(1000, 1030):
        log.note(step, [1, 0, 0, 0])
    with pytest.raises(CacheError, match=r"step 1030: 42 of 4166 reads of a clip failed") as caught:
        log.note(1030, [1, 1, 0, 0])
    assert caught.value.exit_code == 4


def test_a_clip_for_which_two_stand_ins_were_tried_counts_as_one_that_was_replaced(whole: Path, tmp_path: Path) -> None:
    cache = open_cache(str(whole))
    told: list[str] = []
    path = tmp_path / "bad_samples.jsonl"
    log = BadSampleLog(cache, order_of(cache), max_share=0.01, path=path, say=told.append)
    assert log.note(0, [0, 2, 0, 0]) == 2
    log.note(1, [0, 0, 0, 1])
    log.close()
    assert len(told) == 2  # at the first, and at the end
    assert told[1] == f"note: 2 of 8 clips could not be read, and others stood in for them; {path} lists them"
    log = BadSampleLog(cache, order_of(cache), max_share=0.01)
    with pytest.raises(CacheError, match=r"step 0: 16 of 24 reads of a clip failed, stand-ins' among them"):
        log.note(0, [2] * 8)
