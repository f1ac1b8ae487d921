"""Does a video play? Decoded to its end, for a file that is there may still be cut short."""

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError


def read_video(path: Path) -> np.ndarray | None:
    """Every frame of a video, (F, H, W, 3) uint8; None where it is absent or does not decode to its end."""
    if not path.is_file():
        return None
    try:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in _frames(path)])
    except _UNREADABLE:
        return None


def plays(path: Path, num_frames: int, height: int, width: int) -> bool:
    """Whether a video decodes to this number of frames, all of this size."""
    if not path.is_file():
        return False
    try:
        sizes = [(frame.height, frame.width) for frame in _frames(path)]
    except _UNREADABLE:
        return False
    return sizes == [(height, width)] * num_frames


_UNREADABLE = (FFmpegError, OSError, IndexError, ValueError)
"""What PyAV and an empty list of frames raise: the caller is told, and makes the video again."""


def _frames(path: Path) -> Iterator[av.VideoFrame]:
    with av.open(str(path)) as container:
        yield from container.decode(video=0)
