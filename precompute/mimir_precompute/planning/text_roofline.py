"""What encoding a caption must cost: operations of T5's encoder and of a causal LLM, from their configs. No torch here.

Counted are matrix products, a multiplication and an addition as two, as torch's FlopCounterMode counts them: attention
over all pairs of tokens, causal or not. Writing answers token by token is bound by memory instead: every step reads all
weights once for its batch, and the keys and values of each sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from mimir_precompute.planning.model_sizes import UnknownSizeError


@dataclass(frozen=True, kw_only=True)
class T5Size:
    """What of a T5 encoder's config.json decides its cost."""

    width: int
    layers: int
    attention_width: int
    """Heads times width of a head."""
    feed_forward_width: int
    feed_forward_maps: int
    """3 where the feed-forward is gated, else 2."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Raises UnknownSizeError for a config that lacks a size."""
        return cls(
            width=_size(config, "d_model"),
            layers=_size(config, "num_layers"),
            attention_width=_size(config, "num_heads") * _size(config, "d_kv"),
            feed_forward_width=_size(config, "d_ff"),
            feed_forward_maps=3 if str(config.get("feed_forward_proj", "relu")).startswith("gated") else 2,
        )

    def encode_flops(self, tokens: int) -> int:
        """One caption of so many tokens, pad tokens among them."""
        weights = 4 * self.width * self.attention_width + self.feed_forward_maps * self.width * self.feed_forward_width
        return self.layers * (2 * weights * tokens + 4 * tokens**2 * self.attention_width)


@dataclass(frozen=True, kw_only=True)
class LlmSize:
    """What of a causal LM's config.json decides its cost: attention and a gated feed-forward a layer, and a head."""

    width: int
    layers: int
    attention_width: int
    """Of the queries: heads times width of a head."""
    key_width: int
    """Of the keys, and of the values: fewer heads share them in many models."""
    feed_forward_width: int
    vocabulary: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Raises UnknownSizeError for a config that lacks a size, or of a mixture of experts."""
        # models that read more than text keep their language model's values one level down
        text = config.get("text_config")
        values = {**config, **(text if isinstance(text, Mapping) else {})}
        experts = next((name for name in values if "experts" in name and values[name]), None)
        if experts is not None:
            raise UnknownSizeError(
                f"the LLM's config.json has {experts}: what a mixture of experts costs is not known here"
            )
        width, heads = _size(values, "hidden_size"), _size(values, "num_attention_heads")
        head_width = int(values.get("head_dim") or width // heads)
        return cls(
            width=width,
            layers=_size(values, "num_hidden_layers"),
            attention_width=heads * head_width,
            key_width=int(values.get("num_key_value_heads") or heads) * head_width,
            feed_forward_width=_size(values, "intermediate_size"),
            vocabulary=_size(values, "vocab_size"),
        )

    @property
    def body_weights(self) -> int:
        """Parameters of all matrices but embeddings and head."""
        attention = 2 * self.width * (self.attention_width + self.key_width)
        return self.layers * (attention + 3 * self.width * self.feed_forward_width)

    @property
    def head_weights(self) -> int:
        return self.width * self.vocabulary

    def prefill_flops(self, tokens: int) -> int:
        """The hidden states of one sequence in one pass, without the head."""
        return 2 * self.body_weights * tokens + self.layers * 4 * tokens**2 * self.attention_width

    def answer_flops(self, prompt_tokens: int, new_tokens: int) -> int:
        """Read a prompt and write so many tokens; the last one written is not read again."""
        steps = max(new_tokens - 1, 0)
        read = steps * prompt_tokens + steps * (steps + 1) // 2  # tokens that the steps attend to, themselves included
        return (
            self.prefill_flops(prompt_tokens)
            + 2 * self.body_weights * steps
            + 4 * self.layers * self.attention_width * read
            + 2 * self.head_weights * new_tokens
        )

    def answer_traffic_bytes(self, prompt_tokens: int, new_tokens: int, *, sequences: int) -> int:
        """Memory that writing the tokens moves, in bfloat16: the weights' share of one of `sequences` in a batch, and
        the keys and values of what was read and written before."""
        weights = 2 * (self.body_weights + self.head_weights) // sequences
        keys_and_values = 2 * 2 * self.layers * self.key_width
        return new_tokens * (weights + keys_and_values * (prompt_tokens + new_tokens // 2))


def _size(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnknownSizeError(f"config.json: {field} is {value!r}, expected a positive whole number")
    return value
