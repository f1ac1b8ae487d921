"""Why a clip cannot be used: the closed list behind every quarantined row. Imports nothing, so that anyone may."""

from typing import Final, Literal

RejectionStage = Literal["plan", "fetch", "decode", "geometry", "encode", "answers"]
"""plan: a later plan replaced or removed the row; fetch: getting the bytes; decode: from bytes to frames; geometry:
frames that fill no bucket; encode: the model's output cannot be kept; answers: the clip failed in that feature."""

UNTRIED_STAGES: Final[frozenset[str]] = frozenset(("plan", "answers"))
"""Where a row follows from a later plan or from another feature: there was nothing to try, and nothing is lost anew."""

RejectionReason = Literal[
    "missing",
    "unreadable",
    "empty_file",
    "unsupported_format",
    "undecodable",
    "truncated",
    "no_video_stream",
    "too_large",
    "too_short",
    "crashed_decoder",
    "timeout",
    "out_of_memory",
    "superseded",
    "crashed_engine",
    "wrong_shape",
    "nonfinite",
    "constant",
]
"""superseded: a later plan changed or removed the clip; wrong_shape, nonfinite, constant: what a model made of it;
crashed_decoder, timeout and out_of_memory: decoding/sandbox.py says when a clip is blamed for them; crashed_engine:
encoders/vllm_process.py does."""


class ClipRejected(Exception):
    """One clip is unusable, by its own fault: it is quarantined and the run goes on.

    Equal clips give equal texts: no path, clock, address or host is in `detail`.
    Positional arguments alone, so that it survives pickling between processes.
    """

    def __init__(
        self, stage: RejectionStage, reason: RejectionReason, detail: str, source_xxh3: int | None = None
    ) -> None:
        super().__init__(stage, reason, detail, source_xxh3)
        self.stage: RejectionStage = stage
        self.reason: RejectionReason = reason
        self.detail = detail
        self.source_xxh3 = source_xxh3
        """xxh3-64 of the clip's bytes, where all of them could be read: tells whether the file was mended since."""

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}: {self.detail}"
