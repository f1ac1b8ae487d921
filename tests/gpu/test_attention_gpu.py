"""On a CUDA device: every attention backend that is there equals SDPA, packed and in a batch, forward and backward."""

from dataclasses import replace
from typing import get_args

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from mimir_train.model.attention import attention, why_not  # noqa: E402
from mimir_train.model.config import AttentionName  # noqa: E402
from tests.attention_cases import LENGTHS, draw_heads, gradients, one_by_one, padded, segments_of  # noqa: E402
from tests.train.model.test_dit import CONFIG_2B, random_dit  # noqa: E402
from tests.train.model.test_packing import draw_clips, each_alone, mean_loss  # noqa: E402

DEVICE = torch.device("cuda", 0)
HEAD_DIM = 64
TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 2e-2}


@pytest.fixture(params=get_args(AttentionName))
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def draw(batch_size: int, num_tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    drawn = draw_heads(batch_size, num_tokens, num_heads=3, head_dim=HEAD_DIM, device=DEVICE)
    return tuple(tensor.detach().to(dtype).requires_grad_() for tensor in drawn)


def skip_without(backend: str, dtype: torch.dtype) -> None:
    reason = why_not(backend, DEVICE, dtype, HEAD_DIM)
    if reason is not None:
        pytest.skip(f"{backend} cannot train here in {dtype}: {reason}")


def assert_alike(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.isfinite().all()
    error = float((got.float() - wanted.float()).abs().max() / wanted.float().abs().max())
    assert error <= TOLERANCES[dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("reference", [one_by_one, padded])
def test_packed_clips_attend_as_if_each_were_alone(backend: str, dtype: torch.dtype, reference: object) -> None:
    skip_without(backend, dtype)
    inputs = draw(1, sum(LENGTHS), dtype)
    packed = attention(*inputs, segments_of(LENGTHS, DEVICE), backend)
    exact = tuple(tensor.detach().float().requires_grad_() for tensor in inputs)
    wanted = reference(*exact, LENGTHS)
    assert_alike(packed, wanted, dtype)
    for got, expected in zip(gradients(packed, inputs), gradients(wanted, exact), strict=True):
        assert_alike(got, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_batch_attends_as_in_sdpa(backend: str, dtype: torch.dtype) -> None:
    skip_without(backend, dtype)
    inputs = draw(2, 300, dtype)
    exact = tuple(tensor.detach().float().requires_grad_() for tensor in inputs)
    attended, wanted = attention(*inputs, None, backend), attention(*exact)
    assert_alike(attended, wanted, dtype)
    for got, expected in zip(gradients(attended, inputs), gradients(wanted, exact), strict=True):
        assert_alike(got, expected, dtype)


@pytest.mark.parametrize("use_rotary", [False, True])
def test_a_pack_has_the_predictions_and_gradients_of_its_clips(backend: str, use_rotary: bool) -> None:
    """The transformer in bfloat16, over a pack, against each clip alone in float32 with SDPA."""
    skip_without(backend, torch.bfloat16)
    config = replace(CONFIG_2B, attention_head_dim=HEAD_DIM, use_rotary_positional_embeddings=use_rotary)
    model = random_dit(config).to(DEVICE)
    clips, text, timesteps = draw_clips(226)
    clips, text, timesteps = [clip.to(DEVICE) for clip in clips], text.to(DEVICE), timesteps.to(DEVICE)
    mean_loss(each_alone(model, clips, text, timesteps)).backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    alone = each_alone(model, clips, text, timesteps)

    model.zero_grad()
    model.use_attention(backend)
    with torch.autocast("cuda", torch.bfloat16):
        packed = model(clips, text, timesteps)
    mean_loss(list(packed)).backward()
    for got, expected in zip(packed, alone, strict=True):
        assert float((got - expected).abs().mean() / expected.abs().mean()) <= 0.05
    largest = max(float(gradient.abs().max()) for gradient in wanted)
    for parameter, expected in zip(model.parameters(), wanted, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert float((parameter.grad - expected).abs().max()) <= 0.15 * largest  # 0.07 was seen in bfloat16 on a CPU


def test_sdpa_is_there_in_both_precisions() -> None:
    assert all(why_not("sdpa", DEVICE, dtype, HEAD_DIM) is None for dtype in TOLERANCES)
