"""Attention behind one function: packed clips see themselves alone; backends that this machine lacks are refused."""

import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mimir_shared.command_line import run_app
from mimir_shared.errors import InputError
from mimir_train.attention_choice import check_attention
from mimir_train.config import ModelConfig
from mimir_train.loop import train
from mimir_train.model.attention import Segments, attention, why_not
from mimir_train.model.config import DiTConfig
from tests.attention_cases import LENGTHS, draw_heads, gradients, one_by_one, padded, segments_of
from tests.train.caches import tiny_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("reference", [one_by_one, padded])
def test_packed_clips_attend_as_if_each_were_alone(reference: object) -> None:
    inputs = draw_heads(1, sum(LENGTHS))
    packed = attention(*inputs, segments_of(LENGTHS))
    wanted = reference(*inputs, LENGTHS)  # type: ignore[operator]
    torch.testing.assert_close(packed, wanted, rtol=1e-5, atol=1e-6)
    for got, expected in zip(gradients(packed, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_batch_without_segments_is_torchs_own_attention() -> None:
    inputs = draw_heads(3, 20)
    assert torch.equal(attention(*inputs), F.scaled_dot_product_attention(*inputs))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_equals_sdpa() -> None:
    inputs = [tensor.detach() for tensor in draw_heads(1, sum(LENGTHS))]
    packed = attention(*inputs, segments_of(LENGTHS), backend="flex")
    torch.testing.assert_close(packed, one_by_one(*inputs, LENGTHS), rtol=1e-5, atol=1e-6)
    batch = [tensor.detach() for tensor in draw_heads(2, 40)]
    torch.testing.assert_close(attention(*batch, backend="flex"), attention(*batch), rtol=1e-5, atol=1e-6)


def test_the_mask_of_xformers_keeps_clips_apart() -> None:
    pytest.importorskip("xformers.ops.fmha.attn_bias", reason="xformers is not installed")
    num_tokens = sum(LENGTHS)
    segments = segments_of(LENGTHS)
    mask = segments.xformers_mask.materialize((num_tokens, num_tokens), dtype=torch.float32)
    same_clip = segments.clip_of_token[:, None] == segments.clip_of_token
    assert torch.equal(mask == 0, same_clip)
    assert torch.isneginf(mask[~same_clip]).all()
    inputs = draw_heads(1, num_tokens)
    attended = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    torch.testing.assert_close(attended, attention(*inputs, segments), rtol=1e-5, atol=1e-6)


def test_the_programs_do_not_pass_on_what_xformers_says_of_itself(capfd: pytest.CaptureFixture[str]) -> None:
    def load_what_diffusers_loads() -> None:
        logging.getLogger("xformers").warning("xFormers can't load C++/CUDA extensions")

    run_app(load_what_diffusers_loads)
    assert capfd.readouterr().err == ""


def test_starts_and_clips_of_tokens_follow_the_lengths() -> None:
    segments = Segments([2, 1, 3], CPU)
    assert segments.starts.tolist() == [0, 2, 3, 6]
    assert segments.starts.dtype == torch.int32, "what varlen kernels take"
    assert segments.clip_of_token.tolist() == [0, 0, 1, 2, 2, 2]
    assert (segments.longest, segments.total) == (3, 6)


def test_segments_must_cover_the_sequence() -> None:
    with pytest.raises(AssertionError, match=r"20 tokens, segments of \(7, 12\)"):
        attention(*draw_heads(1, 20), segments_of((7, 12)))


def test_sdpa_trains_anywhere_and_kernels_for_gpus_do_not() -> None:
    assert why_not("sdpa", CPU, torch.float32, 16) is None
    for backend, reason in (("varlen", "CPU"), ("flex", "backward on CPU"), ("xformers", "xformers|operator")):
        found = why_not(backend, CPU, torch.float32, 16)  # type: ignore[arg-type]
        assert found is not None
        assert any(part in found for part in reason.split("|")), found


def test_a_backend_that_cannot_train_here_is_refused_with_those_that_can() -> None:
    model = ModelConfig(attention="flex", transformer=DiTConfig(attention_head_dim=32))
    message = (
        r"--attention flex: cannot train on cpu in float32 with heads of 32 \(FlexAttention does not support backward "
        r"on CPU.*\); here there is sdpa$"
    )
    with pytest.raises(InputError, match=message):
        check_attention(model, CPU, "float32")


def test_a_run_checks_its_attention_before_it_builds_anything(small_cache: Path, tmp_path: Path) -> None:
    config = tiny_config(small_cache, tmp_path / "run", model__attention="varlen")
    with pytest.raises(InputError, match="--attention varlen: cannot train on cpu"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_an_unknown_backend_is_named(small_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.attention: expected one of sdpa, xformers, varlen, flex, got 'fast'"):
        tiny_config(small_cache, tmp_path / "run", model__attention="fast")
