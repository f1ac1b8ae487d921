"""Caches of random numbers with the sizes of real ones, for the benchmarks of the reader."""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from mimir_precompute.commit import commit_shard
from mimir_precompute.encoders.base import Encoded
from mimir_precompute.shard_writer import ShardWriter
from mimir_shared.feature_folder import FeatureFolder, FeatureSpec
from mimir_shared.features import FeatureName, FeatureTensor, float32_to_bf16_bits
from mimir_shared.fingerprint import fingerprint
from mimir_shared.formats.open_format import open_shard_format
from mimir_shared.layout import spec_name
from mimir_shared.manifest import CacheFormat
from mimir_shared.plan_file import PlanSettings, read_plan, write_plan
from mimir_shared.safetensors_bytes import tensors_to_safetensors
from mimir_shared.snapshot import write_snapshot
from mimir_shared.snapshot_reader import SnapshotReader
from mimir_shared.storage.folder import LocalStorage

BUCKET: Final = "49x480x720"
LATENTS: Final = (16, 13, 60, 90)
"""(C, T, h, w) of the means of a 49x480x720 clip: 2.2 MB in bfloat16."""
INSTRUCTIONS: Final = 4


@dataclass(frozen=True, kw_only=True)
class SampleSizes:
    """What a clip of a cache is made of. Text is ragged: from a few rows to so many, half of it on average."""

    bucket: str = BUCKET
    latents: tuple[int, int, int, int] = LATENTS
    """(C, T, h, w) of what is kept: of means C is that of the model, of moments twice that."""
    latents_name: str = "vae_mean"
    max_length: int = 226
    most_t5_rows: int = 160
    most_llm_rows: int = 80
    t5_width: int = 4096
    llm_width: int = 3072


REAL: Final = SampleSizes()
TINY: Final = SampleSizes(
    bucket="9x64x96", latents=(16, 3, 16, 24), latents_name="vae_moments", max_length=64, most_t5_rows=64,
    most_llm_rows=32, t5_width=64, llm_width=64,
)  # fmt: skip
"""Of the preset `tiny` with the toy models."""


