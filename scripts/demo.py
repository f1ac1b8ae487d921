"""Run the whole path on a toy world, say what happens, and make a page of it: python scripts/demo.py FOLDER

Everything is done by the programs that a user runs; this file only types their commands, and kills one of them.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mimir_shared.features import FEATURES

MARKER = ".mimir-demo"
STORY_NAME = "story.json"
OWN_NAMES = (
    "toy", "cache", "cache-uninterrupted", "run", "samples", "prompts.txt", STORY_NAME, "report.html", "index.html",
    MARKER,
)  # fmt: skip
"""All that a demo ever writes into its folder, the marker last: while it is there, the rest may be removed."""

NUM_CLIPS = 24
SHARD_SIZE = 4
KILL_AFTER_SHARDS = 2
PLAN_SEED = 1120
"""Puts TRAINED_CLIPS into the first shard, which is the one that is trained on."""
TRAINED_CLIPS = (0, 2, 11, 18)
"""Toy clips that show one kind of thing each, so that an eye can judge the samples; their captions are sampled."""
NEW_PROMPTS = (
    "A green ring stays still on a black background.",
    "Two red stars do not move on a pale blue background.",
)
"""Of the trained captions' words, but of no toy clip."""
TRAIN_CONFIG = "scripts/demo_train.yaml"
GUIDANCE_SCALE = 1
"""None: TRAIN_CONFIG drops no text, so there is no unconditional prediction to be guided away from."""

BIN = Path(sys.executable).parent


class DemoError(Exception):
    """Something that ends the demo; told in one line."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the demo."""

    name: str
    title: str
    command: str
    shows: str
    """One sentence on what there is to be seen."""


@dataclass(kw_only=True)
class DoneStep:
    """A step as it went; told on the page."""

    title: str
    command: str
    shows: str
    seconds: float
    output: str
    killed: bool = False


@dataclass(kw_only=True)
class EncodeRun:
    """One life of `encode`, in seconds since the epoch."""

    begin_s: float
    end_s: float
    killed: bool


@dataclass(kw_only=True)
class Commit:
    """One commit record, and when it appeared."""

    feature: str
    shard: int
    at_s: float


@dataclass(kw_only=True)
class Story:
    """What the page tells of how the cache came about."""

    steps: list[DoneStep] = field(default_factory=list)
    runs: list[EncodeRun] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    shards: int = 0
    snapshot: str | None = None
    uninterrupted_snapshot: str | None = None


def plan_steps(folder: Path) -> list[Step]:
    """Every command of the demo, in order."""
    root = shlex.quote(str(folder))
    models = f"--models {root}/toy/models"
    return [*cache_steps(root, models), *training_steps(root, models)]


def cache_steps(root: str, models: str) -> list[Step]:
    """Stage one: from clips to a verified cache, with a kill in the middle."""
    encode = f"mimir-precompute encode --cache {root}/cache {models} --max-quarantined 0.05"
    geometry = f"--preset tiny --shard-size {SHARD_SIZE} --seed {PLAN_SEED}"
    return [
        Step(
            name="toy",
            title="Make a toy world",
            command=f"mimir-precompute toy {root}/toy --clips {NUM_CLIPS}",
            shows="Real mp4 files with captions, and tiny models in the file formats of the real ones; no download.",
        ),
        Step(
            name="plan",
            title="Plan",
            command=f"mimir-precompute plan {root}/toy/clips --cache {root}/cache {geometry}",
            shows="Every clip gets its place, a shard and a row, before any model is loaded.",
        ),
        Step(
            name="kill",
            title="Encode, and be killed in the middle",
            command=encode,
            shows=f"SIGKILL once {KILL_AFTER_SHARDS} shards are committed, as if the machine went away: no clean-up.",
        ),
        Step(
            name="status",
            title="Look at what is left",
            command=f"mimir-precompute status {root}/cache",
            shows="What was committed is there and whole; of the shard that was being written, nothing is to be seen.",
        ),
        Step(
            name="resume",
            title="Encode again, by the same command",
            command=encode,
            shows="It goes on where it stopped: committed shards are not made again.",
        ),
        Step(
            name="verify",
            title="Verify",
            command=f"mimir-precompute verify {root}/cache",
            shows="Every byte is read again and compared with its checksum and with the plan.",
        ),
        Step(
            name="report",
            title="Look at the whole cache on one page",
            command=f"mimir-precompute report {root}/cache --out {root}/report.html",
            shows="Progress, sizes, quarantine, lengths, values and a gallery: what a person looks at before training.",
        ),
        Step(
            name="uninterrupted",
            title="Encode once more, elsewhere, undisturbed",
            command=(
                f"mimir-precompute encode {root}/toy/clips --cache {root}/cache-uninterrupted {geometry} {models} "
                "--max-quarantined 0.05"
            ),
            shows="Without a kill: this cache must have the same snapshot, which is a digest of all that is in it.",
        ),
    ]


