"""A pack gives each clip what it gets alone: predictions, losses, gradients; and no token of a pack fills space."""

import math

import pytest
import torch
from torch import Tensor

from mimir_train.block_execution import set_block_execution
from mimir_train.model.config import DiTConfig
from mimir_train.model.dit import DiT
from mimir_train.model.packing import PackIndex, add_gated, modulate, reorder, sum_by_clip
from tests.train.model.test_dit import CONFIG_2B, CONFIG_5B, random_dit

CONFIGS = [pytest.param(CONFIG_2B, id="sincos"), pytest.param(CONFIG_5B, id="rotary")]

SIZES = [(3, 8, 12), (1, 8, 12), (3, 4, 6), (1, 10, 4), (3, 8, 12)]
"""(T, h, w): clips of nine frames and images, wide and tall, two of one size."""


def draw_clips(num_text_tokens: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Noisy latents, condition tokens and timesteps of a pack."""
    generator = torch.Generator().manual_seed(1)
    clips = [torch.randn(4, *size, generator=generator) for size in SIZES]
    text = torch.randn(len(SIZES), num_text_tokens, 20, generator=generator)
    return clips, text, torch.tensor([3, 999, 500, 250, 0])


def each_alone(model: DiT, clips: list[Tensor], text: Tensor, timesteps: Tensor) -> list[Tensor]:
    return [model(clip[None], text[i : i + 1], timesteps[i : i + 1])[0] for i, clip in enumerate(clips)]


def mean_loss(predictions: list[Tensor]) -> Tensor:
    """A loss over clips as training takes it: each clip counts alike, however long it is."""
    return torch.stack([(prediction - 0.3).square().mean() for prediction in predictions]).mean()


@pytest.mark.parametrize("num_text_tokens", [226, 230])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_pack_gives_each_clip_what_it_gets_alone(config: DiTConfig, num_text_tokens: int) -> None:
    model = random_dit(config)
    clips, text, timesteps = draw_clips(num_text_tokens)
    with torch.no_grad():
        packed, alone = model(clips, text, timesteps), each_alone(model, clips, text, timesteps)
    for got, wanted in zip(packed, alone, strict=True):
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("config", CONFIGS)
def test_a_pack_has_the_loss_and_gradients_of_its_clips(config: DiTConfig) -> None:
    model = random_dit(config)
    clips, text, timesteps = draw_clips(30)
    losses, gradients = [], []
    for predict in (model, lambda *inputs: each_alone(model, *inputs)):
        model.zero_grad()
        loss = mean_loss(list(predict(clips, text.requires_grad_(), timesteps)))
        loss.backward()
        losses.append(loss.item())
        gradients.append([text.grad, *(parameter.grad for parameter in model.parameters())])
        text.grad = None
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in gradients[1] if gradient is not None)
    names = ["condition_tokens", *(name for name, _ in model.named_parameters())]
    for name, got, wanted in zip(names, *gradients, strict=True):
        assert got is not None, name
        assert wanted is not None, name
        assert (got - wanted).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("config", CONFIGS)
def test_blocks_that_recompute_give_a_pack_the_same_gradients(config: DiTConfig) -> None:
    gradients = []
    for checkpointing in ("none", "selective", "full"):
        model = random_dit(config)
        set_block_execution(model, checkpointing=checkpointing, compiled=False)
        mean_loss(list(model(*draw_clips(12)))).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for kept, selective, full in zip(*gradients, strict=True):
        assert kept is not None
        assert torch.equal(kept, selective)
        assert torch.equal(kept, full)


@pytest.mark.parametrize("config", CONFIGS)
def test_no_clip_of_a_pack_sees_another(config: DiTConfig) -> None:
    model = random_dit(config)
    clips, text, timesteps = draw_clips(12)
    with torch.no_grad():
        before = model(clips, text, timesteps)
        clips[1], text[1], timesteps[1] = clips[1] + 1, text[1] - 1, 7
        after = model(clips, text, timesteps)
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(one, other) == (number != 1), f"clip {number}"


def test_a_pack_has_no_token_that_fills() -> None:
    num_video_tokens = [math.prod(size) // 4 for size in SIZES]
    pack = PackIndex.build(30, num_video_tokens, torch.device("cpu"))
    assert pack.segments.total == sum(30 + count for count in num_video_tokens)
    assert pack.segments.lengths == tuple(30 + count for count in num_video_tokens)
    assert pack.text_clips.bincount().tolist() == [30] * len(SIZES)
    assert pack.video_clips.bincount().tolist() == num_video_tokens
    assert pack.clip_by_clip.sort().values.tolist() == list(range(pack.segments.total))
    clip_of_each = torch.cat([pack.text_clips, pack.video_clips])
    assert torch.equal(clip_of_each[pack.clip_by_clip], pack.segments.clip_of_token.long())
    assert torch.equal(pack.clip_by_clip[pack.kind_by_kind], torch.arange(pack.segments.total))


def test_gradients_that_are_written_out_are_right() -> None:
    clips = torch.tensor([0, 0, 1, 2, 2, 2])

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    tokens, update, shift, scale = draw(1, 6, 5), draw(1, 6, 5), draw(3, 5), draw(3, 5)
    assert torch.autograd.gradcheck(lambda *inputs: modulate(*inputs, clips), (tokens, shift, scale))
    assert torch.autograd.gradcheck(lambda *inputs: add_gated(*inputs, clips), (tokens, update, scale))
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    assert torch.autograd.gradcheck(lambda x: reorder(x, order, order.argsort()), (tokens,))


def test_sums_over_many_tokens_in_bfloat16_lose_nothing() -> None:
    clips = torch.zeros(20_000, dtype=torch.int64)
    ones = torch.ones(1, 20_000, 2, dtype=torch.bfloat16)
    assert sum_by_clip(ones, clips, 2).tolist() == [[19_968.0, 19_968.0], [0.0, 0.0]]  # 20,000 to eight bits


def test_a_pack_computes_in_bfloat16_under_autocast() -> None:
    model = random_dit(CONFIG_5B)
    clips, text, timesteps = draw_clips(12)
    with torch.autocast("cpu", torch.bfloat16):
        packed, alone = model(clips, text, timesteps), each_alone(model, clips, text, timesteps)
    for got, wanted in zip(packed, alone, strict=True):
        assert (got - wanted).abs().max() <= 0.1 * wanted.abs().max()
    mean_loss(list(packed)).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_latents_in_a_pack_that_do_not_fit_the_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="latents of 5 x 4 cannot be cut into patches of 2"):
        DiT(CONFIG_2B)([torch.zeros(4, 1, 4, 4), torch.zeros(4, 1, 5, 4)], torch.zeros(2, 3, 20), torch.tensor([0, 1]))
