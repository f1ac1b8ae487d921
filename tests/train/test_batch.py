"""Batches: what the cache holds, padded with masks, read ahead without a hang."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mimir_shared.errors import CacheError
from mimir_shared.features import FeatureTensor
from mimir_train.batch import (
    BatchLoader,
    FeatureLayout,
    TrainingBatch,
    clips_of_step,
    collate_text,
    find_layout,
    pad_to_torch,
    read_batch,
    read_empty_text,
    to_torch,
)
from mimir_train.cache_reader import Cache, open_cache
from mimir_train.config import AnswerVariant
from mimir_train.order.answer_variants import VariantChoice
from mimir_train.order.clip_order import TrainingOrder
from mimir_train.reading.step_reader import ReadOptions
from tests.train.caches import (
    CHANNELS,
    LLM_WIDTH,
    NUM_INSTRUCTIONS,
    T5_ROWS,
    T5_WIDTH,
    VIDEO,
    bf16,
    flipped_byte,
    make_feature,
)


@pytest.fixture
def cache(small_cache: Path) -> Cache:
    return open_cache(str(small_cache))


def loader_of(
    cache: Cache, layout: FeatureLayout, *, rank: int = 0, world_size: int = 1, **settings: object
) -> BatchLoader:
    order = TrainingOrder(cache.buckets(), seed=1, global_batch_size=8)
    options = ReadOptions(**settings)  # type: ignore[arg-type]
    return BatchLoader(cache, order, layout, rank=rank, world_size=world_size, options=options)


def read_step(loader: BatchLoader, step: int) -> TrainingBatch:
    (batch,) = loader.batches(step, step + 1)
    return batch


def test_bfloat16_is_taken_over_bit_for_bit() -> None:
    values = np.array([1.0, -2.5, 3e38, 1e-40, 0.0], np.float32)
    tensor = to_torch([bf16(values), bf16(values)])
    assert tensor.dtype == torch.bfloat16
    assert torch.equal(tensor[1], torch.from_numpy(values).to(torch.bfloat16))


def test_ragged_tensors_are_padded_with_zeros_and_masked() -> None:
    tensors = [bf16(np.full((rows, 3), rows, np.float32)) for rows in (2, 0, 5)]
    padded, mask = pad_to_torch(tensors)
    assert padded.shape == (3, 5, 3)
    assert mask.sum(dim=1).tolist() == [2, 0, 5]
    assert not padded[~mask].any()
    assert (padded[0, :2] == 2).all()
    nothing, none = pad_to_torch([FeatureTensor(np.zeros((0, 3), np.float32), "f32")])
    assert nothing.shape == (1, 1, 3)  # a row of zeros that is masked, for no tensor has no rows
    assert not none.any()


def test_the_layout_says_what_a_batch_is_made_of(cache: Cache) -> None:
    layout = find_layout(cache, llm=True)
    assert layout.latents == "vae_moments"
    assert layout.latent_channels == CHANNELS
    assert layout.latent_sizes == {VIDEO: (3, 8, 8)}
    assert (layout.t5_rows, layout.text_width) == (T5_ROWS, T5_WIDTH)
    assert (layout.llm_width, layout.num_instructions) == (LLM_WIDTH, NUM_INSTRUCTIONS)


def test_a_batch_holds_what_the_cache_holds(cache: Cache) -> None:
    layout = find_layout(cache, llm=True)
    numbers = [5, 17, 2]
    clips, latents, text = read_batch(cache, layout, numbers, verify=True)
    assert latents.shape == (3, 2 * CHANNELS, 3, 8, 8)
    assert text.t5_embeds.shape == (3, T5_ROWS, T5_WIDTH)
    assert text.llm is not None
    for i, number in enumerate(numbers):
        assert clips[i] == cache.clip(number)
        llm = make_feature("llm", clips[i].key, VIDEO).tensors
        queries, answers = to_torch([llm["query_hidden"]])[0], to_torch([llm["answer_hidden_0"]])[0]
        assert torch.equal(text.llm.query_hidden[i][text.llm.query_mask[i]], queries)
        assert torch.equal(text.llm.answer_hidden[i][text.llm.answer_mask[i]], answers)
        assert torch.equal(text.llm.instruction_hidden[i], to_torch([llm["instruction_hidden_0"]])[0])


@pytest.mark.parametrize("policy", ["fixed", "cycle", "random"])
def test_each_clip_is_read_with_the_answers_that_its_epoch_and_key_choose(cache: Cache, policy: AnswerVariant) -> None:
    layout = find_layout(cache, llm=True)
    choice = VariantChoice(policy=policy, seed=3, num_variants=layout.num_variants)
    order = TrainingOrder(cache.buckets(), seed=1, global_batch_size=8)
    seen: dict[str, list[int]] = {}
    for batch in BatchLoader(cache, order, layout, variants=choice).batches(0, 2 * order.steps_per_epoch):
        variants = choice.of(batch.epoch, [clip.key for clip in batch.clips])
        assert batch.text.llm is not None
        for i, (clip, variant) in enumerate(zip(batch.clips, variants, strict=True)):
            seen.setdefault(clip.key, []).append(variant)
            llm = make_feature("llm", clip.key, VIDEO).tensors
            answers = to_torch([llm[f"answer_hidden_{variant}"]])[0]
            assert torch.equal(batch.text.llm.answer_hidden[i][batch.text.llm.answer_mask[i]], answers)
            instructions = to_torch([llm[f"instruction_hidden_{variant}"]])[0]
            assert torch.equal(batch.text.llm.instruction_hidden[i], instructions)
    both = [set(variants) == {0, 1} for variants in seen.values() if len(variants) == 2]
    assert {"fixed": not any(both), "cycle": all(both), "random": any(both) and not all(both)}[policy], both


def test_tokens_are_laid_out_by_characters_alike_for_one_clip_and_for_many(cache: Cache) -> None:
    layout = find_layout(cache, llm=True, text_align="char_offset")
    _, _, together = read_batch(cache, layout, [5, 17, 2], verify=True)
    assert together.llm is not None
    assert together.llm.query_hidden.shape == (3, T5_ROWS, LLM_WIDTH)
    for i, number in enumerate([5, 17, 2]):
        t5, llm = cache.read(number, "t5"), cache.read(number, "llm")
        alone = collate_text([t5], [llm], t5_rows=T5_ROWS, text_align="char_offset")
        assert alone.llm is not None
        assert torch.equal(alone.llm.query_hidden[0], together.llm.query_hidden[i])
        # T5's tokens have two characters here and the LLM's three: the second of T5's lies on the first two of those
        want = torch.from_numpy(llm["query_hidden"].to_float32()[:2].mean(axis=0)).to(torch.bfloat16)
        assert torch.equal(alone.llm.query_hidden[0, 1], want)


def test_a_fuser_without_llm_does_not_read_it(cache: Cache) -> None:
    _, _, text = read_batch(cache, find_layout(cache, llm=False), [0], verify=True)
    assert text.llm is None


def test_the_empty_prompt_is_a_batch_of_one(cache: Cache) -> None:
    text = read_empty_text(cache, find_layout(cache, llm=True))
    assert text.t5_embeds.shape == (1, T5_ROWS, T5_WIDTH)
    assert text.llm is not None
    assert text.llm.instruction_hidden.shape == (1, NUM_INSTRUCTIONS, LLM_WIDTH)


def test_ranks_read_their_slices_of_the_global_batch(cache: Cache) -> None:
    layout = find_layout(cache, llm=True)
    (whole,) = loader_of(cache, layout).batches(3, 4)
    halves = [next(iter(loader_of(cache, layout, rank=rank, world_size=2).batches(3, 4))) for rank in (0, 1)]
    assert [*halves[0].clips, *halves[1].clips] == list(whole.clips)
    assert [*halves[0].positions, *halves[1].positions] == list(range(8))
    assert torch.equal(torch.cat([half.latents for half in halves]), whole.latents)
    order = TrainingOrder(cache.buckets(), seed=1, global_batch_size=8)
    assert clips_of_step(cache, order, 3) == whole.clips


def test_micro_batches_are_parts_in_order(cache: Cache) -> None:
    (whole,) = loader_of(cache, find_layout(cache, llm=True)).batches(0, 1)
    parts = list(whole.micro_batches(2))
    assert [clip for part in parts for clip in part.clips] == list(whole.clips)
    assert [position for part in parts for position in part.positions] == list(whole.positions)
    assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)
    assert all(part.text.llm is not None and len(part.text.llm.query_mask) == 2 for part in parts)


@pytest.mark.parametrize("prefetch", [1, 2, 7])
def test_reading_ahead_changes_no_batch(cache: Cache, prefetch: int) -> None:
    layout = find_layout(cache, llm=False)
    loader = loader_of(cache, layout, prefetch=prefetch)
    batches = list(loader.batches(1, 6))
    assert [batch.step for batch in batches] == [1, 2, 3, 4, 5]
    for batch in batches:
        assert torch.equal(batch.latents, read_step(loader, batch.step).latents)
        assert batch.epoch == batch.step // 3


def test_an_error_of_the_reading_thread_is_raised_at_its_batch(small_cache: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(small_cache, tmp_path / "copy"))
    cache = open_cache(str(root))
    loader = loader_of(cache, find_layout(cache, llm=False), prefetch=4)
    bad_clip = clips_of_step(cache, TrainingOrder(cache.buckets(), seed=1, global_batch_size=8), 2)[0]
    number = next(n for n in range(24) if cache.clip(n) == bad_clip)
    place = cache._index["t5"][number].as_py()["tensors"]["t5_embeds"]
    path = root / cache.snapshot.features["t5"].files[place["file"]]
    with flipped_byte(path, place["offset"]):
        batches = loader.batches(0, 6)
        assert [next(batches).step, next(batches).step] == [0, 1]
        with pytest.raises(CacheError, match=bad_clip.key):
            next(batches)


@pytest.mark.parametrize(("verify", "refused_at"), [("always", 2), ("first-epoch", 2), ("never", None)])
def test_reads_are_verified_as_asked(small_cache: Path, tmp_path: Path, verify: str, refused_at: int | None) -> None:
    root = Path(shutil.copytree(small_cache, tmp_path / "copy"))
    cache = open_cache(str(root))
    loader = loader_of(cache, find_layout(cache, llm=False), verify=verify)
    bad_clip = clips_of_step(cache, TrainingOrder(cache.buckets(), seed=1, global_batch_size=8), 2)[0]
    number = next(n for n in range(24) if cache.clip(n) == bad_clip)
    place = cache._index["t5"][number].as_py()["tensors"]["t5_embeds"]
    with flipped_byte(root / cache.snapshot.features["t5"].files[place["file"]], place["offset"]):
        if refused_at is None:
            assert len(list(loader.batches(0, 3))) == 3
        else:
            with pytest.raises(CacheError):
                read_step(loader, refused_at)
        if verify == "first-epoch":
            for step in (3, 4, 5):  # every clip again, in the second epoch
                read_step(loader, step)
