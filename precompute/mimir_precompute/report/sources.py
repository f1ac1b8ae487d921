"""Frames of source clips for the page, by way of a decoder that a bad clip cannot take down with it."""

from pathlib import Path
from typing import Protocol

from mimir_precompute.clips.fetch import ClipFetcher
from mimir_precompute.config import Bucket, Geometry
from mimir_precompute.decoding.clip_pixels import ClipDecoder, ClipPixels
from mimir_precompute.decoding.frames import Pixels
from mimir_precompute.planning.plan import geometry_of
from mimir_shared.plan_file import PlannedClip, PlanSettings


class FrameDecoder(ClipDecoder, Protocol):
    """A ClipDecoder that gives stills of damaged clips as well."""

    def read_first_frame(self, source: bytes | Path, *, longest_side: int, start_s: float | None = None) -> Pixels:
        """As clips.read_first_frame does, wherever it is done. Raises: ClipRejected, MachineError."""
        ...


class SourceFrames:
    """Finds and decodes the clips of one plan. Each call raises ClipRejected or MachineError."""

    def __init__(self, settings: PlanSettings, decoder: FrameDecoder) -> None:
        self._fetcher = ClipFetcher(settings.source_root)
        self._geometry = geometry_of(settings)
        self._decoder = decoder

    def read(self, clip: PlannedClip, bucket: str | None) -> ClipPixels:
        """The clip as the VAE is given it; in the bucket that it was encoded in, where that is known."""
        geometry = self._geometry
        if bucket is not None:
            geometry = Geometry(buckets=(Bucket.parse(bucket),), fps=geometry.fps)
        with self._fetcher.fetch(clip) as source:
            return self._decoder.decode(source, geometry=geometry, start_s=clip.start_s, end_s=clip.end_s)

    def read_still(self, clip: PlannedClip, longest_side: int) -> Pixels:
        """(H, W, 3) uint8: the first frame that can be decoded, whatever is wrong with the rest."""
        with self._fetcher.fetch(clip) as source:
            return self._decoder.read_first_frame(source, longest_side=longest_side, start_s=clip.start_s)
