"""Make the page of a demo from what lies in its folder: python scripts/demo_page.py FOLDER"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from mimir_precompute.config import Bucket, ModelSource
from mimir_precompute.decoding.clip_pixels import read_clip
from mimir_precompute.encoders.vae import VaeEncoder
from mimir_precompute.inspection.clip_facts import describe_clip
from mimir_precompute.inspection.find_clip import posterior_mean, read_clip_tensors
from mimir_precompute.inspection.latent_decoder import load_decoder
from mimir_precompute.inspection.status import CacheStatus, read_status
from mimir_precompute.planning.plan import geometry_of
from mimir_precompute.presets import PRESETS
from mimir_shared.errors import MimirError
from mimir_shared.feature_folder import find_features
from mimir_shared.page.charts import LineChart, Series, line_chart, smoothed
from mimir_shared.page.pictures import Moving, moving_picture, psnr_db
from mimir_shared.page.render import render_page
from mimir_shared.plain_documents import parse_yaml
from mimir_shared.plan_file import Plan, read_plan
from mimir_shared.storage.folder import LocalStorage

TEMPLATE = Path(__file__).parent / "demo_page.html.j2"
LOSS_WINDOW = 20
LARGE_CLIPS = 500_000

Json = Any
"""What `json` reads; the library gives it no type."""
Points = list[tuple[float, float]]
"""(step, value)."""


@dataclass(frozen=True, kw_only=True)
class ClipCard:
    """A clip, and what the cache holds of it."""

    key: str
    caption: str
    picture: Moving
    psnr_db: float
    answer: str | None
    instruction_answers: tuple[tuple[str, str], ...]
    """Name of the instruction and what the LLM said to it."""


@dataclass(frozen=True, kw_only=True)
class QuarantinedClip:
    key: str
    feature: str
    stage: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class FeatureRow:
    """One feature in the table of sizes."""

    name: str
    tensors: tuple[str, ...]
    clips: int
    nbytes: int
    """Of the data files, as they lie on disk."""
    large_formula: str
    large_nbytes: int | None
    """Of LARGE_CLIPS clips at full size; None where it hangs on the answers' length."""


@dataclass(frozen=True, kw_only=True)
class TimelineMark:
    x: float
    feature: str
    after: bool


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """When shards were committed, laid out over 1000 units of width."""

    runs: tuple[tuple[float, float], ...]
    killed_at: float
    marks: tuple[TimelineMark, ...]
    seconds: tuple[tuple[float, int], ...]
    kept: int
    made: int


@dataclass(frozen=True, kw_only=True)
class SampleCard:
    prompt: str
    picture: Moving
    has_source: bool
    """A clip of the training data has this caption; it stands beside the sample."""


@dataclass(frozen=True, kw_only=True)
class Training:
    steps: int
    trained_clips: int
    held_out_clips: int
    seconds: float
    first_loss: float
    last_loss: float
    charts: tuple[tuple[str, str, LineChart], ...]
    """Heading, what it shows, chart."""


