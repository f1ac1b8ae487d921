"""The arithmetic of operations: against known totals here, against torch's own counter in tests/train."""

import pytest

from mimir_shared.transformer_flops import (
    COGVIDEOX_2B,
    COGVIDEOX_5B,
    TransformerSizes,
    forward_flops,
    num_video_tokens,
    training_flops,
)

FULL_SIZE = (13, 60, 90)  # 49 frames of 480x720
TEXT_TOKENS = 226 + 4


@pytest.mark.parametrize(
    ("sizes", "linear", "attention", "forward", "training"),
    [(COGVIDEOX_2B, 47.2e12, 72.8e12, 120.0e12, 360e12), (COGVIDEOX_5B, 169.1e12, 163.2e12, 332.3e12, 997e12)],
    ids=["2b", "5b"],
)
def test_totals_are_those_worked_out_by_hand_for_cogvideox(
    sizes: TransformerSizes, linear: float, attention: float, forward: float, training: float
) -> None:
    assert num_video_tokens(sizes, FULL_SIZE) == 17_550
    flops = forward_flops(sizes, FULL_SIZE, TEXT_TOKENS)
    assert flops.linear == pytest.approx(linear, rel=1e-3)
    assert flops.attention == pytest.approx(attention, rel=1e-3)
    assert flops.total == pytest.approx(forward, rel=1e-3)
    assert training_flops(sizes, FULL_SIZE, TEXT_TOKENS) == pytest.approx(training, rel=1e-3)


def test_what_is_no_block_is_less_than_a_thousandth_at_full_size() -> None:
    for sizes in (COGVIDEOX_2B, COGVIDEOX_5B):
        flops = forward_flops(sizes, FULL_SIZE, TEXT_TOKENS)
        assert flops.ends < flops.total / 1000


def test_an_image_is_a_clip_of_one_latent_frame() -> None:
    image, video = (num_video_tokens(COGVIDEOX_2B, (frames, 60, 90)) for frames in (1, 13))
    assert video == 13 * image
