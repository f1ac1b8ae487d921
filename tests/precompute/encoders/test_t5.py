"""T5 features are those of diffusers' CogVideoX pipeline: its own text path is the truth."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from mimir_precompute.config import ModelSource, T5Settings
from mimir_precompute.encoders.arrays import to_feature
from mimir_precompute.encoders.base import EncoderInput
from mimir_precompute.encoders.t5 import T5Encoder
from mimir_precompute.model_files import resolve_model
from mimir_shared.features import float32_to_bf16_bits

CAPTIONS = [
    "A red square moves to the left of a blue circle.",
    "",
    "word " * 100,
    "a </s> b <pad> c <unk>",
    "Zwei Hunde 😀 \u05e9\u05dc\u05d5\u05dd \u202eabc\u202c",
    "nul \x00 and\ttab\nand line",
]


def relative_error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


@pytest.fixture(scope="module")
def make_t5(models: Path) -> Callable[..., T5Encoder]:
    model_source, tokenizer_source = (ModelSource(name=str(models / f)) for f in ("text_encoder", "tokenizer"))

    def make(**settings: Any) -> T5Encoder:
        chosen = T5Settings(
            text_encoder=model_source,
            tokenizer=tokenizer_source,
            **{"dtype": "float32", "max_length": 64, "batch_size": 4, **settings},
        )
        model, tokenizer = resolve_model(model_source, ("weights",)), resolve_model(tokenizer_source, ("tokenizer",))
        return T5Encoder(model, tokenizer, chosen, "cpu")

    return make


@torch.inference_mode()
def diffusers_t5(models: Path, captions: list[str], dtype: torch.dtype) -> Tensor:
    """The text path of diffusers' CogVideoX pipeline, on a pipeline that has nothing else."""
    pipeline = CogVideoXPipeline.__new__(CogVideoXPipeline)
    text_encoder = T5EncoderModel.from_pretrained(models / "text_encoder", dtype=dtype).eval()
    # past its __init__, which wants all five parts; the method itself reads two
    object.__setattr__(pipeline, "__dict__", {"tokenizer": AutoTokenizer.from_pretrained(models / "tokenizer")})
    pipeline.__dict__["text_encoder"] = text_encoder
    embeds: Tensor = pipeline._get_t5_prompt_embeds(captions, max_sequence_length=64, device=torch.device("cpu"))
    return embeds


def inputs(captions: list[str]) -> list[EncoderInput]:
    return [EncoderInput(key=str(i), caption=caption) for i, caption in enumerate(captions)]


def test_t5_embeds_equal_the_text_path_of_diffusers(make_t5: Callable[..., T5Encoder], models: Path) -> None:
    encoder = make_t5()
    want = diffusers_t5(models, CAPTIONS, torch.float32)
    got = encoder.embed(encoder.tokenize(CAPTIONS).token_ids)
    assert relative_error(got, want) <= 1e-5
    for i, encoded in enumerate(make_t5(batch_size=len(CAPTIONS)).encode(inputs(CAPTIONS))):
        stored = encoded.tensors["t5_embeds"]
        assert stored.dtype == "bf16"
        np.testing.assert_array_equal(stored.array, float32_to_bf16_bits(got[i].numpy()))


def test_bfloat16_t5_embeds_equal_those_of_diffusers_bit_for_bit(
    make_t5: Callable[..., T5Encoder], models: Path
) -> None:
    want = diffusers_t5(models, CAPTIONS, torch.bfloat16)
    encoded = make_t5(dtype="bfloat16", batch_size=len(CAPTIONS)).encode(inputs(CAPTIONS))
    for i, one in enumerate(encoded):
        np.testing.assert_array_equal(one.tensors["t5_embeds"].array, to_feature(want[i]).array)


def test_pad_rows_depend_on_the_caption_for_no_mask_hides_them(make_t5: Callable[..., T5Encoder]) -> None:
    first, second = make_t5().encode(inputs(["a red square", "a blue circle"]))
    last_rows = [one.tensors["t5_embeds"].array[-1] for one in (first, second)]
    assert not np.array_equal(last_rows[0], last_rows[1])


def test_t5_batch_mates_change_no_more_than_the_last_bits(make_t5: Callable[..., T5Encoder]) -> None:
    encoder = make_t5()
    together = encoder.embed(encoder.tokenize(CAPTIONS).token_ids)
    alone = torch.cat([encoder.embed(encoder.tokenize([caption]).token_ids) for caption in CAPTIONS])
    assert relative_error(together, alone) <= 1e-5


def test_t5_offsets_point_at_the_characters_of_each_token(make_t5: Callable[..., T5Encoder]) -> None:
    caption = CAPTIONS[0]
    encoder = make_t5()
    encoded = encoder.encode(inputs([caption]))[0]
    ids, offsets = (encoded.tensors[name].array for name in ("t5_ids", "t5_offsets"))
    assert (ids.dtype, ids.shape, offsets.shape) == (np.int32, (64,), (64, 2))
    valid = encoded.valid_rows["t5_embeds"]
    assert ids[valid - 1] == encoder.tokenizer.eos_token_id
    assert (ids[valid:] == encoder.tokenizer.pad_token_id).all()
    assert (offsets[valid - 1 :] == 0).all()
    for token_id, (start, end) in zip(ids[: valid - 1].tolist(), offsets.tolist(), strict=False):
        assert encoder.tokenizer.convert_ids_to_tokens(token_id).strip("\u2581") == caption[start:end].strip()


def test_valid_rows_count_tokens_even_where_a_caption_spells_a_pad(make_t5: Callable[..., T5Encoder]) -> None:
    encoder = make_t5()
    for caption, encoded in zip(CAPTIONS, encoder.encode(inputs(CAPTIONS)), strict=True):
        full = len(encoder.tokenizer(caption)["input_ids"])
        assert encoded.valid_rows == dict.fromkeys(("t5_embeds", "t5_ids", "t5_offsets"), min(full, 64))
        assert encoded.document == {"t5_tokens": full, "t5_truncated": full > 64}
    assert encoder.encode(inputs(["word " * 100]))[0].document["t5_truncated"] is True


def test_ragged_rows_are_the_real_rows_of_the_full_form(make_t5: Callable[..., T5Encoder]) -> None:
    full = make_t5().encode(inputs(CAPTIONS))
    for whole, ragged in zip(full, make_t5(rows="ragged").encode(inputs(CAPTIONS)), strict=True):
        for name, tensor in ragged.tensors.items():
            np.testing.assert_array_equal(tensor.array, whole.tensors[name].array[: whole.valid_rows[name]])


def test_the_empty_prompt_is_the_caption_of_no_characters(make_t5: Callable[..., T5Encoder]) -> None:
    encoder = make_t5()
    empty, want = encoder.encode_empty(None), encoder.encode(inputs([""]))[0]
    assert empty is not None
    assert empty.valid_rows["t5_embeds"] == 1
    for name, tensor in want.tensors.items():
        np.testing.assert_array_equal(empty.tensors[name].array, tensor.array)
