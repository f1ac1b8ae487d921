"""One source clip → the pixels of its bucket: (F, H, W, 3) uint8 RGB, frames picked by time stamp.

Videos: mp4/mov, matroska/webm and AVI, through FFmpeg. Images (PNG, JPEG, WebP): clips of one frame.
Safe to call from many threads; each call decodes with one thread of its own. What a clip's own fault is raises
ClipRejected (quarantine), what is the machine's raises MachineError (stop).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import av
import numpy as np

from mimir_precompute.clips.rejection import ClipRejected
from mimir_precompute.clips.source import IMAGE_FORMATS, SourceFile, SourceFormat, hash_file, open_source, recognise
from mimir_precompute.config import Bucket, Geometry
from mimir_precompute.decoding.frames import FrameCutter, Pixels, Span, Window, exact, shown_at
from mimir_precompute.decoding.image_file import decode_image
from mimir_precompute.decoding.video_file import WHOLE_CLIP_S, Video, open_video


@dataclass(frozen=True, kw_only=True)
class ClipPixels:
    """What the VAE is given of one clip."""

    pixels: Pixels
    """(F, H, W, 3) uint8 RGB, of the size of `bucket`."""
    bucket: Bucket
    source_xxh3: int
    """xxh3-64 of the source's bytes, unsigned."""


@dataclass(frozen=True, kw_only=True)
class ClipInfo:
    """What the headers and the first frame say of a clip; only decoding it proves its length."""

    frames: int | None
    """By the header; None if it does not say. 1 for images."""
    width: int
    """As shown: after rotation, in square pixels."""
    height: int
    end_s: float | None
    """End of the last frame after the begin of the first, by the header; None if it does not say, and for images."""
    codec: str
    is_image: bool


class ClipDecoder(Protocol):
    """Where pixels come from. Called from several threads at once."""

    def decode(
        self, source: bytes | Path, *, geometry: Geometry, start_s: float | None = None, end_s: float | None = None
    ) -> ClipPixels:
        """As read_clip does, wherever it is done. Raises: ClipRejected, MachineError."""
        ...

    def close(self) -> None:
        """End what was started for it."""
        ...


class DecodeInProcess:
    """Decodes in the calling thread: for input that we made ourselves, since a bad clip may end the whole process."""

    def decode(
        self, source: bytes | Path, *, geometry: Geometry, start_s: float | None = None, end_s: float | None = None
    ) -> ClipPixels:
        return read_clip(source, geometry=geometry, start_s=start_s, end_s=end_s)

    def read_first_frame(self, source: bytes | Path, *, longest_side: int, start_s: float | None = None) -> Pixels:
        return read_first_frame(source, longest_side=longest_side, start_s=start_s)

    def close(self) -> None:
        pass


Allocate = Callable[[Bucket], Pixels]
"""Gives the (F, H, W, 3) array that a clip of this bucket is written to."""


def num_frames_at(duration_s: float, fps: float) -> int:
    """How many frames picked at `fps` a clip of this duration gives: at 0, 1/fps, … up to its end."""
    span = Span(begin_s=Fraction(0), end_s=exact(duration_s), item=None)
    limit = int(duration_s * fps) + 2
    return len(list(shown_at([span], [index / exact(fps) for index in range(limit)])))


def choose_bucket(num_frames: int, *, width: int, height: int, geometry: Geometry) -> Bucket | None:
    """The bucket that a clip fills: most frames, then least cropped, then most pixels; None if it fills none.

    Args:
        num_frames: what the clip gives at the geometry's fps (num_frames_at).
        width, height: as shown, in any unit.
    """

    def merit(bucket: Bucket) -> tuple[int, Fraction, int, int]:
        relative = Fraction(width * bucket.height, height * bucket.width)
        kept = min(relative, 1 / relative)
        return bucket.frames, kept, bucket.height * bucket.width, bucket.height

    return max((bucket for bucket in geometry.buckets if bucket.frames <= num_frames), key=merit, default=None)


