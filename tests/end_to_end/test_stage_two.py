"""Stage two as a user runs it: real clips from the cache to a video, and what is refused on the way."""

import json
from pathlib import Path

import av
import pytest

from tests.programs import run


@pytest.fixture(scope="module")
def trained(real_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 50 steps on the cache of the real clips."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = run(
        "mimir-train", "run", "--cache", real_cache, "--preset", "tiny", "--output-dir", folder,
        "--global-batch-size", 4, "--max-train-steps", 50, "--report-to", "none",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "1x64x96" in done.err, "the bucket with one clip is smaller than a batch: that is said"
    return folder


def test_real_clips_train_50_steps_from_the_bucket_that_fills_a_batch(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(50))
    assert {line["bucket"] for line in lines} == {"9x64x96"}
    assert sum(line["loss"] for line in lines[-10:]) < sum(line["loss"] for line in lines[:10])
    assert (trained / "checkpoints" / "step-00000050" / "checkpoint.json").is_file()


def test_a_batch_larger_than_every_bucket_is_refused_before_anything_is_written(
    real_cache: Path, tmp_path: Path
) -> None:
    arguments = ("run", "--cache", real_cache, "--preset", "tiny", "--output-dir", tmp_path / "run")
    done = run("mimir-train", *arguments, "--global-batch-size", 16)
    assert done.code == 2, done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "16" in line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_sampling_makes_a_playable_video_of_the_presets_size(trained: Path, toy_world: Path, tmp_path: Path) -> None:
    done = run(
        "mimir-train", "sample", "--checkpoint", trained, "--models", toy_world / "models",
        "--prompt", "A horse gallops to the right.", "--output-dir", tmp_path, "--num-inference-steps", 4,
    )  # fmt: skip
    assert done.code == 0, done.err
    (video,) = tmp_path.rglob("*.mp4")
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert (stream.codec_context.name, float(stream.average_rate or 0)) == ("h264", 8.0)
    assert [(frame.width, frame.height) for frame in frames] == [(96, 64)] * 9
    assert (tmp_path / "contact_sheet.png").stat().st_size > 1000


def test_models_that_the_checkpoint_was_not_trained_with_are_refused(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert run("mimir-precompute", "toy", other, "--clips", 1, "--seed", 7).code == 0
    done = run(
        "mimir-train", "sample", "--checkpoint", trained, "--models", other / "models",
        "--prompt", "A horse.", "--output-dir", tmp_path / "samples",
    )  # fmt: skip
    assert done.code == 4, done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "sha256" in line
    assert " → " in line


def test_order_says_which_clips_each_rank_sees(trained: Path, real_cache: Path) -> None:
    arguments = ("order", "--cache", real_cache, "--global-batch-size", 4, "--seed", 42, "--steps", 3, "--json")
    one, two = (run("mimir-train", *arguments, "--world-size", size) for size in (1, 2))
    steps = [json.loads(line) for line in one.out.splitlines()]
    assert [step["step"] for step in steps] == [0, 1, 2]
    halves = [json.loads(line)["ranks"] for line in two.out.splitlines()]
    assert [rank0 + rank1 for rank0, rank1 in halves] == [step["ranks"][0] for step in steps]


def test_validation_samples_held_out_captions_and_decode_makes_videos_of_them(
    toy_cache: Path, toy_world: Path, tmp_path: Path
) -> None:
    done = run(
        "mimir-train", "run", "--cache", toy_cache, "--preset", "tiny", "--output-dir", tmp_path / "run",
        "--global-batch-size", 2, "--max-train-steps", 4, "--validation-shards", 1, "--validation-steps", 2,
        "--set", "run.validation_samples=2", "--report-to", "none",
    )  # fmt: skip
    assert done.code == 0, done.err
    decoded = run("mimir-train", "decode", tmp_path / "run", "--models", toy_world / "models")
    assert decoded.code == 0, decoded.err
    videos = sorted((tmp_path / "run" / "validation").rglob("*.mp4"))
    assert [video.parent.name for video in videos] == ["step-00000002"] * 2 + ["step-00000004"] * 2
    with av.open(str(videos[0])) as container:
        assert len(list(container.decode(video=0))) == 9
