"""Training on packs: the losses and gradients of clips alone, for any number of ranks, stopped and gone on with."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mimir_precompute.encoders.base import Encoded
from mimir_shared.errors import InputError, NonFiniteLossError
from mimir_train.batch import BatchLoader, TrainingBatch, find_layout, read_batch
from mimir_train.cache_reader import Cache, open_cache
from mimir_train.loop import train
from mimir_train.metrics.step_report import RankLoad, RankReport, StepReport, exchange, refuse_non_finite
from mimir_train.model.config import FUSERS, DiTConfig, FuserConfig
from mimir_train.model.fuser import TokenFuser
from mimir_train.objective import NoiseSchedule
from mimir_train.order.build import tokens_of_clips
from mimir_train.order.packs import PackedOrder
from mimir_train.reading.step_reader import ReadOptions
from mimir_train.trained_model import Objective, TrainedModel, clip_losses
from tests.train.caches import (
    CHANNELS,
    IMAGE,
    LLM_WIDTH,
    T5_WIDTH,
    VIDEO,
    bf16,
    build_cache,
    flipped_byte,
    make_feature,
    metrics_of,
    place_of,
    resumed_config,
    tiny_config,
)  # fmt: skip
from tests.train.cli.test_train_cli import call
from tests.train.model.test_dit import CONFIG_2B, CONFIG_5B, random_dit
from tests.train.ranks import train_on_ranks
from tests.train.test_loop import saved_by

pytestmark = pytest.mark.usefixtures("one_thread")

BUDGET = 150
"""Two clips of nine frames (60 tokens with their text) and an image (28), or five images."""

OBJECTIVE = Objective(schedule=NoiseSchedule.cogvideox(1.0), seed=3, latent_scaling_factor=0.7, text_dropout=0.3,
                      empty_text=None, precision="float32")  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clips of nine frames and 30 images."""
    return build_cache(tmp_path_factory.mktemp("mixed") / "cache", {VIDEO: 24, IMAGE: 30})


@pytest.fixture(scope="module")
def cache(root: Path) -> Cache:
    return open_cache(str(root))


def order_of(cache: Cache, packs: int = 4) -> PackedOrder:
    tokens = tokens_of_clips(cache, 2)
    return PackedOrder(cache.buckets(), tokens, seed=5, packs_per_step=packs, tokens_per_pack=BUDGET)


def batches(
    cache: Cache, steps: Sequence[int] = (0, 1), rank: int = 0, world_size: int = 1, **options: Any
) -> list[TrainingBatch]:
    loader = BatchLoader(cache, order_of(cache), find_layout(cache, llm=True), rank=rank, world_size=world_size,
                         options=ReadOptions(**options))  # fmt: skip
    return list(loader.batches(steps[0], steps[-1] + 1))


def trained_model(config: DiTConfig, stabilizer_start_step: int = 0) -> tuple[TrainedModel, FuserConfig]:
    """A model without a zero anywhere, so that no part is hidden from a comparison."""
    fuser = FuserConfig(switches=FUSERS["mimir"], t5_rms=1.0, text_width=T5_WIDTH, llm_width=LLM_WIDTH,
                        stabilizer_start_step=stabilizer_start_step)  # fmt: skip
    dit = random_dit(replace(config, in_channels=CHANNELS, out_channels=CHANNELS, text_embed_dim=T5_WIDTH))
    model = TrainedModel(dit, TokenFuser(fuser))
    for parameter in model.fuser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model, fuser


def alone(cache: Cache, batch: TrainingBatch, row: int) -> TrainingBatch:
    """One clip of a step as a batch of its own, read by itself."""
    number = cache.number_of(batch.clips[row].key)
    clips, latents, text = read_batch(cache, find_layout(cache, llm=True), [number], verify=True)
    return replace(
        batch, bucket=clips[0].bucket, clips=clips, positions=(batch.positions[row],), packs=(), latents=latents,
        text=text,
    )  # fmt: skip


# --- packs against clips alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("append_stabilizer", [False, True])
@pytest.mark.parametrize("config", [pytest.param(CONFIG_2B, id="sincos"), pytest.param(CONFIG_5B, id="rotary")])
def test_packs_train_as_their_clips_do_alone(cache: Cache, config: DiTConfig, append_stabilizer: bool) -> None:
    """Loss and gradients of a step, with its dropped texts, drawn posterior, noise and stratified timesteps."""
    model, fuser = trained_model(config, stabilizer_start_step=0 if append_stabilizer else 9)
    (batch,) = batches(cache, [1])
    assert len({clip.bucket for clip in batch.clips}) == 2
    assert len(list(batch.micro_batches(None))) == 4, "a pack at a time"

    def losses_and_gradients(parts: list[TrainingBatch]) -> tuple[list[float], list[torch.Tensor]]:
        model.zero_grad()
        losses = []
        for part in parts:
            loss = clip_losses(model, fuser, OBJECTIVE, part)
            (loss.sum() / batch.step_clips).backward()
            losses += loss.tolist()
        return losses, [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]

    packed, packed_gradients = losses_and_gradients(list(batch.micro_batches(None)))
    each, each_gradients = losses_and_gradients([alone(cache, batch, row) for row in range(len(batch.clips))])
    assert packed == pytest.approx(each, rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in each_gradients)
    for (name, _), got, wanted in zip(model.named_parameters(), packed_gradients, each_gradients, strict=True):
        assert (got - wanted).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("options", [{}, {"borrow": True, "prefetch": 3}])
