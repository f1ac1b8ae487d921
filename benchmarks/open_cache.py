"""How long it takes to open a large cache, to get the first batch, and to go on anywhere; what blocks cost and gain.

python benchmarks/open_cache.py [--clips 500000] [--shard-size 256] [--quick]

The cache has a plan, commit records of four features and a snapshot, as if it were encoded; its data files are sparse,
so that reading costs what it costs and the disk holds nothing. Hashes of bytes that were never written cannot be right:
batches are read without checksums here. Each opening is a process of its own.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.synthetic_cache import BUCKET, LATENTS, describe_plan, identity_of

from mimir_precompute.shard_writer import caption_hash
from mimir_shared.feature_folder import FeatureFolder, FeatureSpec
from mimir_shared.features import FEATURES, FeatureName
from mimir_shared.fingerprint import fingerprint
from mimir_shared.layout import spec_name
from mimir_shared.manifest import DataFile, RecordMetadata, SampleRecord, StoredSample, write_record
from mimir_shared.plan_file import Plan, PlannedClip, read_plan, write_plan
from mimir_shared.safetensors_bytes import TensorPlace
from mimir_shared.snapshot import write_snapshot
from mimir_shared.storage.folder import LocalStorage
from mimir_train.order.clip_order import BucketShards, TrainingOrder

BATCH_SIZE: Final = 4
SHAPES: Final[dict[FeatureName, dict[str, tuple[int, ...]]]] = {
    "latents": {"vae_mean": LATENTS},
    "t5": {"t5_embeds": (80, 4096)},
    "answers": {},
    "llm": {"answer_hidden_0": (40, 3072), "instruction_hidden_0": (4, 3072), "query_hidden": (40, 3072)},
}

OPEN: Final = """
import json, sys, time
begun = time.perf_counter()
from mimir_train.batch import LATENT_TENSORS
imported, cpu = time.perf_counter(), time.process_time()
from mimir_train.cache_reader import open_cache
from mimir_train.reading.step_reader import ReadOptions
cache = open_cache(sys.argv[1])
opened = time.perf_counter()
options = ReadOptions(verify="never")
dataset = cache.dataset(int(sys.argv[2]), features=["latents", "t5", "llm"], options=options)
state = dataset.state_dict()
state["order"]["next_step"] = int(sys.argv[3])
dataset.load_state_dict(state)
batch = next(iter(dataset))
assert batch["step"] == int(sys.argv[3])
print(json.dumps({"import": imported - begun, "open": opened - imported, "first": time.perf_counter() - opened,
                  "cpu": time.process_time() - cpu,
                  "state_bytes": len(json.dumps(dataset.state_dict()))}))
