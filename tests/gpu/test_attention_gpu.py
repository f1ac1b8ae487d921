"""On a CUDA device: every attention backend that is there equals SDPA, packed and in a batch, forward and backward."""

from typing import get_args

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from mimir_train.model.attention import attention, why_not  # noqa: E402
from mimir_train.model.config import AttentionName  # noqa: E402
from tests.attention_cases import LENGTHS, draw_heads, gradients, one_by_one, padded, segments_of  # noqa: E402

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


def test_sdpa_is_there_in_both_precisions() -> None:
    assert all(why_not("sdpa", DEVICE, dtype, HEAD_DIM) is None for dtype in TOLERANCES)