def describe_plan(num_clips: int, shard_size: int, bucket: str = BUCKET) -> tuple[PlanSettings, dict[str, list[Any]]]:
    """Settings and columns of a plan of clips that no file stands behind."""
    numbers = range(num_clips)
    columns: dict[str, list[Any]] = {
        "key": [f"clip-{number:07d}" for number in numbers],
        "shard": [number // shard_size for number in numbers],
        "row": [number % shard_size for number in numbers],
        "source": [f"{number // 1000:04d}/{number:07d}.mp4" for number in numbers],
        "caption": [
            f"Clip {number}: a hiker with a backpack stands on a rocky summit and looks over hazy mountains."
            for number in numbers
        ],
        **{name: [None] * num_clips for name in ("source_bytes", "source_offset", "start_s", "end_s")},
        "bucket": [bucket] * num_clips,
        "removed": [False] * num_clips,
    }
    settings = PlanSettings(
        index=0, previous=None, preset="cogvideox-5b", buckets=(bucket,), fps=8.0, shard_size=shard_size, seed=0,
        source_root="/nowhere", first_shard=0, num_shards=-(-num_clips // shard_size),
    )  # fmt: skip
    return settings, columns


def identity_of(feature: FeatureName, of: SampleSizes = REAL) -> dict[str, Any]:
    """As spec.json has it, as far as the reader looks."""

    def tensor(name: str, dims: str, *sizes: int | None) -> dict[str, Any]:
        return {"name": name, "dtype": "bf16", "dims": dims.split(), "sizes": list(sizes), "channel_dim": None}

    tensors: dict[FeatureName, Any] = {
        "latents": {of.bucket: [tensor(of.latents_name, "C T h w", *of.latents)]},
        "t5": [tensor("t5_embeds", "L D", None, of.t5_width)],
        "answers": [],
        "llm": [
            tensor("answer_hidden_0", "A H", None, of.llm_width),
            tensor("instruction_hidden_0", "K H", INSTRUCTIONS, of.llm_width),
            tensor("query_hidden", "M H", None, of.llm_width),
        ],
    }
    model = {"name": "synthetic"}
    return {"feature": feature, "model": model, "max_length": of.max_length, "tensors": tensors[feature]}


class RandomFeatures:
    """Cuts tensors out of one pool of random numbers: making fresh ones would take longer than all that is measured."""

    def __init__(self, sizes: SampleSizes = REAL, seed: int = 0) -> None:
        self._sizes = sizes
        self._rng = np.random.default_rng(seed)
        self._pool = float32_to_bf16_bits(self._rng.standard_normal(4_000_000, dtype=np.float32))

    def make(self, feature: FeatureName) -> Encoded:
        sizes = self._sizes
        if feature == "latents":
            return Encoded(tensors={sizes.latents_name: self._tensor(*sizes.latents)})
        if feature == "t5":
            return Encoded(tensors={"t5_embeds": self._tensor(self._rows(sizes.most_t5_rows), sizes.t5_width)})
        return Encoded(
            tensors={
                "query_hidden": self._tensor(self._rows(sizes.most_llm_rows), sizes.llm_width),
                "answer_hidden_0": self._tensor(self._rows(sizes.most_llm_rows), sizes.llm_width),
                "instruction_hidden_0": self._tensor(INSTRUCTIONS, sizes.llm_width),
            }
        )

    def _rows(self, most: int) -> int:
        return int(self._rng.integers(1, most))

    def _tensor(self, *shape: int) -> FeatureTensor:
        count = int(np.prod(shape))
        start = int(self._rng.integers(0, len(self._pool) - count))
        return FeatureTensor(self._pool[start : start + count].reshape(shape), "bf16")


def build_cache(
    root: Path, num_clips: int, *, shard_size: int, data_format: CacheFormat,
    features: Sequence[FeatureName] = ("latents", "t5", "llm"), sizes: SampleSizes = REAL,
) -> Path:  # fmt: skip
    """Write a cache through the code that stage one writes with."""
    root.mkdir(parents=True)
    storage = LocalStorage(root)
    settings, columns = describe_plan(num_clips, shard_size, sizes.bucket)
    storage.create("plan/0000.parquet", write_plan(settings, columns))
    plan = read_plan(storage)
    random = RandomFeatures(sizes)
    folders = {}
    for feature in features:
        identity = identity_of(feature, sizes)
        spec = FeatureSpec(feature=feature, fingerprint=fingerprint(identity), format=data_format, identity=identity)
        storage.create(spec_name(feature, spec.fingerprint), spec.model_dump_json().encode())
        folders[feature] = FeatureFolder(storage, feature, spec.fingerprint)
        for shard in range(plan.num_shards):
            with open_shard_format(storage, data_format, shard) as shard_format:
                writer = ShardWriter(shard_format)
                for clip in plan.shard_clips(shard):
                    bucket = clip.bucket if feature == "latents" else None
                    writer.add(
                        clip, random.make(feature), spec.tensor_specs(sizes.bucket), bucket=bucket, source_xxh3=None
                    )
                commit_shard(
                    folders[feature], writer.finish(), data_format=data_format, shard=shard,
                    fingerprint=spec.fingerprint, plan_seal=plan.file_of(shard).seal,
                )  # fmt: skip
    write_snapshot(storage, plan, folders)
    return root


def write_merged_tars(reader: SnapshotReader, folder: Path) -> list[str]:
    """The same samples as plain webdataset users keep them: all features of a clip in one .safetensors of one tar."""
    folder.mkdir(parents=True)
    paths = []
    for shard in range(reader.num_shards):
        path = folder / f"{shard:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in np.flatnonzero(reader.clips.shards == shard).tolist():
                key = reader.clip(number).key
                data = tensors_to_safetensors(reader.sample(key, verify=False))
                entry = tarfile.TarInfo(f"{key}.safetensors")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        paths.append(str(path))
    return paths
