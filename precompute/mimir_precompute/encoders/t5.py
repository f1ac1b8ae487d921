"""Feature `t5`: caption tokens through the T5 encoder, pad rows included.

Source: diffusers CogVideoXPipeline._get_t5_prompt_embeds: padded to the full length and no attention mask, so
that real tokens attend to pads and the pretrained DiT reads them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from mimir_precompute.config import T5Settings
from mimir_precompute.encoders.arrays import TORCH_DTYPES, free_memory, prepare_to_load, to_feature
from mimir_precompute.encoders.base import Encoded, EncoderInput, JsonValue
from mimir_precompute.model_files import ResolvedModel, loading_from, refuse_incomplete
from mimir_shared.errors import InputError


@dataclass(frozen=True, kw_only=True)
class T5Tokens:
    """Tokens of a batch of captions, padded to one length."""

    token_ids: Tensor
    """(B, L) int64."""
    offsets: Tensor
    """(B, L, 2) int32, characters of the caption; (0, 0) for end token and pads."""
    num_tokens: list[int]
    """Real tokens of each caption, end token included."""
    num_tokens_uncut: list[int]
    """The same before captions were cut to L."""


class T5Encoder:
    """A frozen T5 encoder and its tokenizer."""

    def __init__(self, model: ResolvedModel, tokenizer: ResolvedModel, settings: T5Settings, device: str) -> None:
        """Raises: InputError if the folders do not hold a T5 encoder and a fast tokenizer, whole."""
        prepare_to_load()
        self.settings = settings
        self.device = torch.device(device)
        with loading_from(tokenizer):
            self.tokenizer = AutoTokenizer.from_pretrained(
                tokenizer.folder, local_files_only=True, trust_remote_code=False
            )
        if not self.tokenizer.is_fast:
            raise InputError(f"tokenizer folder {tokenizer.folder}: has no fast form, which character offsets need")
        with loading_from(model):
            # Any: the library types the call as if it gave the model alone
            loaded: Any = T5EncoderModel.from_pretrained(
                model.folder,
                local_files_only=True,
                trust_remote_code=False,
                dtype=TORCH_DTYPES[settings.dtype],
                output_loading_info=True,
            )
        text_encoder, info = loaded
        refuse_incomplete(model, list(info["missing_keys"]), [str(key) for key in info["mismatched_keys"]])
        self.text_encoder = text_encoder.to(self.device).eval().requires_grad_(False)

    def encode(self, batch: Sequence[EncoderInput]) -> list[Encoded]:
        """Encode captions: `t5_embeds` (L, D), `t5_ids` (L,), `t5_offsets` (L, 2)."""
        encoded: list[Encoded] = []
        for start in range(0, len(batch), self.settings.batch_size):
            captions = [item.caption for item in batch[start : start + self.settings.batch_size]]
            tokens = self.tokenize(captions)
            embeds = self.embed(tokens.token_ids)
            encoded += [self._stored(tokens, embeds, i) for i in range(len(captions))]
        return encoded

    def encode_empty(self, answers: Mapping[str, JsonValue] | None) -> Encoded | None:
        """The features of the caption ""."""
        return self.encode([EncoderInput(key="", caption="")])[0]

    def tokenize(self, captions: list[str]) -> T5Tokens:
        """Tokenise as diffusers does; the pads are counted by the mask, for a caption may spell a pad out."""
        padded = self.tokenizer(
            captions,
            padding="max_length",
            max_length=self.settings.max_length,
            truncation=True,
            add_special_tokens=True,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        uncut = self.tokenizer(captions, add_special_tokens=True, verbose=False)["input_ids"]
        return T5Tokens(
            token_ids=padded["input_ids"],
            offsets=padded["offset_mapping"].to(torch.int32),
            num_tokens=padded["attention_mask"].sum(dim=1).tolist(),
            num_tokens_uncut=[len(token_ids) for token_ids in uncut],
        )

    @torch.inference_mode()
    def embed(self, token_ids: Tensor) -> Tensor:
        """Run the encoder, without a mask: (B, L) → (B, L, D) in the compute dtype."""
        embeds: Tensor = self.text_encoder(token_ids.to(self.device)).last_hidden_state
        return embeds

    def close(self) -> None:
        """Free the model's memory; the encoder is of no use afterwards."""
        del self.text_encoder
        free_memory()

    def _stored(self, tokens: T5Tokens, embeds: Tensor, i: int) -> Encoded:
        valid = tokens.num_tokens[i]
        rows = valid if self.settings.rows == "ragged" else self.settings.max_length
        tensors = {
            "t5_embeds": to_feature(embeds[i, :rows]),
            "t5_ids": to_feature(tokens.token_ids[i, :rows], "i32"),
            "t5_offsets": to_feature(tokens.offsets[i, :rows], "i32"),
        }
        uncut = tokens.num_tokens_uncut[i]
        return Encoded(
            tensors=tensors,
            document={"t5_tokens": uncut, "t5_truncated": uncut > self.settings.max_length},
            valid_rows=dict.fromkeys(tensors, valid),
        )
