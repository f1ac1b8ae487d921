"""From decoded frames to a clip's pixels: which frame is shown when, which way is up, and the cut to a bucket."""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Generic, TypeVar

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from mimir_precompute.clips.rejection import ClipRejected, RejectionReason
from mimir_precompute.config import Bucket

RESIZE_KERNEL = "swscale-bicubic-1"
"""Part of the identity of latents. Change the number whenever the code below changes a pixel.

One pass of swscale from the stored colours to RGB at the wanted size: bicubic, widened when shrinking (no aliasing),
full chroma, exact rounding, one thread: the same bytes on every CPU and whatever the number of workers.
"""

TIME_TOLERANCE_S = Fraction(1, 1000)
"""A frame stamped up to this much late still counts as shown: matroska rounds time stamps to milliseconds."""

Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")

_SCALING = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED
_CROP_FIRST_ABOVE = 4  # times the bucket's area: beyond it, cropping before scaling bounds time and memory


@dataclass(frozen=True, kw_only=True)
class Span(Generic[T]):
    """An item shown from `begin_s` until the next one begins, the last one up to and with `end_s` (>= begin_s)."""

    begin_s: Fraction
    end_s: Fraction
    item: T


def shown_at(spans: Iterable[Span[T]], instants_s: Sequence[Fraction]) -> Iterator[T]:
    """For each instant the item then shown: the last whose begin is not later; an instant at the very end counts.

    Args:
        spans: by begin; read no further than the first that begins after the last instant.
        instants_s: ascending, not before the first span.
    """
    waiting = iter(instants_s)
    instant_s = next(waiting, None)
    shown: Span[T] | None = None
    for span in spans:
        while shown is not None and instant_s is not None and instant_s + TIME_TOLERANCE_S < span.begin_s:
            yield shown.item
            instant_s = next(waiting, None)
        if instant_s is None:
            return
        shown = span
    while shown is not None and instant_s is not None and instant_s <= shown.end_s + TIME_TOLERANCE_S:
        yield shown.item
        instant_s = next(waiting, None)


def exact(value: float) -> Fraction:
    """The decimal that the user wrote, not the binary number nearest to it."""
    return Fraction(str(value))


@dataclass(frozen=True, kw_only=True)
class Window:
    """The part of a clip that is asked for, counted from its first shown frame."""

    start_s: Fraction
    end_s: Fraction | None

    @classmethod
    def of(cls, start_s: float | None, end_s: float | None) -> "Window":
        return cls(start_s=exact(start_s or 0.0), end_s=None if end_s is None else exact(end_s))

    def instants_s(self, fps: float, limit: int) -> list[Fraction]:
        """The first `limit` instants at which frames are wanted: start, start + 1/fps, …"""
        if self.end_s is not None and self.end_s <= self.start_s:
            return []
        return [self.start_s + index / exact(fps) for index in range(limit)]

    def cut(self, spans: Iterable[Span[T]]) -> Iterator[Span[T]]:
        """The spans as if the file ended at the window's end: what begins there or later is no part of the clip."""
        for span in spans:
            if self.end_s is None:
                yield span
            elif span.begin_s + TIME_TOLERANCE_S < self.end_s:
                yield replace(span, end_s=min(span.end_s, self.end_s))
            else:
                return


@dataclass(frozen=True, kw_only=True)
class Orientation:
    """How stored pixels become upright ones: transpose first, then mirror."""

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    @classmethod
    def from_display_matrix(cls, data: bytes) -> "Orientation":
        """Of the nine int32 (a b u; c d v; x y w): x' = ax + cy, y' = bx + dy, y downwards.

        Raises: ClipRejected if it turns by anything but a multiple of 90 degrees.
        """
        if len(data) != 36:
            return cls()
        a, b, _, c, d, *_ = struct.unpack("=9i", data)
        if b == c == 0:
            # a matrix of zeros is what careless writers leave: it means nothing
            return cls(mirror_x=a < 0, mirror_y=d < 0)
        if a == d == 0:
            return cls(transpose=True, mirror_x=c < 0, mirror_y=b < 0)
        raise ClipRejected("decode", "unsupported_format", "turned by an angle that is no multiple of 90 degrees")

    @classmethod
    def from_exif(cls, value: object) -> "Orientation":
        """Of the EXIF tag 0x0112; anything outside 2-8 means upright."""
        return _EXIF_ORIENTATIONS.get(value, cls()) if isinstance(value, int) else cls()

    def apply(self, pixels: Pixels) -> Pixels:
        """(h, w, 3) stored → (H, W, 3) upright, a view."""
        if self.transpose:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]


_EXIF_ORIENTATIONS = {
    2: Orientation(mirror_x=True),
    3: Orientation(mirror_x=True, mirror_y=True),
    4: Orientation(mirror_y=True),
    5: Orientation(transpose=True),
    6: Orientation(transpose=True, mirror_x=True),
    7: Orientation(transpose=True, mirror_x=True, mirror_y=True),
    8: Orientation(transpose=True, mirror_y=True),
}


