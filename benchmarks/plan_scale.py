"""How long planning, reading the plan and `status` take on many clips, and how much memory.

python benchmarks/plan_scale.py [--clips 500000] [--shard-size 256] [--parts 1] [--no-status]

Clips are empty files in folders of 1,000, or `--parts` of one; each is looked at on the disk, as a real one is. Commit
records are those of an encoded cache, without data files.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mimir_precompute.shard_writer import caption_hash
from mimir_shared.feature_folder import FeatureFolder, FeatureSpec
from mimir_shared.features import FEATURES
from mimir_shared.fingerprint import fingerprint
from mimir_shared.layout import spec_name
from mimir_shared.manifest import DataFile, RecordMetadata, SampleRecord, StoredSample, write_record
from mimir_shared.plan_file import read_plan
from mimir_shared.safetensors_bytes import TensorPlace
from mimir_shared.storage.folder import LocalStorage

PROGRAM = str(Path(sys.executable).parent / "mimir-precompute")


def write_list(folder: Path, clips: int, parts: int) -> None:
    """A metadata.jsonl of so many clips, `parts` of them of each file."""
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as file:
        for number in range(clips):
            source, part = divmod(number, parts)
            name = f"{source // 1000:04d}/{source:07d}.mp4"
            if part == 0:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).touch()
            text = f"Clip {number}: a hiker with a backpack stands on a rocky summit and looks over hazy mountains."
            row: dict[str, object] = {"file_name": name, "text": text}
            if parts > 1:
                row |= {"start_s": part * 6.0, "end_s": part * 6.0 + 6.0}
            file.write(json.dumps(row) + "\n")


def write_records(cache: Path) -> None:
    """Specs and commit records of every feature, as if all shards were encoded."""
    storage = LocalStorage(cache)
    plan = read_plan(storage)
    for feature in FEATURES:
        identity: dict[str, Any] = {"feature": feature, "tensors": []}
        spec = FeatureSpec(feature=feature, fingerprint=fingerprint(identity), format="webdataset", identity=identity)
        folder = FeatureFolder(storage, feature, spec.fingerprint)
        storage.create(spec_name(feature, spec.fingerprint), spec.model_dump_json().encode())
        (cache / folder.directory / "manifests").mkdir()
        for shard in range(plan.num_shards):
            clips = plan.shard_clips(shard)
            place = TensorPlace(name="x", dtype="bf16", shape=(32, 13, 60, 90), offset=512, nbytes=4_492_800)
            stored = StoredSample(json_offset=0, json_nbytes=300, json_xxh3=shard, tensors=(place,), xxh3=shard)
            samples = [
                SampleRecord(row=c.row, key=c.key, status="ok", caption_xxh3=caption_hash(c.caption), stored=stored)
                for c in clips
            ]
            metadata = RecordMetadata(
                feature=feature, shard=shard, generation=0, format="webdataset", fingerprint=spec.fingerprint,
                plan=plan.file_of(shard).seal, ok=len(clips), quarantined=0, statistics={},
                files=(DataFile(path=f"data/{shard:06d}-00000000.tar", bytes=10**9, sha256="0" * 64),),
            )  # fmt: skip
            # no fsync for each: this is scenery, not a cache
            (cache / folder.record_path(shard, 0)).write_bytes(write_record(metadata, samples))


OPEN_AS_A_WORKER = """
import pathlib, sys
from mimir_shared.plan_file import read_plan
from mimir_shared.storage.folder import LocalStorage
plan = read_plan(LocalStorage(pathlib.Path(sys.argv[1])))
sizes = {shard: plan.file_of(shard).num_clips(shard) for shard in range(plan.num_shards)}
for shard in range(0, plan.num_shards, max(plan.num_shards // 8, 1)):
    assert len(plan.shard_clips(shard)) == sizes[shard]
"""


def measure(*command: object) -> tuple[float, float, float]:
    """Run a program: (seconds of wall time, of CPU time, peak memory in GB)."""
    started = time.perf_counter()
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, command
    return time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=500_000)
    parser.add_argument("--shard-size", type=int, default=256)
    parser.add_argument("--parts", type=int, default=1, help="clips of one file")
    parser.add_argument("--no-status", action="store_true", help="write no commit records")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        clips, cache = Path(scratch) / "clips", Path(scratch) / "cache"
        clips.mkdir()
        write_list(clips, options.clips, options.parts)
        plan = (
            PROGRAM,
            "plan",
            clips,
            "--cache",
            cache,
            "--preset",
            "cogvideox-5b",
            "--shard-size",
            options.shard_size,
        )
        rows = [
            ("plan, first", *measure(*plan)),
            ("plan again, nothing new", *measure(*plan)),
            ("open the plan as a worker, 8 shards", *measure(sys.executable, "-c", OPEN_AS_A_WORKER, cache)),
        ]
        plan_bytes = (cache / "plan" / "0000.parquet").stat().st_size
        if not options.no_status:
            write_records(cache)
            rows.append(("status, 4 features", *measure(PROGRAM, "status", cache)))
    sys.stdout.write(
        f"{options.clips} clips, shards of {options.shard_size}, plan of {plan_bytes / 1e6:.0f} MB\n"
        f"| what | s | CPU s | peak GB |\n|---|---|---|---|\n"
    )
    for name, seconds, cpu_s, peak in rows:
        sys.stdout.write(f"| {name} | {seconds:.1f} | {cpu_s:.1f} | {peak:.2f} |\n")


if __name__ == "__main__":
    main()
