"""Whether `encode` keeps an accelerator busy, and whether its memory grows with the number of clips.

python -m benchmarks.keep_busy [--clips 40] [--repeats 5] [--clip-s 0.5] [--memory-clips 100 1000] [--memory-clip-s 0.1]

The accelerator is a stand-in that sleeps so long a clip and gives latents of the real size; everything else is real:
clips of 49 frames of 480x720 at 8 fps in H.264 (--source: a folder of such instead), decoding in child processes as
`encode` does it, checks, statistics, hashes, fsync, commit records, snapshot. Wall time without start-up, which ends
when the first clip is handed to the accelerator, is compared with the sum of the sleeps. Each run is a process of its
own; its memory, and that of its children, is looked at every 20 ms. The files are few and stand in the page cache; each
is planned under many keys.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
import psutil

from mimir_precompute.clips.clip_list import read_clip_list
from mimir_precompute.config import Bucket
from mimir_precompute.decoding.sandbox import DecodeSandbox
from mimir_precompute.encoders.base import Encoded, EncoderInput
from mimir_precompute.pipeline import EncodeJob, encode_cache
from mimir_precompute.planning.plan import PlanRequest, update_plan
from mimir_precompute.provenance import RunLog
from mimir_precompute.workers.progress import Progress
from mimir_shared.features import FeatureName, FeatureTensor
from mimir_shared.plan_file import read_plan
from mimir_shared.storage.folder import LocalStorage

BUCKET = "49x480x720"
MOMENTS = (32, 13, 60, 90)  # (2C, T, h, w)


class StandInEncoder:
    """An accelerator that takes a given time for a clip."""

    def __init__(self, clip_s: float) -> None:
        self._clip_s = clip_s
        self._moments = np.random.default_rng(0).integers(0x3F80, 0x4080, MOMENTS, dtype=np.uint16)
        self.first_clip_at_s = 0.0
        self.last_clip_at_s = 0.0

    def encode(self, batch: Sequence[EncoderInput]) -> list[Encoded]:
        self.first_clip_at_s = self.first_clip_at_s or time.perf_counter()
        encoded = []
        for item in batch:
            assert item.clip_pixels is not None, "latents need clip_pixels"
            assert item.clip_pixels.shape == (49, 480, 720, 3), f"{item.clip_pixels.shape}"
            time.sleep(self._clip_s)
            moments = self._moments.copy()
            moments[0, 0, 0, 0] ^= item.clip_pixels[0, 0, 0, 0]
            encoded.append(Encoded(tensors={"vae_moments": FeatureTensor(moments, "bf16")}))
        self.last_clip_at_s = time.perf_counter()
        return encoded

    def encode_empty(self, answers: Mapping[str, Any] | None) -> Encoded | None:
        return None

    def close(self) -> None:
        pass


class StandInEncoders:
    """The source of the one stand-in."""

    def __init__(self, clip_s: float) -> None:
        self.encoder = StandInEncoder(clip_s)

    def identity(self, feature: FeatureName, dependencies: Mapping[FeatureName, Mapping[str, Any]]) -> dict[str, Any]:
        tensor = {"name": "vae_moments", "dtype": "bf16", "dims": ["2C", "T", "h", "w"], "sizes": list(MOMENTS)}
        return {"feature": feature, "model": "stand-in", "tensors": {BUCKET: [{**tensor, "channel_dim": 0}]}}

    def batch_size(self, feature: FeatureName) -> int:
        return 1

    def build(self, feature: FeatureName) -> StandInEncoder:
        return self.encoder


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run."""

    clips: int
    start_up_s: float
    """From the call to the first clip at the accelerator: decoders are started and one clip is decoded in it."""
    busy_s: float
    """The sum of the sleeps, as asked for."""
    rest_s: float
    """Wall time after start-up."""
    finish_s: float
    """Of it, after the last clip left the accelerator: last write, commit, snapshot."""
    peak_gb: float = 0.0

    @property
    def ratio(self) -> float:
        return self.rest_s / self.busy_s


def make_clips(folder: Path, count: int) -> None:
    """Different clips of moving texture, which compress about as badly as film."""
    folder.mkdir()
    for number in range(count):
        texture = np.random.default_rng(number).integers(0, 256, (60, 90, 3), dtype=np.uint8)
        large = np.asarray(texture).repeat(8, axis=0).repeat(8, axis=1)  # (480, 720, 3)
        with av.open(str(folder / f"{number:02d}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=8, options={"crf": "23", "preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = 720, 480, "yuv420p"
            for index in range(49):
                picture = np.ascontiguousarray(np.roll(large, (3 * index, 5 * index), axis=(0, 1)))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))