class FrameCutter:
    """Turns stored frames into upright RGB of a bucket's size: resized to cover, cropped in the centre.

    Colours: the stream's own matrix and range. Where a stream names no matrix: BT.709 from 1280 pixels of width or
    more than 576 of height, else BT.601, as players do; no range: limited. Transfer curve and primaries stay as they
    are, so HDR (PQ, HLG) looks pale: it is not tone-mapped. Transparent pixels are laid on black. Interlaced frames
    are taken whole.
    """

    def __init__(self, *, bucket: Bucket, orientation: Orientation, sample_aspect: Fraction) -> None:
        self._orientation = orientation
        self._sample_aspect = sample_aspect
        # the bucket's size as stored, before the frame is turned upright
        self._height, self._width = bucket.height, bucket.width
        if orientation.transpose:
            self._height, self._width = self._width, self._height
        self._reformatter = VideoReformatter()

    def cut(self, frame: av.VideoFrame) -> Pixels:
        """(H, W, 3) uint8 RGB. Raises ClipRejected for colours that cannot be converted."""
        try:
            return self._orientation.apply(self._scale_and_crop(frame))
        except av.FFmpegError as error:
            detail = f"frames of {frame.format.name} cannot be converted to RGB: {error.strerror}"
            reason: RejectionReason = "out_of_memory" if isinstance(error, MemoryError) else "unsupported_format"
            raise ClipRejected("decode", reason, detail) from error

    def _scale_and_crop(self, frame: av.VideoFrame) -> Pixels:
        has_alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
        height, width = self._covering_size(frame)
        if has_alpha or height * width > _CROP_FIRST_ABOVE * self._height * self._width:
            frame = av.VideoFrame.from_ndarray(self._crop_stored(self._to_rgb(frame, has_alpha)), format="rgb24")
            height, width = self._covering_size(frame)
        scaled = self._reformat(frame, "rgb24", height=height, width=width)
        top, left = (height - self._height) // 2, (width - self._width) // 2
        return scaled[top : top + self._height, left : left + self._width]

    def _cover_scale(self, frame_height: int, frame_width: int) -> Fraction:
        """Bucket pixels per stored row; a stored column counts `sample_aspect` as much."""
        return max(Fraction(self._height, frame_height), Fraction(self._width, frame_width) / self._sample_aspect)

    def _covering_size(self, frame: av.VideoFrame) -> tuple[int, int]:
        scale = self._cover_scale(frame.height, frame.width)
        width = frame.width * self._sample_aspect * scale
        # an even surplus: the crop is centred to the pixel, at the cost of stretching by one pixel at most
        surplus_height = 2 * round((frame.height * scale - self._height) / 2)
        surplus_width = 2 * round((width - self._width) / 2)
        return self._height + surplus_height, self._width + surplus_width

    def _crop_stored(self, rgb: Pixels) -> Pixels:
        """The centre that the bucket shows, in stored pixels."""
        scale = self._cover_scale(*rgb.shape[:2])
        height = min(rgb.shape[0], ceil(self._height / scale))
        width = min(rgb.shape[1], ceil(self._width / scale / self._sample_aspect))
        top, left = (rgb.shape[0] - height) // 2, (rgb.shape[1] - width) // 2
        return np.ascontiguousarray(rgb[top : top + height, left : left + width])

    def _to_rgb(self, frame: av.VideoFrame, has_alpha: bool) -> Pixels:
        if not has_alpha:
            return self._reformat(frame, "rgb24", height=frame.height, width=frame.width)
        return lay_on_black(self._reformat(frame, "rgba", height=frame.height, width=frame.width))

    def _reformat(self, frame: av.VideoFrame, pixel_format: str, *, height: int, width: int) -> Pixels:
        reformatted = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format=pixel_format,
            src_colorspace=_assumed_matrix(frame),
            src_color_range=_assumed_range(frame),
            interpolation=_SCALING,
            threads=1,
        )
        return reformatted.to_ndarray().astype(np.uint8, copy=False)


def lay_on_black(rgba: Pixels) -> Pixels:
    """(h, w, 4) with straight alpha → (h, w, 3)."""
    product = rgba[..., :3].astype(np.uint16) * rgba[..., 3:]
    return ((product + 127) // 255).astype(np.uint8)


def _assumed_matrix(frame: av.VideoFrame) -> int | None:
    if frame.format.is_rgb or frame.colorspace != _UNSPECIFIED:
        return None
    is_high_definition = frame.width >= 1280 or frame.height > 576
    return int(Colorspace.ITU709 if is_high_definition else Colorspace.ITU601)


def _assumed_range(frame: av.VideoFrame) -> int | None:
    # the yuvj formats are full range by their name
    is_known = frame.color_range != ColorRange.UNSPECIFIED or frame.format.name.startswith("yuvj")
    return None if frame.format.is_rgb or is_known else int(ColorRange.MPEG)