def test_packs_hold_what_the_cache_holds(cache: Cache, options: dict[str, Any]) -> None:
    loader = BatchLoader(cache, order_of(cache), find_layout(cache, llm=True), options=ReadOptions(**options))
    for batch in loader.batches(0, 8):
        assert batch.bucket == "packed"
        assert len(batch.latents) == len(batch.clips) == batch.step_clips
        for clip, latents, t5 in zip(batch.clips, batch.latents, batch.text.t5_embeds, strict=True):
            stored = cache[clip.key]
            assert torch.equal(latents, stored["vae_moments"])
            assert torch.equal(t5, stored["t5_embeds"])


def test_every_token_that_the_transformer_sees_is_of_a_clip(cache: Cache) -> None:
    tokens = tokens_of_clips(cache, 2)
    assert tokens == {VIDEO: 8 + 4 + 3 * 16, IMAGE: 8 + 4 + 16}
    model, fuser = trained_model(CONFIG_5B)
    seen: list[int] = []
    model.dit.transformer_blocks[0].register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0].shape[:2].numel() + arguments[1].shape[:2].numel())
    )
    for batch in batches(cache, range(3)):
        for pack in batch.micro_batches(None):
            clip_losses(model, fuser, OBJECTIVE, pack)
            assert seen.pop() == sum(tokens[clip.bucket] for clip in pack.clips) <= BUDGET


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_read_the_packs_of_one(cache: Cache, world_size: int) -> None:
    for step, whole in enumerate(batches(cache)):
        shares = [batches(cache, rank=rank, world_size=world_size)[step] for rank in range(world_size)]
        assert [clip for share in shares for clip in share.clips] == list(whole.clips)
        assert [position for share in shares for position in share.positions] == list(whole.positions)
        assert {share.step_clips for share in shares} == {whole.step_clips}
        assert {len(share.packs) for share in shares} == {4 // world_size}


# --- runs ---------------------------------------------------------------------------------------------------------


def packed_config(cache: Path, run: Path, **settings: Any) -> Any:
    return tiny_config(cache, run, **{"data__tokens_per_pack": BUDGET, "data__global_batch_size": 4, **settings})


def test_a_run_on_packs_learns_and_tells_of_them(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(packed_config(root, tmp_path / "run", run__max_train_steps=40, data__validation_shards=1))
    told = capfd.readouterr().err
    assert re.search(r"\d+ clips in 2 buckets make \d+ packs of 2 to 5 clips", told)
    assert "of 150 tokens on average and none of them to fill up" in told
    lines = metrics_of(tmp_path / "run")
    losses = [line["loss"] for line in lines]
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])
    assert {line["bucket"] for line in lines} == {"packed"}
    assert all(0.5 < line["pack_fill"] <= 1 for line in lines)
    assert all(line["clips"] == pytest.approx(line["samples_per_s"] * line["step_s"]) for line in lines)
    assert "validation/loss" in lines[-1]


def test_ten_steps_on_packs_are_five_and_five_more_bit_for_bit(root: Path, tmp_path: Path) -> None:
    whole = train(packed_config(root, tmp_path / "whole"))
    train(packed_config(root, tmp_path / "parts", run__stop_at_step=5))
    rest = train(resumed_config(tmp_path / "parts"), "latest")
    expected, found = saved_by(whole), saved_by(rest)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_going_on_with_other_packs_is_refused(root: Path, tmp_path: Path) -> None:
    train(packed_config(root, tmp_path / "run", run__max_train_steps=2))
    with pytest.raises(InputError, match=r"data\.tokens_per_pack: 150 → 200"):
        train(resumed_config(tmp_path / "run", data__tokens_per_pack=200, run__max_train_steps=4), "latest")


def test_two_ranks_with_packs_give_the_losses_of_one_process(root: Path, tmp_path: Path) -> None:
    """Though one rank has more clips than the other in most steps."""
    train(packed_config(root, tmp_path / "one"))
    strategies = ("ddp", "fsdp")
    train_on_ranks(2, [packed_config(root, tmp_path / name, parallel__strategy=name) for name in strategies])
    expected, *found = (metrics_of(tmp_path / name) for name in ("one", *strategies))
    for line, other in chain.from_iterable(zip(expected, lines, strict=True) for lines in found):
        assert other["loss"] == pytest.approx(line["loss"], abs=1e-5)
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-3)
        assert (other["clips"], other["pack_fill"]) == (line["clips"], line["pack_fill"])


