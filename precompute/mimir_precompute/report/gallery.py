"""Clips to look at: a source frame beside what the cache kept of the same moment, and what the LLM said to the caption.

Without a VAE the latents are shown in false colours: that needs no model and still shows what a latent is of.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mimir_precompute.clips.rejection import ClipRejected
from mimir_precompute.config import Bucket
from mimir_precompute.inspection.find_clip import posterior_mean
from mimir_precompute.report.false_colours import fit_colours
from mimir_precompute.report.samples import ClipSample, SampleReader
from mimir_precompute.report.scan import CacheScan, spread_evenly
from mimir_precompute.report.sources import SourceFrames
from mimir_shared.errors import MachineError
from mimir_shared.page.pictures import Still, pixel_picture, psnr_db, still_picture
from mimir_shared.plan_file import PlannedClip

LatentDecoder = Callable[[np.ndarray], np.ndarray]
"""(C, T, h, w) float32 unscaled latents → (F, H, W, 3) uint8."""

_FIRST_CHUNK = 3
"""Latent frames that CogVideoX's VAE decodes first, of an odd number of them: what comes of these alone is what comes
of them in a whole clip, at a fraction of the cost."""
_LONGEST_SIDE = 480
"""Pixels of a picture in the page."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class GalleryCard:
    """One clip. A picture that is not there leaves a note that says why."""

    clip: PlannedClip
    bucket: str | None
    moment_s: float
    """Of both pictures, after the begin of the clip."""
    source: Still | None
    source_note: str = ""
    latent: Still | None = None
    latent_note: str = ""
    psnr_db: float | None = None
    """Of the decoded frame against the source frame; None in false colours."""
    answers: tuple[Answer, ...] = ()
    """To the caption first, then one for each instruction."""


@dataclass(frozen=True, kw_only=True)
class _Moment:
    """One latent frame, and the source frame that it ends with."""

    latents: np.ndarray
    """(C, t, h, w) float32, from the clip's begin up to the moment."""
    frame: int


def gallery_cards(
    scan: CacheScan, reader: SampleReader, sources: SourceFrames, fps: float, count: int, decode: LatentDecoder | None
) -> list[GalleryCard]:
    """Cards of clips spread over all shards, the same for the same cache.

    Args:
        decode: the VAE that encoded; without one the latents are shown in false colours.
    """
    chosen = spread_evenly(scan.usable or scan.with_latents or scan.planned, count)
    samples = [reader.read(clip, "latents") for clip in chosen]
    moments = [None if sample is None else _find_moment(sample) for sample in samples]
    shown = [moment.latents[:, -1] for moment in moments if moment is not None]
    colours = fit_colours(shown) if decode is None and shown else None
    cards = []
    for clip, sample, moment in zip(chosen, samples, moments, strict=True):
        card, frame = _source_card(clip, sample, moment, sources, fps)
        if moment is not None and colours is not None:
            card = replace(card, latent=pixel_picture(colours.paint(moment.latents[:, -1])))
        elif moment is not None and decode is not None:
            decoded = decode(moment.latents)[moment.frame]
            card = replace(
                card,
                latent=still_picture(decoded, longest_side=_LONGEST_SIDE),
                psnr_db=None if frame is None else psnr_db(frame, decoded),
            )
        else:
            card = replace(card, latent_note="no latents of this clip in the cache")
        cards.append(replace(card, answers=_read_answers(reader.read(clip, "answers"))))
    return cards


def _find_moment(sample: ClipSample) -> _Moment:
    latents = posterior_mean(sample.tensors)[:, :_FIRST_CHUNK]  # (C, t, h, w)
    total = next(iter(sample.tensors.values())).array.shape[1]
    frames = Bucket.parse(sample.record.bucket or "1x16x16").frames
    stride = (frames - 1) // (total - 1) if total > 1 else 1
    return _Moment(latents=latents, frame=(latents.shape[1] - 1) * stride)


def _source_card(
    clip: PlannedClip, sample: ClipSample | None, moment: _Moment | None, sources: SourceFrames, fps: float
) -> tuple[GalleryCard, np.ndarray | None]:
    """The card with its source frame, and that frame (H, W, 3) at full size."""
    bucket = sample.record.bucket if sample is not None else None
    index = moment.frame if moment is not None else 0
    card = GalleryCard(clip=clip, bucket=bucket, moment_s=index / fps, source=None)
    try:
        found = sources.read(clip, bucket)
    except ClipRejected as rejected:
        return replace(card, source_note=str(rejected)), None
    except MachineError as fault:
        return replace(card, source_note=str(fault)), None
    if sample is not None and sample.record.source_xxh3 not in (None, found.source_xxh3):
        return replace(card, source_note="the source file was changed after it was encoded"), None
    frame = found.pixels[index]
    return replace(card, source=still_picture(frame, longest_side=_LONGEST_SIDE)), frame


def _read_answers(sample: ClipSample | None) -> tuple[Answer, ...]:
    if sample is None:
        return ()
    variant = sample.document["variants"][0]
    return (
        Answer(name="answer", text=variant["answer"]["text"]),
        *(Answer(name=one["name"], text=one["text"]) for one in variant["instructions"]),
    )