def training_steps(root: str, models: str) -> list[Step]:
    """Stage two, and the page that tells of both."""
    return [
        Step(
            name="train",
            title="Train from the cache",
            command=(
                f"mimir-train run --cache {root}/cache --preset tiny --fuser mimir --config {TRAIN_CONFIG} "
                f"--output-dir {root}/run"
            ),
            shows="Transformer and token fuser learn from the cached tensors alone; no VAE, T5 or LLM is loaded.",
        ),
        Step(
            name="sample",
            title="Sample",
            command=(
                f"mimir-train sample --checkpoint {root}/run {models} --prompts {root}/prompts.txt "
                f"--output-dir {root}/samples --guidance-scale {GUIDANCE_SCALE} --num-inference-steps 25"
            ),
            shows="From prompts to videos, with the models that made the cache; others would be refused.",
        ),
        Step(
            name="page",
            title="Make the page",
            command=f"python scripts/demo_page.py {root}",
            shows="One HTML file with everything in it.",
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to write to; a demo's own folder is made anew")
    folder = parser.parse_args(arguments).folder
    try:
        run_demo(folder)
    except DemoError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped; `make demo` starts afresh\n")
        return 130
    return 0


def run_demo(folder: Path) -> None:
    """Run every step and say so. Raises DemoError where one fails."""
    started = time.monotonic()
    make_fresh(folder)
    story = Story()
    steps = plan_steps(folder)
    for number, step in enumerate(steps, start=1):
        say(f"\n=== {number}/{len(steps)}  {step.title}\n{step.shows}\n\n$ {step.command}")
        done = run_step(step, folder, story)
        story.steps.append(done)
        say(f"--- {done.seconds:.1f} s")
        after_step(step, folder, story)
        (folder / STORY_NAME).write_text(json.dumps(asdict(story), indent=1), encoding="utf-8")
    say(f"\n{time.monotonic() - started:.0f} s in all. Open {folder}/index.html in a browser.")


def make_fresh(folder: Path) -> None:
    """Empty a folder that an earlier demo made, or make a new one.

    Raises: DemoError for a folder that holds anything without being a demo's.
    """
    if folder.exists() and not folder.is_dir():
        raise DemoError(f"{folder}: is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise DemoError(
            f"{folder}: is not empty, and not made by this demo (no {MARKER} in it), so nothing in it is touched; "
            f"give another folder"
        )
    for name in OWN_NAMES:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("Written by scripts/demo.py, which removes and makes anew what it wrote here.\n")


def run_step(step: Step, folder: Path, story: Story) -> DoneStep:
    """Run one command, showing what it prints. Raises DemoError where it fails."""
    begin_s, begun = time.time(), time.monotonic()
    with subprocess.Popen(_executable(step), stdout=subprocess.PIPE, text=True, env=_environment()) as process:
        if step.name == "kill":
            kill_in_the_middle(process, folder / "cache")
        assert process.stdout is not None
        output = ""
        for line in process.stdout:
            say(line.rstrip("\n"))
            output += line
    expected = -signal.SIGKILL if step.name == "kill" else 0
    if process.returncode != expected:
        raise DemoError(f"`{step.command}` ended with exit code {process.returncode}, expected {expected}")
    if step.name in ("kill", "resume"):
        story.runs.append(EncodeRun(begin_s=begin_s, end_s=time.time(), killed=step.name == "kill"))
    return DoneStep(
        title=step.title,
        command=step.command,
        shows=step.shows,
        seconds=time.monotonic() - begun,
        output=output,
        killed=step.name == "kill",
    )


def kill_in_the_middle(process: "subprocess.Popen[str]", cache: Path) -> None:
    """Send SIGKILL once a few shards are committed; a process that ends before is left alone."""
    while process.poll() is None:
        committed = find_commits(cache)
        if len(committed) >= KILL_AFTER_SHARDS:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return say(f"*** kill -9: {len(committed)} shards are committed, the next was being encoded")
        time.sleep(0.02)
    return None


def after_step(step: Step, folder: Path, story: Story) -> None:
    """What the demo itself does or finds out once a command is through."""
    if step.name == "toy":
        damage_a_clip(folder / "toy" / "clips")
        write_prompts(folder / "toy" / "clips", folder / "prompts.txt")
        say("Added: damaged.mp4, the first half of a clip, so that there is something to quarantine.")
    if step.name == "resume":
        story.commits = find_commits(folder / "cache")
        story.shards = len({commit.shard for commit in story.commits})
        kept = sum(commit.at_s < story.runs[0].end_s for commit in story.commits)
        say(f"Kept from before the kill: {kept} of {len(story.commits)} shards, counted over all features.")
    if step.name == "uninterrupted":
        story.snapshot = find_snapshot(folder / "cache")
        story.uninterrupted_snapshot = find_snapshot(folder / "cache-uninterrupted")
        same = story.snapshot == story.uninterrupted_snapshot
        say(f"Snapshots {story.snapshot} and {story.uninterrupted_snapshot}: {'the same' if same else 'NOT the same'}.")
        if not same:
            raise DemoError("the killed and the undisturbed cache differ, which must not be; please report it")


def damage_a_clip(clips: Path) -> None:
    """Add the first half of a clip to the list, as a copy that broke off leaves it."""
    metadata = clips / "metadata.jsonl"
    first = json.loads(metadata.read_text(encoding="utf-8").splitlines()[0])
    whole = (clips / first["file_name"]).read_bytes()
    (clips / "damaged.mp4").write_bytes(whole[: len(whole) // 2])
    with open(metadata, "a", encoding="utf-8") as file:
        file.write(json.dumps({"file_name": "damaged.mp4", "text": first["text"]}) + "\n")


def write_prompts(clips: Path, path: Path) -> None:
    """Captions of some clips, to be compared with them, and two that no clip has."""
    lines = (clips / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    captions = [json.loads(lines[index])["text"] for index in TRAINED_CLIPS]
    path.write_text("\n".join((*captions, *NEW_PROMPTS)) + "\n", encoding="utf-8")


def find_commits(cache: Path) -> list[Commit]:
    """Every commit record, oldest first."""
    commits = [
        Commit(feature=feature, shard=int(path.name.partition(".")[0]), at_s=path.stat().st_mtime)
        for feature in FEATURES  # not every folder: that of temporary files comes and goes
        for path in (cache / feature).glob("*/manifests/*.parquet")
    ]
    return sorted(commits, key=lambda commit: commit.at_s)


def find_snapshot(cache: Path) -> str:
    """The digest, shortened, of the one snapshot that a finished cache has."""
    (folder,) = (cache / "snapshots").iterdir()
    return folder.name


def _executable(step: Step) -> list[str]:
    program, *arguments = shlex.split(step.command)
    return [str(BIN / program), *arguments]


def _environment() -> Mapping[str, str]:
    # The toy's tensors are so small that threads wait for each other longer than they compute: one is fastest.
    # Nothing here needs the hub; offline, nothing can go there by mistake either.
    return {"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def say(text: str) -> None:
    """Print at once, so that our lines and the programs' stay in order."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