def test_stand_ins_in_packs_are_the_same_for_any_number_of_ranks(tmp_path: Path) -> None:
    cache = open_cache(str(build_cache(tmp_path / "cache", {VIDEO: 24, IMAGE: 30})))
    bad = cache.number_of(f"{IMAGE}-004")
    with flipped_byte(*place_of(cache, bad)):
        steps = range(order_of(cache).steps_per_epoch)
        whole = batches(cache, steps, on_bad_sample="substitute")
        halves = [batches(cache, steps, rank, 2, on_bad_sample="substitute") for rank in (0, 1)]
    tried = 0
    for step, batch in enumerate(whole):
        assert batch.clips == halves[0][step].clips + halves[1][step].clips
        assert batch.attempts == halves[0][step].attempts + halves[1][step].attempts
        tried += sum(batch.attempts)
        planned = order_of(cache).batch(step).buckets
        assert tuple(clip.bucket for clip in batch.clips) == planned
    assert tried >= 1


def test_a_non_finite_loss_in_a_pack_names_the_clip(tmp_path: Path) -> None:
    key = f"{VIDEO}-007"
    latents = make_feature("latents", key, VIDEO).tensors["vae_moments"].to_float32()
    latents[:CHANNELS] = 3e38
    latents[0, 0, 0, 0] = 0.0
    replaced = {(key, "latents"): Encoded(tensors={"vae_moments": bf16(latents)})}
    cache = build_cache(tmp_path / "cache", {VIDEO: 24, IMAGE: 30}, replace=replaced)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteLossError, match=rf"the loss is (nan|inf) on rank 0 for clip '{key}'"):
        train(packed_config(cache, tmp_path / "run", model__latent_scaling_factor=2.0))


# --- ranks with more and fewer clips ------------------------------------------------------------------------------


def report(*clip_losses: float, grad_norm: float = 1.0) -> RankReport:
    load = RankLoad(tokens=7, model_flops=8.0, data_wait_s=0.5, forward_s=0.25, memory_bytes=9)
    return RankReport(clip_losses=clip_losses, attempts=tuple(range(len(clip_losses))), grad_norm=grad_norm,
                      stop_requested=False, load=load, save_failed=False)  # fmt: skip


def test_ranks_with_more_and_fewer_clips_say_equally_much() -> None:
    own = [report(0.5), report(1.0, 2.0, 3.0)]
    said: list[list[float]] = []
    for rank in own:
        exchange(SimpleNamespace(gather=lambda row: said.append(list(row)) or [row]), rank, 4)  # type: ignore[arg-type]
    assert len(said[0]) == len(said[1])
    told = exchange(SimpleNamespace(gather=lambda _: said), own[0], 4)  # type: ignore[arg-type]
    assert told.ranks == tuple(own)
    assert told.loss == 6.5 / 4, "of clips, not of ranks"
    assert told.attempts == (0, 0, 1, 2)


def test_the_bad_clip_is_found_on_a_rank_behind_one_with_fewer_clips() -> None:
    clips = ["a", "b", "c", "d"]
    with pytest.raises(NonFiniteLossError, match="the loss is nan on rank 1 for clip c;"):
        refuse_non_finite(StepReport((report(0.5), report(1.0, float("nan"), 3.0))), 3, lambda _: clips)  # type: ignore[arg-type, return-value]
    with pytest.raises(
        NonFiniteLossError,
        match=r"gradient over all ranks is inf, .* 0.5 on rank 0 for clip a, 3 on rank 1 for clip d;",
    ):
        refuse_non_finite(StepReport((report(0.5, grad_norm=float("inf")), report(1.0, 2.0, 3.0))), 3, lambda _: clips)  # type: ignore[arg-type, return-value]


# --- commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_order_says_which_keys_each_rank_reads_in_which_pack(
    root: Path, cache: Cache, world_size: int, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capfd, "order", "--cache", root, "--global-batch-size", 4, "--seed", 5, "--steps", 2,
                          "--world-size", world_size, "--tokens-per-pack", BUDGET, "--json")  # fmt: skip
    assert code == 0
    assert "none of them to fill up" in err
    for rank in range(world_size):
        for line, batch in zip(
            map(json.loads, out.splitlines()), batches(cache, (0, 1), rank, world_size), strict=True
        ):
            assert line["ranks"][rank] == [clip.key for clip in batch.clips]
            assert line["packs"][rank] == [[clip.key for clip in pack.clips] for pack in batch.micro_batches(None)]


def test_order_shows_packs_in_parentheses(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capfd, "order", "--cache", root, "--global-batch-size", 2, "--steps", 1, "--tokens-per-pack", 60)
    packs = out.removeprefix("step 0: rank 0: ").strip().split(" + ")
    assert len(packs) == 2
    assert all(pack.startswith("(") and pack.endswith(")") for pack in packs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--tokens-per-pack", 59],
            "--tokens-per-pack 59: a clip of 9x32x32 has 60 tokens with its text; give at leas",
        ),
        (["--tokens-per-pack", 150, "--micro-batch-size", 2], "--micro-batch-size must be 1 with --tokens-per-pack"),
    ],
)
def test_packs_that_cannot_be_are_refused(
    root: Path, tmp_path: Path, options: list[object], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capfd, "run", "--cache", root, "--preset", "tiny", "--output-dir", tmp_path / "run", *options)
    assert code == 2
    assert message in err
    assert not (tmp_path / "run").exists()