def read_clip(
    source: bytes | Path,
    *,
    geometry: Geometry,
    start_s: float | None = None,
    end_s: float | None = None,
    bucket: Bucket | None = None,
) -> ClipPixels:
    """Decode, pick, resize and crop one clip.

    Frame i is the one shown at start + i/fps, counted from the first shown frame of the video stream. The bucket
    depends on the decoded frames alone; headers only say what to try first. A clip that cannot be decoded to its end
    is rejected, never used up to the damage; but of clips above ten seconds no more is decoded than fills the bucket
    and shows that no longer one is filled.

    Args:
        start_s, end_s: the part of the video that is the clip; images have no time and ignore them.
        bucket: the one to fill; without it the best of the geometry's.
    Raises: ClipRejected, MachineError.
    """
    wanted = geometry if bucket is None else Geometry(buckets=(bucket,), fps=geometry.fps)
    with open_source(source) as file:
        source_xxh3 = hash_file(file)
        with of_source(source_xxh3):
            pixels, chosen = decode_clip(file, geometry=wanted, start_s=start_s, end_s=end_s)
        return ClipPixels(pixels=pixels, bucket=chosen, source_xxh3=source_xxh3)


@contextmanager
def of_source(source_xxh3: int) -> Iterator[None]:
    """Write the hash of the bytes into a rejection that leaves the block."""
    try:
        yield
    except ClipRejected as rejection:
        rejection.source_xxh3 = source_xxh3
        raise


def new_pixels(bucket: Bucket) -> Pixels:
    """(F, H, W, 3), not yet written."""
    return np.empty((bucket.frames, bucket.height, bucket.width, 3), np.uint8)


def decode_clip(
    file: SourceFile,
    *,
    geometry: Geometry,
    start_s: float | None,
    end_s: float | None,
    allocate: Allocate = new_pixels,
) -> tuple[Pixels, Bucket]:
    """The part of read_clip that hostile bytes can reach. Raises: ClipRejected."""
    source_format = recognise(file)
    if source_format in IMAGE_FORMATS:
        return _read_image(file, geometry, allocate)
    return _read_video(file, source_format, geometry, Window.of(start_s, end_s), allocate)


def probe_clip(source: bytes | Path) -> ClipInfo:
    """Headers and the first frame of a clip, which is decoded. Raises: ClipRejected, MachineError."""
    with open_source(source) as file:
        return probe_file(file)


def probe_file(file: SourceFile) -> ClipInfo:
    """The part of probe_clip that hostile bytes can reach. Raises: ClipRejected."""
    source_format = recognise(file)
    if source_format in IMAGE_FORMATS:
        rgb, orientation = decode_image(file.read())
        height, width = orientation.apply(rgb).shape[:2]
        return ClipInfo(frames=1, width=width, height=height, end_s=None, codec=source_format, is_image=True)
    with open_video(file, source_format) as video:
        width, height = video.shown_size()
        return ClipInfo(
            frames=video.header_frames,
            width=width,
            height=height,
            end_s=None if video.header_end_s is None else float(video.header_end_s),
            codec=video.codec,
            is_image=False,
        )


def read_first_frame(source: bytes | Path, *, longest_side: int, start_s: float | None = None) -> Pixels:
    """A still of a clip that may be damaged: its first frame that can be decoded, whatever comes after.

    Args:
        longest_side: pixels of the still's longer side; sides are multiples of 16.
        start_s: where the clip begins in the video; the still is of that moment or a little before.
    Returns: (H, W, 3) uint8 RGB, in the clip's own proportions.
    Raises: ClipRejected where not one frame can be decoded, MachineError.
    """
    with open_source(source) as file:
        return decode_first_frame(file, longest_side=longest_side, start_s=start_s)


def decode_first_frame(file: SourceFile, *, longest_side: int, start_s: float | None) -> Pixels:
    """The part of read_first_frame that hostile bytes can reach. Raises: ClipRejected."""
    source_format = recognise(file)
    if source_format in IMAGE_FORMATS:
        rgb, orientation = decode_image(file.read())
        height, width = orientation.apply(rgb).shape[:2]
        size = _still_size(width, height, longest_side)
        cutter = FrameCutter(bucket=size, orientation=orientation, sample_aspect=Fraction(1))
        return cutter.cut(av.VideoFrame.from_ndarray(rgb, format="rgb24"))
    with open_video(file, source_format, accept_truncated=True) as video:
        width, height = video.shown_size()
        size = _still_size(width, height, longest_side)
        cutter = FrameCutter(bucket=size, orientation=video.orientation, sample_aspect=video.sample_aspect)
        return cutter.cut(next(video.spans(Window.of(start_s, None).start_s)).item)