class CachePictures:
    """Source clips and their decoded latents, the VAE loaded once."""

    def __init__(self, storage: LocalStorage, plan: Plan, models: Path) -> None:
        self._storage = storage
        self._geometry = geometry_of(plan.settings)
        (folder,) = [folder for folder in find_features(storage) if folder.feature == "latents"]
        source = ModelSource(name=str(models), subfolder="vae")
        self._decoder: VaeEncoder = load_decoder(source, folder.read_spec().identity, "cpu")

    @property
    def fps(self) -> float:
        return self._geometry.fps

    def source(self, described: Mapping[str, Json], bucket: str) -> np.ndarray:
        """(F, H, W, 3) uint8, as the VAE was given it."""
        path = Path(described["source_root"]) / described["source"]
        wanted = Bucket.parse(bucket)
        clip = read_clip(
            path, geometry=self._geometry, bucket=wanted, start_s=described["start_s"], end_s=described["end_s"]
        )
        return clip.pixels

    def decoded(self, key: str) -> np.ndarray:
        """(F, H, W, 3) uint8, from the cache alone."""
        return self._decoder.decode_latents(posterior_mean(read_clip_tensors(self._storage, key, "latents")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="that scripts/demo.py wrote to")
    folder = parser.parse_args(arguments).folder
    try:
        page = build_page(folder)
    except MimirError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    sys.stdout.write(f"{path}: {len(page.encode()) / 1e6:.1f} MB, and nothing beside it is needed\n")
    return 0


def build_page(folder: Path) -> str:
    """The page of FOLDER/cache, and of FOLDER/run, FOLDER/samples and the story where they are there."""
    storage = LocalStorage(folder / "cache")
    plan, status = read_plan(storage), read_status(storage)
    pictures = CachePictures(storage, plan, folder / "toy" / "models")
    described = [describe_clip(storage, key) for key in sorted(plan.newest_rows())]
    shards = [clip["shard"] for clip in described if not quarantined_rows(clip)]
    story = _read_story(folder / "story.json")
    values = {
        "plan": plan.settings,
        "status": status,
        "clips": [card for clip in described if (card := clip_card(clip, pictures)) is not None],
        "quarantined": [row for clip in described for row in quarantined_rows(clip)],
        "features": feature_rows(storage, status, described),
        "large_clips": LARGE_CLIPS,
        "has_report": (folder / "report.html").is_file(),
        "story": story,
        "timeline": timeline(story) if story and len(story["runs"]) == 2 else None,
        "training": read_training(folder / "run", shards, plan.num_shards),
        "samples": sample_cards(folder / "samples", described, pictures),
    }
    return render_page(TEMPLATE, values)


def _read_story(path: Path) -> dict[str, Json] | None:
    story: dict[str, Json] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return story


def _feature_of(described: Mapping[str, Json], feature: str) -> Mapping[str, Json]:
    facts: Mapping[str, Json] = next(
        (facts for name, facts in described["features"].items() if name.startswith(f"{feature}/")), {}
    )
    return facts


def clip_card(described: Mapping[str, Json], pictures: CachePictures) -> ClipCard | None:
    """The card of one clip; None where the cache has no latents of it."""
    latents = _feature_of(described, "latents")
    if latents.get("status") != "ok":
        return None
    source = pictures.source(described, latents["bucket"])
    decoded = pictures.decoded(described["key"])
    (first, *_) = _feature_of(described, "answers").get("document", {}).get("variants") or (None,)
    return ClipCard(
        key=described["key"],
        caption=described["caption"],
        picture=moving_picture([source, decoded], pictures.fps),
        psnr_db=psnr_db(source, decoded),
        answer=first["answer"]["text"] if first else None,
        instruction_answers=tuple((one["name"], one["text"]) for one in first["instructions"]) if first else (),
    )


def quarantined_rows(described: Mapping[str, Json]) -> list[QuarantinedClip]:
    """Where and why a clip was left out; usually nowhere."""
    return [
        QuarantinedClip(
            key=described["key"],
            feature=name.partition("/")[0],
            stage=facts["stage"] or "",
            reason=facts["reason"] or "",
            detail=facts["detail"] or "",
        )
        for name, facts in described["features"].items()
        if facts["status"] == "quarantined"
    ]


def feature_rows(
    storage: LocalStorage, status: CacheStatus, described: Sequence[Mapping[str, Json]]
) -> list[FeatureRow]:
    """Tensors and sizes of each feature, and what the same would take for many large clips."""
    rows = []
    for folder in find_features(storage):
        facts = (_feature_of(clip, folder.feature) for clip in described)
        example: Mapping[str, Json] = next((one for one in facts if one.get("status") == "ok"), {"tensors": []})
        counted = next(one for one in status.features[folder.feature] if one.fingerprint == folder.fingerprint)
        tensors = [f"{t['name']}: {t['dtype']} {'×'.join(map(str, t['shape']))}" for t in example["tensors"]]
        formula, per_clip = _large_bytes(folder.feature)
        rows.append(
            FeatureRow(
                name=folder.feature,
                tensors=tuple(tensors) or ("text and token ids, as JSON",),
                clips=counted.ok,
                nbytes=counted.bytes,
                large_formula=formula,
                large_nbytes=None if per_clip is None else per_clip * LARGE_CLIPS,
            )
        )
    return rows


def _large_bytes(feature: str) -> tuple[str, int | None]:
    """Bytes of one clip with the cogvideox-5b preset and Phi-3.5-mini: the formula, and its value where it is fixed."""
    preset = PRESETS["cogvideox-5b"]
    (bucket,) = preset.geometry.buckets
    frames, height, width = (bucket.frames - 1) // 4 + 1, bucket.height // 8, bucket.width // 8
    rows = preset.t5_max_length
    match feature:
        case "latents":
            return f"32 channels × {frames} × {height} × {width} × 2 bytes", 32 * frames * height * width * 2
        case "t5":
            return f"{rows} × 4096 × 2 bytes, and {rows} × 12 bytes of ids and offsets", rows * (4096 * 2 + 12)
        case "llm":
            return "(caption + answer + 4 tokens) × 3072 × 2 bytes", None
        case _:
            return "the text", None


def timeline(story: Mapping[str, Json]) -> Timeline:
    """Lay out the two lives of `encode` on one axis."""
    first, second = story["runs"]
    begin = float(first["begin_s"])
    span = float(second["end_s"]) - begin

    def place(at_s: float) -> float:
        return round(1000 * (at_s - begin) / span, 1)

    marks = tuple(
        TimelineMark(x=place(one["at_s"]), feature=one["feature"], after=one["at_s"] > first["end_s"])
        for one in story["commits"]
    )
    every_s = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if span / step <= 10)
    return Timeline(
        runs=tuple((place(run["begin_s"]), place(run["end_s"])) for run in (first, second)),
        killed_at=place(first["end_s"]),
        marks=marks,
        seconds=tuple((place(begin + second), second) for second in range(0, int(span) + 1, every_s)),
        kept=sum(not mark.after for mark in marks),
        made=sum(mark.after for mark in marks),
    )


