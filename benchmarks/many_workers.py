"""How much faster two workers encode than one: `encode --workers` with an accelerator each that sleeps.

python -m benchmarks.many_workers [--clips 60] [--repeats 5] [--clip-s 0.5] [--workers 1 2]

As in keep_busy, the accelerator is a stand-in that sleeps so long a clip and gives latents of the real size; the
clips of 49 frames of 480x720, decoding, checks, hashes, fsync, leases, commit records and the snapshot are real.
Workers are the processes that `encode --workers` starts; one worker is the process itself. What is timed is the whole
call from the plan on, start-up of the workers included. Runs with few and many workers take turns; medians count.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks.keep_busy import BUCKET, StandInEncoders, make_clips, write_list

from mimir_precompute.clips.clip_list import read_clip_list
from mimir_precompute.config import Bucket, DecodeLimits, ModelOptions, TeamOptions
from mimir_precompute.decoding.sandbox import DecodeSandbox
from mimir_precompute.pipeline import encode_cache
from mimir_precompute.planning.plan import PlanRequest, update_plan
from mimir_precompute.provenance import RunLog
from mimir_precompute.team.encode_team import choose_team, encode_together
from mimir_precompute.team.local_workers import LocalWorker
from mimir_precompute.team.view import TeamView
from mimir_precompute.team.worker_process import main as work
from mimir_precompute.team.worker_task import WorkerTask, make_job
from mimir_precompute.workers.progress import Progress
from mimir_shared.features import FeatureName
from mimir_shared.plan_file import Plan, read_plan
from mimir_shared.storage.folder import LocalStorage


def stand_in(plan: Plan, models: ModelOptions, features: Sequence[FeatureName]) -> StandInEncoders:
    """The accelerator of a worker; how long a clip takes stands in place of a VAE's name."""
    return StandInEncoders(float(models.vae or 0))


def start_worker(task: WorkerTask, view: TeamView) -> LocalWorker:
    program = ("-m", "benchmarks.many_workers", "--work")
    return LocalWorker(task, name=f"worker {task.number}", environment={}, say=view.say, program=program)


def run_once(options: argparse.Namespace) -> None:
    """The measured process: plan, then encode by so many workers, and print how long that took."""
    storage = LocalStorage(Path(options.cache))
    request = PlanRequest(buckets=(Bucket.parse(BUCKET),), fps=8, shard_size=options.shard_size)
    update_plan(storage, None, read_clip_list(options.run), request)
    plan = read_plan(storage)
    models = ModelOptions(vae=str(options.clip_s), device="cpu")
    team = choose_team(TeamOptions(workers=str(options.workers[0])), models, ("latents",), options.decode_workers)
    task = WorkerTask(
        cache=options.cache,
        models=models,
        features=("latents",),
        shards=tuple(range(plan.num_shards)),
        data_format=None,
        on_mismatch="error",
        decode_workers=team.decoders[0],
        decode_limits=DecodeLimits(),
        max_quarantined=0.0,
        accept_quarantine=False,
    )
    started_s = time.perf_counter()
    with DecodeSandbox() as decoder:
        job = make_job(task, storage, plan, StandInEncoders(options.clip_s), decoder)
        if team.is_one:
            outcome = encode_cache(job, Progress(quiet=True), RunLog(storage, "stand-in"))
        else:
            outcome = encode_together(job, task, replace(team, start=start_worker))
    wall_s = time.perf_counter() - started_s
    assert outcome.snapshot is not None, "the cache is complete"
    sys.stdout.write(json.dumps({"clips": outcome.features[0].encoded, "wall_s": wall_s}) + "\n")


def measure(source: Path, workers: int, options: argparse.Namespace) -> float:
    """Seconds that one call with so many workers takes."""
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch) / "metadata.jsonl"
        write_list(source, options.clips, listed)
        command = [sys.executable, "-m", "benchmarks.many_workers", "--run", str(listed), "--cache", f"{scratch}/cache"]
        command += ["--workers", str(workers), "--clip-s", str(options.clip_s), "--shard-size", str(options.shard_size)]
        command += ["--decode-workers", str(options.decode_workers)] if options.decode_workers else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{workers} workers ended with {done.returncode}: {done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["clips"] == options.clips, result
    return float(result["wall_s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--files", type=int, default=8, help="different clips that are made")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clip-s", type=float, default=0.5)
    parser.add_argument("--shard-size", type=int, default=5)
    parser.add_argument("--decode-workers", type=int, default=None, help="of all workers together")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers to compare")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(stand_in)
        return
    if options.run:
        run_once(options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "clips"
        make_clips(source, options.files)
        seconds: dict[int, list[float]] = {workers: [] for workers in options.workers}
        for _ in range(options.repeats):
            for workers in options.workers:
                seconds[workers].append(measure(source, workers, options))
                sys.stdout.write(f"{workers} workers: {seconds[workers][-1]:.1f} s\n")
    alone_s = median(seconds[options.workers[0]])
    sys.stdout.write("| workers | seconds, median (range) | clips/s | times as fast |\n|---|---|---|---|\n")
    for workers, taken in seconds.items():
        middle = median(taken)
        spread = f"{middle:.1f} ({min(taken):.1f}–{max(taken):.1f})"
        sys.stdout.write(f"| {workers} | {spread} | {options.clips / middle:.2f} | {alone_s / middle:.2f} |\n")


if __name__ == "__main__":
    main()
