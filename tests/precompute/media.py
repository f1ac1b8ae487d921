"""Odd media files for tests: small, made on the spot, of known content; and the usual questions about them."""

import io
import struct
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from mimir_precompute.clips.rejection import ClipRejected
from mimir_precompute.config import Bucket, Geometry
from mimir_precompute.decoding.clip_pixels import read_clip
from mimir_precompute.decoding.frames import Pixels

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def has_encoder(name: str) -> bool:
    try:
        av.Codec(name, "w")
    except (av.FFmpegError, ValueError):
        return False
    return True


def grey_frames(num_frames: int, *, height: int = 64, width: int = 96) -> list[Pixels]:
    """(h, w, 3) each: frame i is of grey 5 + 7i, so that a pixel tells its number (read_number), up to 35 frames."""
    assert num_frames <= 35, "the greys would run out"
    return [np.full((height, width, 3), 5 + 7 * index, np.uint8) for index in range(num_frames)]


def read_number(pixels: Pixels) -> int:
    """The number of a grey frame, whatever its codec did to it."""
    return round((float(pixels.mean()) - 5) / 7)


def quadrants(*, height: int = 64, width: int = 96) -> Pixels:
    """(h, w, 3): red | green over blue | white."""
    frame = np.empty((height, width, 3), np.uint8)
    frame[: height // 2, : width // 2], frame[: height // 2, width // 2 :] = RED, GREEN
    frame[height // 2 :, : width // 2], frame[height // 2 :, width // 2 :] = BLUE, WHITE
    return frame


def corner_names(frame: Pixels) -> tuple[str, str, str, str]:
    """What the four quarters look like: (top left, top right, bottom left, bottom right)."""
    height, width = frame.shape[:2]

    def name(y: int, x: int) -> str:
        bright = frame[y, x] > 127
        return {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 1): "white"}[tuple(bright.astype(int))]

    rows, columns = (height // 4, 3 * height // 4), (width // 4, 3 * width // 4)
    return name(rows[0], columns[0]), name(rows[0], columns[1]), name(rows[1], columns[0]), name(rows[1], columns[1])


@dataclass(frozen=True, kw_only=True)
class VideoStyle:
    """How a test video is written; the defaults are lossless H.264 in full-colour RGB steps of 4:4:4."""

    codec: str = "libx264"
    pixel_format: str = "yuv444p"
    fps: int = 8
    container: str = "mp4"
    options: tuple[tuple[str, str], ...] = (("qp", "0"), ("preset", "ultrafast"))
    stamps_ms: tuple[int, ...] | None = None
    """Time stamp of every frame, instead of one each 1/fps."""
    matrix: tuple[int, ...] | None = None
    """Display matrix: nine numbers."""
    sample_aspect: Fraction | None = None
    colorspace: int | None = None
    color_range: int | None = None
    faststart: bool = False
    with_audio: bool = False


MPEG4 = VideoStyle(codec="mpeg4", pixel_format="yuv420p", options=(("qscale", "2"),))
FFV1 = VideoStyle(codec="ffv1", pixel_format="yuv444p", container="matroska", options=())


def video_bytes(frames: Sequence[Pixels | av.VideoFrame], style: VideoStyle | None = None) -> bytes:
    """Encode (h, w, 3) RGB arrays, or frames as they are."""
    style = style or VideoStyle()
    # a file with a name: to move the index to the front, FFmpeg opens it a second time
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video"
        _write_video(path, frames, style)
        return path.read_bytes()


def _write_video(path: Path, frames: Sequence[Pixels | av.VideoFrame], style: VideoStyle) -> None:
    container_options = {"movflags": "faststart"} if style.faststart else {}
    with av.open(str(path), "w", format=style.container, options=container_options) as container:
        stream = container.add_stream(style.codec, rate=style.fps, options=dict(style.options))
        assert isinstance(stream, av.VideoStream)
        first = frames[0]
        stream.height, stream.width = first.shape[:2] if isinstance(first, np.ndarray) else (first.height, first.width)
        stream.pix_fmt = style.pixel_format
        # the tests that look at colours set both; the others use grey or tolerate a little
        if style.colorspace is not None:
            stream.codec_context.colorspace = style.colorspace
        if style.color_range is not None:
            stream.codec_context.color_range = style.color_range
        if style.sample_aspect is not None:
            stream.codec_context.sample_aspect_ratio = style.sample_aspect
        if style.matrix is not None:
            stream.set_display_matrix(style.matrix)
        if style.stamps_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        audio = container.add_stream("aac", rate=16000, layout="mono") if style.with_audio else None
        for index, frame in enumerate(frames):
            if isinstance(frame, np.ndarray):
                frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            frame.pts = index if style.stamps_ms is None else style.stamps_ms[index]
            frame.time_base = Fraction(1, style.fps) if style.stamps_ms is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None:
            container.mux(_silence(audio))


def _silence(audio: av.AudioStream) -> "list[av.Packet[av.AudioStream]]":
    packets = []
    for index in range(8):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, index * 1024
        packets += audio.encode(frame)
    return [*packets, *audio.encode()]


def audio_only_bytes() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        container.mux(_silence(container.add_stream("aac", rate=16000, layout="mono")))
    return buffer.getvalue()


def naive_frames(source: bytes) -> list[tuple[Fraction, Pixels]]:
    """Every frame of a video with its time from the first one, by the plainest means: the reference for picking."""
    frames = []
    with av.open(io.BytesIO(source), "r") as container:
        for frame in container.decode(video=0):
            assert frame.pts is not None
            assert frame.time_base is not None
            frames.append((frame.pts * frame.time_base, np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)))
    return [(time - frames[0][0], pixels) for time, pixels in frames]


def naive_pick(source: bytes, *, fps: int, num_frames: int, start_s: Fraction = Fraction(0)) -> list[Pixels]:
    """The last frame that begins not later than each instant."""
    frames = naive_frames(source)
    instants = [start_s + Fraction(index, fps) for index in range(num_frames)]
    return [[pixels for time, pixels in frames if time <= instant + Fraction(1, 1000)][-1] for instant in instants]


def image_bytes(pixels: npt.NDArray[Any], image_format: str, *, exif_orientation: int | None = None) -> bytes:
    """Of (h, w), (h, w, 3) or (h, w, 4); lossless where the format can."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    if exif_orientation is not None:
        exif[0x0112] = exif_orientation
    Image.fromarray(pixels).save(buffer, image_format, exif=exif, quality=95, lossless=True)
    return buffer.getvalue()


def huge_png_bytes() -> bytes:
    """A PNG of a hundred bytes that announces 60,000 x 60,000 pixels."""
    data = bytearray(image_bytes(np.zeros((8, 8, 3), np.uint8), "PNG"))
    data[16:24] = struct.pack(">II", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def ffconcat_beside(folder: Path, neighbour: bytes) -> Path:
    """A playlist named like a video, beside the video that it would open."""
    (folder / "neighbour.mp4").write_bytes(neighbour)
    disguised = folder / "clip.mp4"
    disguised.write_text("ffconcat version 1.0\nfile neighbour.mp4\n")
    return disguised


NINE = Bucket(frames=9, height=64, width=96)
ONE = Bucket(frames=1, height=64, width=96)
TINY = Geometry(buckets=(NINE, ONE), fps=8)


def numbers(pixels: Pixels) -> list[int]:
    """Of a clip of grey frames."""
    return [read_number(frame) for frame in pixels]


def psnr(a: Pixels, b: Pixels) -> float:
    return float(20 * np.log10(255 / max(1e-9, np.sqrt(np.mean((a.astype(float) - b.astype(float)) ** 2)))))


def rejection(
    source: bytes | Path,
    geometry: Geometry = TINY,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    bucket: Bucket | None = None,
) -> ClipRejected:
    """How a clip is rejected; fails if it is not."""
    with pytest.raises(ClipRejected) as caught:
        read_clip(source, geometry=geometry, start_s=start_s, end_s=end_s, bucket=bucket)
    assert str(source) not in caught.value.detail, "a path in the detail"
    return caught.value
