"""How long clips, captions and answers are, as histograms."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mimir_precompute.config import Bucket
from mimir_precompute.report.samples import ClipSample, SampleReader
from mimir_precompute.report.scan import CacheScan, spread_evenly
from mimir_shared.page.charts import Histogram, histogram
from mimir_shared.page.render import format_number

NUM_SAMPLED = 256
"""Clips whose samples are read for what the commit records do not say."""


@dataclass(frozen=True, kw_only=True)
class LengthFigure:
    """A histogram and what it comes to."""

    title: str
    chart: Histogram
    says: str


@dataclass(frozen=True, kw_only=True)
class BucketRow:
    name: str
    duration_s: float | None
    """From the first frame to the last; None for a still image."""
    clips: int


def bucket_rows(scan: CacheScan, fps: float) -> list[BucketRow]:
    """Clips of each bucket, the longest and largest first."""

    def size(name: str) -> tuple[int, int]:
        bucket = Bucket.parse(name)
        return bucket.frames, bucket.height * bucket.width

    rows = []
    for name in sorted(scan.buckets, key=size, reverse=True):
        frames = Bucket.parse(name).frames
        duration_s = (frames - 1) / fps if frames > 1 else None
        rows.append(BucketRow(name=name.replace("x", "×"), duration_s=duration_s, clips=scan.buckets[name]))
    return rows


def length_figures(scan: CacheScan, reader: SampleReader) -> list[LengthFigure]:
    """Every length that the cache knows; those of tokens are of clips spread over all shards."""
    windows = [clip.end_s - (clip.start_s or 0.0) for clip in scan.planned if clip.end_s is not None]
    sources = [clip.source_bytes for clip in scan.planned if clip.source_bytes is not None]
    unit, scale = ("MB", 1e6) if max(sources, default=0) >= 2e6 else ("kB", 1e3)
    figures = [
        _figure("Caption, in words", "words", [len(clip.caption.split()) for clip in scan.planned]),
        *_token_figures(scan, reader),
        _figure("Part of the source that is the clip", "seconds", windows),
        _figure("Source file", unit, [size / scale for size in sources]),
    ]
    return [figure for figure in figures if figure is not None]


def _token_figures(scan: CacheScan, reader: SampleReader) -> list[LengthFigure | None]:
    chosen = spread_evenly(scan.planned, NUM_SAMPLED)
    captions: list[int] = []
    answers: list[int] = []
    answer_words: list[int] = []
    instructions: list[int] = []
    for clip in chosen:
        t5, said = reader.read(clip, "t5"), reader.read(clip, "answers")
        if t5 is not None:
            captions.append(_t5_tokens(t5))
        if said is not None:
            variant = said.document["variants"][0]
            answers.append(len(variant["answer"]["token_ids"]))
            answer_words.append(len(variant["answer"]["text"].split()))
            instructions += [len(one["token_ids"]) for one in variant["instructions"]]
    of = "" if len(chosen) == len(scan.planned) else f"{len(chosen):,} clips, spread over all shards: "
    limits = {feature: folder.read_spec().identity for feature, folder in scan.features.items()}
    answer_limits = limits.get("answers", {})
    return [
        _figure("Caption, in T5 tokens", "tokens", captions, limit=limits.get("t5", {}).get("max_length"), of=of),
        _figure("Answer to the caption, in tokens", "tokens", answers, limit=answer_limits.get("max_answer_tokens"),
                of=of),
        _figure("Answer to the caption, in words", "words", answer_words, of=of),
        _figure("Answers to instructions, in tokens", "tokens", instructions, what="answers",
                limit=answer_limits.get("max_instruction_tokens"), of=of),
    ]  # fmt: skip


def _t5_tokens(sample: ClipSample) -> int:
    """Tokens of the caption, end token included and padding left out."""
    (num_rows, *_) = sample.tensors["t5_embeds"].array.shape
    return int(sample.document.get("valid_rows", {}).get("t5_embeds", num_rows))


def _figure(
    title: str, unit: str, values: Sequence[float], *, what: str = "clips", limit: int | None = None, of: str = ""
) -> LengthFigure | None:
    """None where there is nothing to count."""
    if not values:
        return None
    middle, longest = format_number(statistics.median(values)), format_number(max(values))
    says = f"{of}median {middle}, from {format_number(min(values))} to {longest} {unit}."
    if limit is not None:
        reached = sum(value >= limit for value in values)
        says += f" {'None' if reached == 0 else f'{reached:,}'} of {len(values):,} at the limit of {limit}."
    return LengthFigure(
        title=title, chart=histogram(values, unit=unit, x_label=unit, y_label=what), says=says[0].upper() + says[1:]
    )
