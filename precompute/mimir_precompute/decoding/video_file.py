"""One open video: its stream, its first frame, and its frames on a time line. FFmpeg sees listed containers only."""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import av
from av.container import InputContainer
from av.sidedata.sidedata import SideData
from av.stream import Disposition
from av.video.stream import VideoStream

from mimir_precompute.clips.rejection import ClipRejected
from mimir_precompute.clips.source import SourceFile, SourceFormat, missing_bytes
from mimir_precompute.decoding.frames import Orientation, Span

MAX_FRAME_PIXELS = 8192 * 8192
MAX_DECODED_FRAMES = 100_000
"""Of one pass over a clip: a file that makes millions of frames of a few bytes must end somewhere."""
WHOLE_CLIP_S = 10
"""A clip up to this long is decoded to its end, so that damage anywhere in it is found (if the decoder finds it at
all); of a longer one only what is needed is."""
MAX_DURATION_S = 7 * 24 * 3600

_STILL_BRANDS = frozenset(("avif", "avis", "heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "msf1"))
_SEEK_FROM_S = 4
_SEEK_MARGIN_S = 1  # containers index decoding times, which run ahead of the times of showing
_LONGEST_PIXEL = 16  # a sample aspect ratio beyond it, either way, is an error of the writer and is ignored


class Video:
    """One open video stream, at its first frame. `spans` can be read once."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._container = container
        self._stream = stream
        self._num_decoded = 0
        self._frames = self._decode()
        first = next(self._frames, None)
        if first is None:
            raise ClipRejected("decode", "undecodable", "no frame could be decoded")
        self._first = first
        self._first_s = _stamp_s(first) or Fraction(0)
        matrix = first.side_data.get("DISPLAYMATRIX")
        self.orientation = Orientation()
        if isinstance(matrix, SideData):
            self.orientation = Orientation.from_display_matrix(bytes(matrix))
        sample_aspect = stream.sample_aspect_ratio or Fraction(1)
        is_believable = Fraction(1, _LONGEST_PIXEL) <= sample_aspect <= _LONGEST_PIXEL
        self.sample_aspect = sample_aspect if is_believable else Fraction(1)
        self.codec = stream.codec_context.codec.name
        self.header_frames = stream.frames or None
        self.header_end_s = _header_end_s(container, stream)

    def shown_size(self) -> tuple[int, int]:
        """(width, height) after rotation, in square pixels."""
        width, height = max(1, round(self._first.width * self.sample_aspect)), self._first.height
        return (height, width) if self.orientation.transpose else (width, height)

    def spans(self, start_s: Fraction) -> Iterator[Span[av.VideoFrame]]:
        """Every frame from one shown at `start_s` or earlier; times count from the first frame.

        Raises: ClipRejected where decoding fails, be it after good frames.
        """
        frame: av.VideoFrame | None = self._first if start_s < _SEEK_FROM_S else self._seek(start_s)
        begin_s = end_s = Fraction(0)
        while frame is not None:
            stamp_s = _stamp_s(frame)
            # a frame without a stamp follows the one before; stamps never run backwards
            begin_s = max(begin_s, end_s if stamp_s is None else stamp_s - self._first_s)
            end_s = begin_s + self._duration_s(frame)
            yield Span(begin_s=begin_s, end_s=end_s, item=frame)
            frame = next(self._frames, None)

    def _seek(self, start_s: Fraction) -> av.VideoFrame:
        """The first frame after a jump to a key frame shown before `start_s`; else back to the very first."""
        assert self._stream.time_base is not None, "a video stream without a time base"
        for target_s in (self._first_s + start_s - _SEEK_MARGIN_S, self._first_s):
            try:
                self._container.seek(int(target_s / self._stream.time_base), stream=self._stream)
            except av.FFmpegError as error:
                raise rejection_of(error, f"cannot seek: {_text(error)}") from error
            self._frames = self._decode()
            frame = next(self._frames, None)
            stamp_s = None if frame is None else _stamp_s(frame)
            if frame is not None and stamp_s is not None and stamp_s <= self._first_s + start_s:
                return frame
        raise ClipRejected("decode", "undecodable", "cannot seek: its index of key frames is wrong")

    def _decode(self) -> Iterator[av.VideoFrame]:
        try:
            for frame in self._container.decode(self._stream):
                self._num_decoded += 1
                if self._num_decoded > MAX_DECODED_FRAMES:
                    raise ClipRejected("decode", "too_large", f"more than {MAX_DECODED_FRAMES} frames to decode")
                yield frame
        except av.FFmpegError as error:
            detail = f"{_text(error)} after {self._num_decoded} decoded frames"
            raise rejection_of(error, detail) from error

    def _duration_s(self, frame: av.VideoFrame) -> Fraction:
        if frame.duration and frame.time_base:
            return frame.duration * frame.time_base
        return 1 / self._stream.average_rate if self._stream.average_rate else Fraction(0)


@contextmanager
def open_video(file: SourceFile, source_format: SourceFormat, *, accept_truncated: bool = False) -> Iterator[Video]:
    """Open by content: one named container format, no protocol, no second file, limits before decoding.

    Args:
        accept_truncated: open a file that lacks bytes at its end as well, for what is left of it.
    """
    num_missing = 0 if accept_truncated else missing_bytes(file, source_format)
    if num_missing:
        raise ClipRejected("decode", "truncated", f"at least {num_missing} bytes are missing at its end")
    # the option reaches the decoders that look into streams with poor headers while the container is opened
    with _open_container(file, source_format, {"max_pixels": str(MAX_FRAME_PIXELS)}) as container:
        stream = _video_stream(container)
        if stream.codec_context.width == 0:
            # unknown, or withheld because it is above the limit: look again, with decoders that decode nothing
            position = file.tell()
            with _open_container(file, source_format, {"skip_frame": "all"}) as again:
                _video_stream(again)
            file.seek(position)
        yield Video(container, stream)


def _open_container(file: SourceFile, source_format: SourceFormat, decoder_options: dict[str, str]) -> InputContainer:
    file.seek(0)
    try:
        return av.open(
            file,
            mode="r",
            format=source_format,
            options={"protocol_whitelist": "", **decoder_options},
            metadata_errors="replace",
            io_open=_refuse_to_open,
        )
    except av.FFmpegError as error:
        raise rejection_of(error, f"{_text(error)} in its headers") from error


def _refuse_to_open(url: str, flags: int, options: dict[str, str]) -> None:
    raise PermissionError("a clip must not open another file")


def _video_stream(container: InputContainer) -> VideoStream:
    """The video stream marked as default, else the first; cover pictures do not count."""
    if container.metadata.get("major_brand", "").strip() in _STILL_BRANDS:
        raise ClipRejected("decode", "unsupported_format", "a HEIF or AVIF image; convert it to PNG, JPEG or WebP")
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise ClipRejected("decode", "no_video_stream", f"{len(container.streams)} streams, none of them a video")
    stream = next((s for s in streams if s.disposition & Disposition.default), streams[0])
    if stream.codec_context is None:
        raise ClipRejected("decode", "unsupported_format", "there is no decoder for its video stream")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_FRAME_PIXELS:
        detail = f"frames of {width}x{height}; the limit is {MAX_FRAME_PIXELS} pixels"
        raise ClipRejected("decode", "too_large", detail)
    _check_length(container, stream)
    # again in the decoder: a stream may announce one size in the container and another in its own headers
    stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
    # one thread: many clips are decoded at once, and errors come at the same frame every time
    stream.thread_count = 1
    stream.thread_type = "NONE"
    return stream


def _check_length(container: InputContainer, stream: VideoStream) -> None:
    """Refuse what the header says would be too much, before a frame is decoded."""
    end_s = _header_end_s(container, stream) or Fraction(0)
    if end_s > MAX_DURATION_S:
        raise ClipRejected("decode", "too_large", f"{float(end_s):.0f} s long; the limit is {MAX_DURATION_S}")
    if stream.frames > MAX_DECODED_FRAMES and end_s <= WHOLE_CLIP_S:
        detail = f"{stream.frames} frames to decode; the limit is {MAX_DECODED_FRAMES}"
        raise ClipRejected("decode", "too_large", detail)


def _header_end_s(container: InputContainer, stream: VideoStream) -> Fraction | None:
    if stream.duration and stream.time_base:
        return stream.duration * stream.time_base
    return Fraction(container.duration, av.time_base) if container.duration else None


def _stamp_s(frame: av.VideoFrame) -> Fraction | None:
    return None if frame.pts is None or frame.time_base is None else frame.pts * frame.time_base


def rejection_of(error: av.FFmpegError, detail: str) -> ClipRejected:
    """What an error of FFmpeg means for the clip: damaged, unless memory was refused."""
    return ClipRejected("decode", "out_of_memory" if isinstance(error, MemoryError) else "undecodable", detail)


def _text(error: av.FFmpegError) -> str:
    return error.strerror or type(error).__name__