def read_training(run: Path, shards: Sequence[int], num_shards: int) -> Training | None:
    """Loss and fuser figures of a run; None where there is none.

    Args:
        shards: of every clip that is good in all features.
    """
    if not (run / "metrics.jsonl").is_file():
        return None
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    config = parse_yaml((run / "config.yaml").read_text(encoding="utf-8"))
    held_out = sum(shard >= num_shards - config["data"]["validation_shards"] for shard in shards)

    def points(name: str) -> Points:
        return [(line["step"], line[name]) for line in lines if name in line]

    losses = points("loss")
    means = smoothed(losses, LOSS_WINDOW)
    early, late = means[min(LOSS_WINDOW, len(means)) - 1][1], means[-1][1]
    return Training(
        steps=len(lines),
        trained_clips=len(shards) - held_out,
        held_out_clips=held_out,
        seconds=sum(line["step_s"] + line["data_wait_s"] for line in lines),
        first_loss=early,
        last_loss=late,
        charts=(_loss_chart(losses, means, points("validation/loss")), *_fuser_charts(points)),
    )


def _loss_chart(losses: Points, means: Points, held_out: Points) -> tuple[str, str, LineChart]:
    series = [
        Series(label="each step", points=losses, colour=0, look="faint"),
        Series(label=f"mean of {LOSS_WINDOW} steps", points=means, colour=0),
    ]
    if held_out:
        series.append(Series(label="clips that are not trained on", points=held_out, colour=1, look="dots"))
    drawn = line_chart(
        series,
        description=f"Training loss, from {means[0][1]:.2f} at the first step to {means[-1][1]:.2f} at the last.",
        x_label="training step",
    )
    return "Loss", "Mean squared error of the predicted v; a model that knows nothing is near 1.", drawn


def _fuser_charts(points: Callable[[str], Points]) -> list[tuple[str, str, LineChart]]:
    """`points`: the values of one figure by its name."""
    groups = (
        (
            "Both projections grow from zero",
            "Norms of the fuser's two zero-initialised maps. At step 0 they add nothing: the model is the T5-only one.",
            "Norm of each zero-initialised projection",
            (("encoder_zero_proj_norm", "Zθ, on T5"), ("decoder_zero_proj_norm", "Zβ, on the LLM")),
        ),
        (
            "Share of each branch in the text",
            "Root mean square of a branch of the fused tokens, over the sum of all three. T5 alone has 1.",
            "Share of each branch in the fused tokens",
            (("t5_share", "T5"), ("decoder_share", "LLM, through Zβ"), ("encoder_residual_share", "T5, through Zθ")),
        ),
    )
    charts = []
    for heading, says, what, names in groups:
        series = [
            Series(label=label, points=points(f"fuser/{name}"), colour=colour)
            for colour, (name, label) in enumerate(names)
        ]
        series = [one for one in series if one.points]
        if series:
            ends = "; ".join(f"{one.label} from {one.points[0][1]:.2f} to {one.points[-1][1]:.2f}" for one in series)
            drawn = line_chart(series, description=f"{what}: {ends}.", x_label="training step")
            charts.append((heading, says, drawn))
    return charts


def sample_cards(folder: Path, described: Sequence[Mapping[str, Json]], pictures: CachePictures) -> list[SampleCard]:
    """Each sample, beside the clip whose caption it was made from where there is one."""
    listed = folder / "samples.jsonl"
    if not listed.is_file():
        return []
    usable = [clip for clip in described if _feature_of(clip, "latents").get("status") == "ok"]
    by_caption = {clip["caption"]: clip for clip in usable}
    cards = []
    for line in listed.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        clips = [read_frames(folder / entry["file"])]
        source = by_caption.get(entry["prompt"])
        if source is not None:
            clips.insert(0, pictures.source(source, _feature_of(source, "latents")["bucket"]))
        picture = moving_picture(clips, pictures.fps)
        cards.append(SampleCard(prompt=entry["prompt"], picture=picture, has_source=source is not None))
    return cards


def read_frames(path: Path) -> np.ndarray:
    """(F, H, W, 3) uint8: all of a video's frames."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


if __name__ == "__main__":
    sys.exit(main())
