"""What a decoding child may answer. It has met hostile bytes: an answer that is not exactly one of these is a crash."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mimir_precompute.decoding.process import DecoderFailed


class _Reply(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class PixelsReply(_Reply):
    """The pixels of this bucket are in the shared memory."""

    outcome: Literal["pixels"]
    bucket: str


class StillReply(_Reply):
    """A picture of this size is in the shared memory."""

    outcome: Literal["still"]
    height: int = Field(ge=1)
    width: int = Field(ge=1)


class InfoReply(_Reply):
    """The fields of a ClipInfo."""

    outcome: Literal["info"]
    frames: int | None = Field(ge=0)
    width: int = Field(ge=1)
    height: int = Field(ge=1)
    end_s: float | None = Field(allow_inf_nan=False)
    codec: str = Field(max_length=40, pattern=r"^[\w-]+$")
    is_image: bool


class RejectedReply(_Reply):
    """The clip cannot be used."""

    outcome: Literal["rejected"]
    stage: Literal["decode", "geometry"]
    reason: Literal["unsupported_format", "undecodable", "truncated", "no_video_stream", "too_large", "too_short"]
    detail: str = Field(max_length=500)


class FailedReply(_Reply):
    """Memory was refused, or a library raised what it should not."""

    outcome: Literal["failed"]
    reason: Literal["crashed_decoder", "out_of_memory"]
    what: str = Field(max_length=200, pattern=r"^[\w .<>]*$")

    def failure(self) -> DecoderFailed:
        if self.reason == "out_of_memory":
            detail = "decoding needs more memory than it may have; --decode-memory-gb allows more"
            return DecoderFailed("out_of_memory", detail)
        return DecoderFailed("crashed_decoder", f"the decoder broke off: {self.what}")


class MachineReply(_Reply):
    """The file could not be read on."""

    outcome: Literal["machine"]
    errno: int = Field(ge=1, le=4095)


AnyReply = PixelsReply | StillReply | InfoReply | RejectedReply | FailedReply | MachineReply
_REPLIES: TypeAdapter[AnyReply] = TypeAdapter(Annotated[AnyReply, Field(discriminator="outcome")])


def parse_reply(packet: bytes) -> AnyReply:
    """Raises: DecoderFailed for anything that a sound child does not send."""
    try:
        reply = _REPLIES.validate_json(packet)
    except ValidationError:
        raise nonsense() from None
    if isinstance(reply, RejectedReply) and not reply.detail.isprintable():
        raise nonsense()
    return reply


def nonsense() -> DecoderFailed:
    """The failure of a child whose answer makes no sense."""
    return DecoderFailed("crashed_decoder", "the decoder answered with nonsense")
