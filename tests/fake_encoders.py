"""Encoders of the real interface that compute with numpy: for tests of all that is not a model.

Their output is a pure function of the clip, so that a test can say what a cache must hold.
"""

import hashlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mimir_precompute.encoders.base import Encoded, Encoder, EncoderInput
from mimir_shared.features import FeatureName, FeatureTensor, float32_to_bf16_bits
from mimir_shared.fingerprint import fingerprint

T5_ROWS, T5_WIDTH, LLM_WIDTH, NUM_INSTRUCTIONS = 16, 8, 12, 4


def latents_specs(bucket: str, channels: int = 4) -> list[dict[str, Any]]:
    """As spec.json has them: the fake VAE compresses 4x in time and space."""
    frames, height, width = (int(part) for part in bucket.split("x"))
    sizes = [2 * channels, (frames - 1) // 4 + 1, height // 4, width // 4]
    return [{"name": "vae_moments", "dtype": "bf16", "dims": ["2C", "T", "h", "w"], "sizes": sizes, "channel_dim": 0}]


T5_SPECS = [
    {"name": "t5_embeds", "dtype": "bf16", "dims": ["L", "D"], "sizes": [T5_ROWS, T5_WIDTH], "channel_dim": None},
    {"name": "t5_ids", "dtype": "i32", "dims": ["L"], "sizes": [T5_ROWS], "channel_dim": None},
    {"name": "t5_offsets", "dtype": "i32", "dims": ["L", "2"], "sizes": [T5_ROWS, 2], "channel_dim": None},
]
LLM_SPECS = [
    {"name": "query_hidden", "dtype": "bf16", "dims": ["M", "H"], "sizes": [None, LLM_WIDTH], "channel_dim": None},
    {"name": "query_offsets", "dtype": "i32", "dims": ["M", "2"], "sizes": [None, 2], "channel_dim": None},
    {"name": "answer_hidden_0", "dtype": "bf16", "dims": ["A", "H"], "sizes": [None, LLM_WIDTH], "channel_dim": None},
    {
        "name": "instruction_hidden_0",
        "dtype": "bf16",
        "dims": ["K", "H"],
        "sizes": [NUM_INSTRUCTIONS, LLM_WIDTH],
        "channel_dim": None,
    },
]


def normal(text: str, *shape: int) -> np.ndarray:
    """float32 normal numbers that follow from a text."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bf16(values: np.ndarray) -> FeatureTensor:
    return FeatureTensor(float32_to_bf16_bits(values), "bf16")


def encode_fake(feature: FeatureName, item: EncoderInput, salt: str = "") -> Encoded:
    """What the fake encoder of a feature gives for one clip."""
    words = item.caption.split()
    count = min(len(words), T5_ROWS)
    if feature == "latents":
        assert item.clip_pixels is not None
        pixels = item.clip_pixels[::4, ::4, ::4].astype(np.float32) / 127.5 - 1
        mean = np.moveaxis(pixels[..., [0, 1, 2, 0]], 3, 0) * np.float32([[[[1]]], [[[2]]], [[[3]]], [[[-1]]]])
        mean[..., 0, :] *= 0.5  # as the zero padding of a convolution shows at an edge: no clip is constant
        return Encoded(tensors={"vae_moments": bf16(np.concatenate([mean, np.full_like(mean, -6.0)]))})
    if feature == "t5":
        embeds = normal(f"t5{salt}{item.caption}", T5_ROWS, T5_WIDTH)
        ids = np.zeros(T5_ROWS, np.int32)
        ids[:count] = [1 + len(word) for word in words[:count]]
        offsets = np.zeros((T5_ROWS, 2), np.int32)
        tensors = {
            "t5_embeds": bf16(embeds),
            "t5_ids": FeatureTensor(ids, "i32"),
            "t5_offsets": FeatureTensor(offsets, "i32"),
        }
        return Encoded(tensors=tensors, valid_rows={"t5_embeds": count})
    if feature == "answers":
        answer = {"text": f"{salt}{item.caption}!", "token_ids": [len(word) for word in words]}
        instructions = [{"name": f"i{n}", "text": f"{n}", "token_ids": [n]} for n in range(NUM_INSTRUCTIONS)]
        return Encoded(document={"variants": [{"seed": None, "answer": answer, "instructions": instructions}]})
    assert item.answers is not None
    answer = item.answers["variants"][0]["answer"]
    return Encoded(
        tensors={
            "query_hidden": bf16(normal(f"q{item.caption}", len(words), LLM_WIDTH)),
            "query_offsets": FeatureTensor(np.zeros((len(words), 2), np.int32), "i32"),
            "answer_hidden_0": bf16(normal(f"a{answer['text']}", len(answer["token_ids"]), LLM_WIDTH)),
            "instruction_hidden_0": bf16(normal(f"i{item.caption}", NUM_INSTRUCTIONS, LLM_WIDTH)),
        }
    )


@dataclass
class FakeEncoders:
    """An EncoderSource. What it was asked for is kept, so that a test can say what was made again."""

    salt: Mapping[FeatureName, str] = field(default_factory=dict)
    """Stands for a change of a feature's model: other identity, other bytes (of t5 and answers)."""
    buckets: tuple[str, ...] = ("9x64x96", "1x64x96")
    batch: int = 2
    clip_s: float = 0.0
    """Seconds that each clip takes, to be killed in."""
    poison: Mapping[str, str] = field(default_factory=dict)
    """key, or feature/key → "nan", "shape", "constant VALUE" or "surplus": what the encoder does wrong to that clip."""
    encoded: list[tuple[FeatureName, str]] = field(default_factory=list)
    built: list[FeatureName] = field(default_factory=list)

    def identity(self, feature: FeatureName, dependencies: Mapping[FeatureName, Mapping[str, Any]]) -> dict[str, Any]:
        tensors: Any = {"t5": T5_SPECS, "answers": [], "llm": LLM_SPECS}.get(feature)
        if feature == "latents":
            tensors = {bucket: latents_specs(bucket) for bucket in self.buckets}
        own = {"feature": feature, "model": {"name": "fake", "salt": self.salt.get(feature, "")}, "batch": self.batch}
        return {**own, "tensors": tensors, **{name: fingerprint(value) for name, value in dependencies.items()}}

    def batch_size(self, feature: FeatureName) -> int:
        return self.batch

    def build(self, feature: FeatureName) -> Encoder:
        self.built.append(feature)
        return _FakeEncoder(self, feature)


class _FakeEncoder:
    def __init__(self, source: FakeEncoders, feature: FeatureName) -> None:
        self._source = source
        self._feature: FeatureName = feature

    def encode(self, batch: Sequence[EncoderInput]) -> list[Encoded]:
        assert 1 <= len(batch) <= self._source.batch
        results = []
        for item in batch:
            time.sleep(self._source.clip_s)
            self._source.encoded.append((self._feature, item.key))
            poison = self._source.poison
            results.append(_spoil(self._one(item), poison.get(f"{self._feature}/{item.key}", poison.get(item.key))))
        return results

    def encode_empty(self, answers: Mapping[str, Any] | None) -> Encoded | None:
        if self._feature == "latents":
            return None
        return self._one(EncoderInput(key="", caption="", answers=answers))

    def close(self) -> None:
        pass

    def _one(self, item: EncoderInput) -> Encoded:
        return encode_fake(self._feature, item, self._source.salt.get(self._feature, ""))


def _spoil(encoded: Encoded, how: str | None) -> Encoded:
    if how == "surplus":
        return Encoded(tensors={**encoded.tensors, "surplus": bf16(np.ones(2))}, document=encoded.document)
    if how is None or not encoded.tensors:
        return encoded
    name = next(iter(encoded.tensors))
    array = encoded.tensors[name].array.copy()
    if how == "nan":
        array.flat[0] = 0x7FC0
    if how.startswith("constant"):
        array[...] = float32_to_bf16_bits(np.float32(how.removeprefix("constant")))
    tensor = FeatureTensor(array[:-1] if how == "shape" else array, encoded.tensors[name].dtype)
    return Encoded(tensors={**encoded.tensors, name: tensor}, document=encoded.document, valid_rows=encoded.valid_rows)


def kill_self_after(seconds: float) -> None:
    """SIGKILL this process soon, whatever it is doing."""
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)


def tree(root: Path, *, leave_out: tuple[str, ...] = ("logs",)) -> dict[str, bytes]:
    """Every file of a cache by relative name, but for what may differ between equal runs."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] not in leave_out
    }