def write_list(source: Path, clips: int, target: Path) -> None:
    """A list that plans the files of a folder in turn, under different keys."""
    files = sorted(path.resolve() for path in source.glob("*.mp4"))
    rows = [
        {"key": f"{number:06d}", "file_name": str(files[number % len(files)]), "text": f"Clip {number}."}
        for number in range(clips)
    ]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_once(options: argparse.Namespace) -> None:
    """The measured process: plan, then encode, and print what took how long."""
    storage = LocalStorage(Path(options.cache))
    request = PlanRequest(buckets=(Bucket.parse(BUCKET),), fps=8, shard_size=options.shard_size)
    update_plan(storage, None, read_clip_list(options.run), request)
    plan = read_plan(storage)
    encoders = StandInEncoders(options.clip_s)
    started_s = time.perf_counter()
    with DecodeSandbox() as decoder:
        job = EncodeJob(
            storage=storage,
            plan=plan,
            encoders=encoders,
            shards=tuple(range(plan.num_shards)),
            features=("latents",),
            decode_workers=options.decode_workers,
            decoder=decoder,
        )
        outcome = encode_cache(job, Progress(quiet=True), RunLog(storage, "stand-in"))
    ended_s = time.perf_counter()
    (feature,) = outcome.features
    assert outcome.snapshot is not None, "the cache is complete"
    measured = {
        "clips": feature.encoded,
        "start_up_s": encoders.encoder.first_clip_at_s - started_s,
        "busy_s": feature.encoded * options.clip_s,
        "rest_s": ended_s - encoders.encoder.first_clip_at_s,
        "finish_s": ended_s - encoders.encoder.last_clip_at_s,
    }
    sys.stdout.write(json.dumps(measured) + "\n")


def measure(source: Path, clips: int, clip_s: float, options: argparse.Namespace) -> Measured:
    """Run it in a process of its own, and watch the memory of that and of its children."""
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch) / "metadata.jsonl"
        write_list(source, clips, listed)
        command = [sys.executable, "-m", "benchmarks.keep_busy", "--run", str(listed), "--cache", f"{scratch}/cache"]
        command += ["--clip-s", str(clip_s), "--shard-size", str(options.shard_size)]
        command += ["--decode-workers", str(options.decode_workers)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            peak = PeakMemory(process.pid)
            printed, _ = process.communicate()
        if process.returncode != 0:
            raise SystemExit(f"the run with {clips} clips failed with {process.returncode}")
        return Measured(**json.loads(printed), peak_gb=peak.stop())


class PeakMemory:
    """The most memory that a process and its children had resident together; what they share counts for each."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._peak_bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """Stop looking; GB."""
        self._over.set()
        self._thread.join()
        return self._peak_bytes / 1e9

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            total = 0
            try:
                for process in (self._process, *self._process.children(recursive=True)):
                    total += process.memory_info().rss
            except psutil.Error:
                continue  # one of them has just ended
            self._peak_bytes = max(self._peak_bytes, total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clip-s", type=float, default=0.5, help="what the stand-in takes for a clip")
    parser.add_argument("--memory-clips", type=int, nargs="*", default=[100, 1000])
    parser.add_argument("--memory-clip-s", type=float, default=0.1)
    parser.add_argument("--shard-size", type=int, default=10, help="small, so that a short run crosses many borders")
    parser.add_argument("--decode-workers", type=int, default=2)
    parser.add_argument("--source", type=Path, help="a folder of clips to use instead of made ones")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        run_once(options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        source = options.source or Path(scratch) / "clips"
        if options.source is None:
            make_clips(source, 12)
        runs = [measure(source, options.clips, options.clip_s, options) for _ in range(options.repeats)]
        memory = [measure(source, clips, options.memory_clip_s, options) for clips in options.memory_clips]
    print_busy(runs, options)
    print_memory(memory, options)


def print_busy(runs: list[Measured], options: argparse.Namespace) -> None:
    """One row a run, and the median of their ratios."""
    if not runs:
        return
    write = sys.stdout.write
    write(f"{options.clips} clips of {options.clip_s:g} s, shards of {options.shard_size}, ")
    write(f"{options.decode_workers} decode workers\n")
    write("| run | start-up, s | sleeps, s | wall after start-up, s | of it after the last clip, s | ratio |\n")
    write("|---|---|---|---|---|---|\n")
    for number, one in enumerate(runs, 1):
        write(f"| {number} | {one.start_up_s:.2f} | {one.busy_s:.1f} | {one.rest_s:.2f} | {one.finish_s:.2f} ")
        write(f"| {one.ratio:.3f} |\n")
    write(f"ratio: median {median(one.ratio for one in runs):.3f}, worst {max(one.ratio for one in runs):.3f}\n")


def print_memory(runs: list[Measured], options: argparse.Namespace) -> None:
    """One row a number of clips."""
    if runs:
        sys.stdout.write(f"\n| clips of {options.memory_clip_s:g} s | peak memory, GB | ratio |\n|---|---|---|\n")
    for one in runs:
        sys.stdout.write(f"| {one.clips} | {one.peak_gb:.2f} | {one.ratio:.3f} |\n")


if __name__ == "__main__":
    main()
