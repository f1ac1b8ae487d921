"""What the pipeline asks of an encoder. No torch here: arrays go in and come out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mimir_precompute.clips.rejection import ClipRejected
from mimir_shared.features import FeatureTensor

JsonValue = Any
"""What `json` reads and writes; the library gives it no type."""


@dataclass(frozen=True, kw_only=True)
class EncoderInput:
    """One clip as an encoder sees it. Only what the feature needs is filled in."""

    key: str
    caption: str
    clip_pixels: np.ndarray | None = None
    """(F, H, W, 3) uint8, RGB; for `latents`."""
    answers: Mapping[str, JsonValue] | None = None
    """The document of the feature `answers`; for `llm`."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The feature of one clip: tensors for `.safetensors`, text for `.json`."""

    tensors: Mapping[str, FeatureTensor] = field(default_factory=dict)
    document: Mapping[str, JsonValue] = field(default_factory=dict)
    """Added to the sample's `.json` beside key and caption."""
    valid_rows: Mapping[str, int] = field(default_factory=dict)
    """For tensors with pad rows at their end: how many leading rows are real (for the statistics)."""
    rejection: ClipRejected | None = None
    """Why the model could not encode this clip; nothing else is filled in then."""


class Encoder(Protocol):
    """A frozen model that turns clips into one feature. Holds its model; `close` lets it go."""

    def encode(self, batch: Sequence[EncoderInput]) -> list[Encoded]:
        """Encode clips of one bucket, in order. Deterministic for equal batches."""
        ...

    def encode_empty(self, answers: Mapping[str, JsonValue] | None) -> Encoded | None:
        """The feature of the empty prompt; None for a feature that has no prompt.

        Args:
            answers: for `llm`, the document that `answers` gave for the empty prompt.
        """
        ...

    def close(self) -> None:
        """Free the model's memory."""
        ...


@runtime_checkable
class ReportingEncoder(Encoder, Protocol):
    """An encoder that can say how it fared."""

    def report(self) -> Mapping[str, float | int | str]:
        """Counts and times since it was built, for a log."""
        ...


class Pending(Protocol):
    """A batch that a device may still be encoding."""

    def result(self) -> list[Encoded]:
        """Wait for the device and hand out the features. Called once, perhaps from another thread."""
        ...


@runtime_checkable
class AsynchronousEncoder(Encoder, Protocol):
    """An encoder whose device computes while the caller goes on: the next batch starts while this one is written."""

    def start(self, batch: Sequence[EncoderInput]) -> Pending:
        """Begin what `encode` does and let go of the inputs. Waits itself where the device has enough to do."""
        ...


@dataclass(frozen=True)
class Done:
    """A batch that is encoded already."""

    encoded: list[Encoded]

    def result(self) -> list[Encoded]:
        return self.encoded


def start_encoding(encoder: Encoder, batch: Sequence[EncoderInput]) -> Pending:
    """Encode a batch, in the background where the encoder can; an empty one is nobody's work."""
    if not batch:
        return Done([])
    return encoder.start(batch) if isinstance(encoder, AsynchronousEncoder) else Done(encoder.encode(batch))
