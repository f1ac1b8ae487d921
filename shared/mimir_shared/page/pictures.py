"""Pictures, still and moving, that a page carries inside itself."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image

_GAP = 4
"""Pixels between clips that share a picture."""
_REST_S = 0.6
"""How long the last frame stands before the clip begins again, so that the eye finds the begin."""
_QUALITY = 88


@dataclass(frozen=True, kw_only=True)
class Moving:
    """A clip as an animated WebP, which every browser plays without a codec, and its first frame for those who
    asked their system for less motion."""

    moving_uri: str
    still_uri: str
    width: int
    height: int


def moving_picture(clips: Sequence[np.ndarray], fps: float) -> Moving:
    """Put clips side by side into one picture: as one file they cannot drift apart in time.

    Args:
        clips: (F, H, W, 3) uint8 each, of equal H; one with fewer frames rests at its last.
    """
    num_frames = max(len(clip) for clip in clips)
    images = [Image.fromarray(_side_by_side(clips, index)) for index in range(num_frames)]
    width, height = images[0].size
    return Moving(moving_uri=_webp_uri(images, fps), still_uri=_webp_uri(images[:1], fps), width=width, height=height)


def _side_by_side(clips: Sequence[np.ndarray], index: int) -> np.ndarray:
    """One frame (H, W, 4) uint8; what lies between the clips is transparent."""
    opaque = [np.dstack([frame, np.full_like(frame[..., :1], 255)]) for frame in (clip[min(index, len(clip) - 1)]
                                                                                   for clip in clips)]  # fmt: skip
    gap = np.zeros((opaque[0].shape[0], _GAP, 4), dtype=np.uint8)
    parts = [opaque[0]]
    for frame in opaque[1:]:
        parts += [gap, frame]
    return np.concatenate(parts, axis=1)


@dataclass(frozen=True, kw_only=True)
class Still:
    """One frame as a WebP file."""

    uri: str
    width: int
    height: int


def still_picture(frame: np.ndarray, *, longest_side: int) -> Still:
    """A photograph, made smaller where it is larger than wanted.

    Args:
        frame: (H, W, 3) uint8.
        longest_side: pixels.
    """
    image = Image.fromarray(frame)
    image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    return Still(uri=_webp_uri([image], 1.0), width=image.width, height=image.height)


def pixel_picture(values: np.ndarray) -> Still:
    """(h, w, 3) uint8 values that are to be seen one by one: without loss, to be magnified by the page."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="WEBP", lossless=True, method=4)
    return Still(uri=_data_uri(buffer.getvalue()), width=values.shape[1], height=values.shape[0])


def _data_uri(webp: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(webp).decode()


def _webp_uri(images: Sequence[Image.Image], fps: float) -> str:
    # Whole milliseconds that add up: rounding each frame alone would let a long clip run late.
    ends = [round(1000 * (index + 1) / fps) for index in range(len(images))]
    durations = [end - begin for begin, end in pairwise([0, *ends])]
    durations[-1] += round(1000 * _REST_S)
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        format="WEBP",
        save_all=len(images) > 1,
        append_images=images[1:],
        duration=durations,
        loop=0,
        quality=_QUALITY,
        method=4,
    )
    return _data_uri(buffer.getvalue())


def psnr_db(original: np.ndarray, decoded: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 pixels over a whole clip; infinite where they are equal."""
    error = np.mean((original.astype(np.float64) - decoded.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error)) if error > 0 else float("inf")