"""


def samples_of(clips: list[PlannedClip], feature: FeatureName) -> tuple[list[SampleRecord], int]:
    """The rows of a commit record, and the bytes of its data file."""
    samples, end = [], 0
    for clip in clips:
        places, offset = [], end + 1536
        for name, shape in SHAPES[feature].items():
            rest = 2
            for size in shape:
                rest *= size
            places.append(TensorPlace(name=name, dtype="bf16", shape=shape, offset=offset, nbytes=rest))
            offset += rest
        stored = StoredSample(
            json_offset=end + 512, json_nbytes=300, json_xxh3=1, tensors=tuple(places), xxh3=1 if places else None
        )
        end = -(-offset // 512) * 512
        samples.append(
            SampleRecord(row=clip.row, key=clip.key, status="ok", bucket=BUCKET if feature == "latents" else None,
                         caption_xxh3=caption_hash(clip.caption), stored=stored)
        )  # fmt: skip
    return samples, end


def write_feature(storage: LocalStorage, plan: Plan, feature: FeatureName) -> FeatureFolder:
    """Spec, records and sparse data of one feature, without an fsync for each: this is scenery, not a cache."""
    identity = identity_of(feature)
    spec = FeatureSpec(feature=feature, fingerprint=fingerprint(identity), format="webdataset", identity=identity)
    folder = FeatureFolder(storage, feature, spec.fingerprint)
    storage.create(spec_name(feature, spec.fingerprint), spec.model_dump_json().encode())
    for name in ("manifests", "data"):
        (storage.root / folder.directory / name).mkdir()
    for shard in range(plan.num_shards):
        clips = plan.shard_clips(shard)
        samples, nbytes = samples_of(clips, feature)
        name = f"data/{shard:06d}-00000000.tar"
        metadata = RecordMetadata(
            feature=feature, shard=shard, generation=0, format="webdataset", fingerprint=spec.fingerprint,
            plan=plan.file_of(shard).seal, ok=len(clips), quarantined=0, statistics={},
            files=(DataFile(path=name, bytes=nbytes, sha256="0" * 64),),
        )  # fmt: skip
        (storage.root / folder.record_path(shard, 0)).write_bytes(write_record(metadata, samples))
        with open(storage.root / folder.directory / name, "wb") as file:
            os.truncate(file.fileno(), nbytes)
    return folder


def measure_opening(cache: Path, step: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(cache), str(BATCH_SIZE), str(step)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def open_rows(cache: Path, steps_per_epoch: int, repetitions: int) -> list[str]:
    """Medians of opening at the start, in the middle, and far on, taken in turns."""
    places = {
        "from the start": 0,
        "going on in the middle of the first epoch": steps_per_epoch // 2,
        "going on in epoch 1,000": 1000 * steps_per_epoch + 7,
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in places}
    for _ in range(repetitions):
        for name, step in places.items():
            found[name].append(measure_opening(cache, step))
    rows = [
        "| opening | open, s | first batch, s | together, s (range) | CPU, s | state, bytes |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        sums = [run["open"] + run["first"] for run in runs]
        opened, first, cpu = (statistics.median(run[part] for run in runs) for part in ("open", "first", "cpu"))
        rows.append(f"| {name} | {opened:.2f} | {first:.2f} | {statistics.median(sums):.2f} "
                    f"({min(sums):.2f}–{max(sums):.2f}) | {cpu:.2f} | {runs[0]['state_bytes']:.0f} |")  # fmt: skip
    return rows


def block_rows(num_shards: int, shard_size: int) -> list[str]:
    """How near to each other consecutive clips lie, for several sizes of a block."""
    bucket = BucketShards(name=BUCKET, shards=tuple(range(num_shards)), sizes=(shard_size,) * num_shards)
    rows = [
        "| shards in a block | clips that a clip is shuffled among | shards of a batch of 64 "
        "| pairs of one shard in it | shards of 16 batches that follow each other | to find a clip, us |",
        "|---|---|---|---|---|---|",
    ]
    for block in (1, 8, 32, 128, 512, num_shards):
        if block > num_shards:
            continue
        order = TrainingOrder([bucket], seed=0, global_batch_size=64, shards_per_block=block)
        order.batch(0)  # the table of the epoch is made once
        started = time.perf_counter()
        batches = [[place.shard for place in order.batch(step).places] for step in range(64)]
        each_us = (time.perf_counter() - started) / 64 / 64 * 1e6
        shards = statistics.mean(len(set(own)) for own in batches)
        pairs = statistics.mean(sum(n * (n - 1) // 2 for n in Counter(own).values()) for own in batches)
        together = statistics.mean(len({s for own in batches[i : i + 16] for s in own}) for i in range(0, 64, 16))
        rows.append(
            f"| {block} | {block * shard_size:,} | {shards:.1f} | {pairs:.1f} | {together:.0f} | {each_us:.0f} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=500_000)
    parser.add_argument("--shard-size", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="20,000 clips, 2 repetitions")
    options = parser.parse_args()
    if options.quick:
        options.clips, options.repetitions = 20_000, 2
    with tempfile.TemporaryDirectory(prefix="mimir-open-") as scratch:
        storage = LocalStorage(Path(scratch))
        settings, columns = describe_plan(options.clips, options.shard_size)
        storage.create("plan/0000.parquet", write_plan(settings, columns))
        plan = read_plan(storage)
        folders: dict[FeatureName, Any] = {name: write_feature(storage, plan, name) for name in FEATURES}
        started, cpu = time.perf_counter(), time.process_time()
        snapshot = write_snapshot(storage, plan, folders)
        took_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        index_bytes = storage.size(f"{snapshot.directory}/index.arrow")
        rows = [
            f"{options.clips:,} clips, {plan.num_shards:,} shards, 4 features; index of {index_bytes / 1e6:.0f} MB; "
            f"snapshot written in {took_s:.1f} s, {cpu_s:.1f} s of CPU (peak memory of the process {peak:.2f} GB)",
            "",
            *open_rows(Path(scratch), options.clips // BATCH_SIZE, options.repetitions),
            "",
            *block_rows(plan.num_shards, options.shard_size),
        ]
    sys.stdout.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