def _still_size(width: int, height: int, longest_side: int) -> Bucket:
    scale = longest_side / max(width, height)
    return Bucket(
        frames=1, height=max(16, round(height * scale / 16) * 16), width=max(16, round(width * scale / 16) * 16)
    )


def _read_image(file: SourceFile, geometry: Geometry, allocate: Allocate) -> tuple[Pixels, Bucket]:
    rgb, orientation = decode_image(file.read())
    height, width = orientation.apply(rgb).shape[:2]
    chosen = choose_bucket(1, width=width, height=height, geometry=geometry)
    if chosen is None:
        raise ClipRejected("geometry", "too_short", "a still image, and no bucket takes one frame")
    cutter = FrameCutter(bucket=chosen, orientation=orientation, sample_aspect=Fraction(1))
    frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
    pixels = allocate(chosen)
    pixels[0] = cutter.cut(frame)
    return pixels, chosen


def _read_video(
    file: SourceFile, source_format: SourceFormat, geometry: Geometry, window: Window, allocate: Allocate
) -> tuple[Pixels, Bucket]:
    longest = max(bucket.frames for bucket in geometry.buckets)
    with open_video(file, source_format) as video:
        width, height = video.shown_size()
        target = _first_guess(video, geometry, window)
        pixels = allocate(target)
        num_frames = _decode_clip(video, target, pixels, window, geometry.fps, longest)
    chosen = choose_bucket(num_frames, width=width, height=height, geometry=geometry)
    if chosen is None:
        shortest = min(bucket.frames for bucket in geometry.buckets)
        part = "" if window.start_s == 0 and window.end_s is None else " in the part that was asked for"
        raise ClipRejected(
            "geometry",
            "too_short",
            f"gives {num_frames} frames at {geometry.fps:g} fps{part}; the shortest bucket takes {shortest}",
        )
    if chosen != target:
        # the header misled: now the length is known
        with open_video(file, source_format) as video:
            pixels = allocate(chosen)
            num_frames = _decode_clip(video, chosen, pixels, window, geometry.fps, chosen.frames)
        assert num_frames == chosen.frames, f"{num_frames} frames at the second pass, {chosen} before"
    return pixels, chosen


def _first_guess(video: Video, geometry: Geometry, window: Window) -> Bucket:
    """The bucket to try, by the header; a wrong guess costs a second pass and changes nothing else."""
    longest = max(bucket.frames for bucket in geometry.buckets)
    num_frames = longest
    if video.header_end_s is not None:
        spans = window.cut([Span(begin_s=Fraction(0), end_s=video.header_end_s, item=None)])
        num_frames = len(list(shown_at(spans, window.instants_s(geometry.fps, longest))))
    shortest = min(bucket.frames for bucket in geometry.buckets)
    width, height = video.shown_size()
    guess = choose_bucket(max(num_frames, shortest), width=width, height=height, geometry=geometry)
    assert guess is not None, "the shortest bucket takes as many frames as the shortest bucket"
    return guess


def _decode_clip(video: Video, target: Bucket, pixels: Pixels, window: Window, fps: float, longest: int) -> int:
    """Fill the target's pixels, and count on to `longest`: the number of frames that the clip gives up to there.

    The pixels are whole only if the number is at least the target's.
    """
    cutter = FrameCutter(bucket=target, orientation=video.orientation, sample_aspect=video.sample_aspect)
    num_frames = 0
    last: av.VideoFrame | None = None
    spans = window.cut(video.spans(window.start_s))
    for frame in shown_at(spans, window.instants_s(fps, longest)):
        if num_frames < target.frames:
            if frame is last:
                pixels[num_frames] = pixels[num_frames - 1]
            else:
                pixels[num_frames] = cutter.cut(frame)
        last = frame
        num_frames += 1
    if _is_short(video, window):
        for _ in spans:
            pass
    return num_frames


def _is_short(video: Video, window: Window) -> bool:
    ends_s = [end_s for end_s in (video.header_end_s, window.end_s) if end_s is not None]
    return bool(ends_s) and min(ends_s) - window.start_s <= WHOLE_CLIP_S
