"""Small caches made of numpy alone, in the real format, and the settings of runs that train on them.

A clip's latents follow from its caption, so that there is something to learn; every value follows from its key.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mimir_precompute.commit import commit_shard
from mimir_precompute.encoders.base import Encoded
from mimir_precompute.shard_writer import ShardWriter
from mimir_shared.feature_folder import FeatureFolder, FeatureSpec
from mimir_shared.features import FeatureName, FeatureTensor, float32_to_bf16_bits
from mimir_shared.fingerprint import fingerprint
from mimir_shared.formats.open_format import open_shard_format
from mimir_shared.layout import empty_name, spec_name
from mimir_shared.manifest import CacheFormat
from mimir_shared.plan_file import PlannedClip, PlanSettings, read_plan, write_plan
from mimir_shared.sealed import write_sealed_tensors
from mimir_shared.snapshot import write_snapshot
from mimir_shared.storage.folder import LocalStorage
from mimir_train.cache_reader import Cache
from mimir_train.config import TrainConfig
from mimir_train.config_document import Document, nest, overlay, train_config
from mimir_train.presets import preset_document

VIDEO, IMAGE = "9x32x32", "1x32x32"
CHANNELS, HEIGHT, WIDTH = 4, 8, 8
T5_ROWS, T5_WIDTH, LLM_WIDTH, NUM_INSTRUCTIONS = 8, 16, 12, 4
KINDS = 3
"""Of scenes: each has a caption and a pattern of its own."""


def normal(text: str, *shape: int) -> np.ndarray:
    """float32 normal numbers that follow from a text."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bf16(values: np.ndarray) -> FeatureTensor:
    return FeatureTensor(float32_to_bf16_bits(values), "bf16")


def offsets(tokens: int, rows: int, characters: int) -> FeatureTensor:
    """Of tokens that are each so many characters long; the rows behind them stand for none."""
    starts = np.arange(rows, dtype=np.int32) * characters
    pairs = np.stack([starts, starts + characters], axis=1)
    pairs[tokens:] = 0
    return FeatureTensor(pairs, "i32")


def kind_of(key: str) -> int:
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % KINDS


def make_feature(feature: FeatureName, key: str, bucket: str) -> Encoded:
    """What the feature of a clip is; the key "" is the empty prompt."""
    kind = f"kind{kind_of(key)}" if key else "empty"
    if feature == "latents":
        frames = 1 + (int(bucket.split("x")[0]) - 1) // 4
        pattern = normal(f"pattern {kind}", CHANNELS, 1, HEIGHT, WIDTH)
        mean = np.repeat(pattern, frames, axis=1) + 0.1 * normal(f"clip {key}", CHANNELS, frames, HEIGHT, WIDTH)
        return Encoded(tensors={"vae_moments": bf16(np.concatenate([mean, np.full_like(mean, -8.0)]))})
    if feature == "t5":
        embeds = normal(f"t5 {kind}", T5_ROWS, T5_WIDTH)
        ids = np.zeros(T5_ROWS, np.int32)
        tensors = {
            "t5_embeds": bf16(embeds),
            "t5_ids": FeatureTensor(ids, "i32"),
            "t5_offsets": offsets(5, T5_ROWS, 2),
        }
        return Encoded(tensors=tensors, valid_rows={"t5_embeds": 5})
    if feature == "answers":
        return Encoded(document={"variants": []})
    length = sum(key.encode()) % 4  # clips of one batch differ
    return Encoded(
        tensors={
            "query_hidden": bf16(normal(f"query {kind}", 3 + length, LLM_WIDTH)),
            "query_offsets": offsets(3 + length, 3 + length, 3),
            "answer_hidden_0": bf16(normal(f"answer {kind}", length, LLM_WIDTH)),
            "instruction_hidden_0": bf16(normal(f"instructions {kind}", NUM_INSTRUCTIONS, LLM_WIDTH)),
            "answer_hidden_1": bf16(normal(f"other answer {kind}", 2 + length, LLM_WIDTH)),
            "instruction_hidden_1": bf16(normal(f"other instructions {kind}", NUM_INSTRUCTIONS, LLM_WIDTH)),
        }
    )


def _entry(name: str, dtype: str, dims: str, *sizes: int | None, channel_dim: int | None = None) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "dims": dims.split(), "sizes": list(sizes), "channel_dim": channel_dim}


def identity_of(feature: FeatureName, buckets: tuple[str, ...], model_name: str = "local") -> dict[str, Any]:
    """As spec.json has it, as far as training reads it."""
    tensors: Any = []
    if feature == "latents":
        frames = {bucket: 1 + (int(bucket.split("x")[0]) - 1) // 4 for bucket in buckets}
        tensors = {
            bucket: [
                _entry("vae_moments", "bf16", "2C T h w", 2 * CHANNELS, frames[bucket], HEIGHT, WIDTH, channel_dim=0)
            ]
            for bucket in buckets
        }
    elif feature == "t5":
        tensors = [
            _entry("t5_embeds", "bf16", "L D", T5_ROWS, T5_WIDTH),
            _entry("t5_ids", "i32", "L", T5_ROWS),
            _entry("t5_offsets", "i32", "L 2", T5_ROWS, 2),
        ]
    elif feature == "llm":
        tensors = [
            _entry("query_hidden", "bf16", "M H", None, LLM_WIDTH),
            _entry("query_offsets", "i32", "M 2", None, 2),
            *(_entry(f"answer_hidden_{v}", "bf16", "A H", None, LLM_WIDTH) for v in (0, 1)),
            *(_entry(f"instruction_hidden_{v}", "bf16", "K H", NUM_INSTRUCTIONS, LLM_WIDTH) for v in (0, 1)),
        ]
    return {"feature": feature, "model": {"name": model_name}, "max_length": T5_ROWS, "tensors": tensors}


def build_cache(
    root: Path,
    clips: Mapping[str, int] | None = None,
    *,
    shard_size: int = 8,
    features: tuple[FeatureName, ...] = ("latents", "t5", "answers", "llm"),
    vae_name: str = "local",
    replace: Mapping[tuple[str, FeatureName], Encoded] | None = None,
    snapshot: bool = True,
    leave_out_shards: int = 0,
    data_format: CacheFormat = "webdataset",
) -> Path:
    """Write a cache.

    Args:
        clips: bucket → how many clips.
        vae_name: of the model in the identity of `latents`.
        replace: (key, feature) → what to store in place of the made one.
        leave_out_shards: of the last feature, not committed: an unfinished cache.
    """
    clips = clips or {VIDEO: 24}
    storage = LocalStorage(root)
    root.mkdir(parents=True, exist_ok=True)
    _write_plan(storage, clips, shard_size)
    plan = read_plan(storage)
    folders = {}
    for feature in features:
        spec = _write_spec(storage, feature, tuple(clips), vae_name if feature == "latents" else "local", data_format)
        folders[feature] = FeatureFolder(storage, feature, spec.fingerprint)
        skipped = leave_out_shards if feature == features[-1] else 0
        for shard in range(plan.num_shards - skipped):
            with open_shard_format(storage, data_format, shard) as shard_format:
                writer = ShardWriter(shard_format)
                for clip in plan.shard_clips(shard):
                    encoded = (replace or {}).get((clip.key, feature)) or _make(feature, clip)
                    specs = spec.tensor_specs(clip.bucket or "")
                    writer.add(
                        clip, encoded, specs, bucket=clip.bucket if feature == "latents" else None, source_xxh3=None
                    )
                finished = writer.finish()
                commit_shard(
                    folders[feature], finished, data_format=data_format, shard=shard, fingerprint=spec.fingerprint,
                    plan_seal=plan.file_of(shard).seal,
                )  # fmt: skip
        if feature in ("t5", "llm"):
            empty = make_feature(feature, "", "")
            data = write_sealed_tensors(empty.tensors, {})
            storage.create(empty_name(feature, spec.fingerprint), data)
    if snapshot and not leave_out_shards:
        write_snapshot(storage, plan, folders)
    return root


def _make(feature: FeatureName, clip: PlannedClip) -> Encoded:
    return make_feature(feature, clip.key, clip.bucket or "")


def _write_plan(storage: LocalStorage, clips: Mapping[str, int], shard_size: int) -> None:
    # buckets in turn, so that every shard has clips of each
    keys = [(f"{bucket}-{i:03d}", bucket) for i in range(max(clips.values())) for bucket in clips if i < clips[bucket]]
    num_shards = -(-len(keys) // shard_size)
    rows = [(i // shard_size, i % shard_size, key, bucket) for i, (key, bucket) in enumerate(keys)]
    columns = {
        "key": [key for _, _, key, _ in rows],
        "shard": [shard for shard, _, _, _ in rows],
        "row": [row for _, row, _, _ in rows],
        "source": [f"{key}.mp4" for _, _, key, _ in rows],
        "caption": [f"scene of kind {kind_of(key)}" for _, _, key, _ in rows],
        "source_bytes": [None] * len(rows),
        "source_offset": [None] * len(rows),
        "bucket": [bucket for _, _, _, bucket in rows],
        "start_s": [None] * len(rows),
        "end_s": [None] * len(rows),
        "removed": [False] * len(rows),
    }
    settings = PlanSettings(
        index=0,
        previous=None,
        preset="tiny",
        buckets=tuple(clips),
        fps=8.0,
        shard_size=shard_size,
        seed=0,
        source_root="/nowhere",
        first_shard=0,
        num_shards=num_shards,
    )
    storage.create("plan/0000.parquet", write_plan(settings, columns))


def _write_spec(
    storage: LocalStorage, feature: FeatureName, buckets: tuple[str, ...], model_name: str, data_format: CacheFormat
) -> FeatureSpec:
    identity = identity_of(feature, buckets, model_name)
    spec = FeatureSpec(feature=feature, fingerprint=fingerprint(identity), format=data_format, identity=identity)
    storage.create(spec_name(feature, spec.fingerprint), spec.model_dump_json(indent=1).encode() + b"\n")
    return spec


def tiny_config(cache: Path, run: Path, **settings: object) -> TrainConfig:
    """The preset tiny with a smaller transformer, so that a step takes milliseconds.

    Args:
        settings: section__name=value, laid over it.
    """
    document: Document = overlay(
        preset_document("tiny"),
        {
            "data": {"cache": str(cache)},
            "model": {"transformer": {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}},
            "run": {"output_dir": str(run), "report_to": [], "device": "cpu", "max_train_steps": 10},
        },
    )
    for name, value in settings.items():
        document = overlay(document, nest(name.replace("__", "."), value))
    return train_config(document)


def resumed_config(run: Path, resume: str = "latest", **settings: object) -> TrainConfig:
    """The settings with which a run goes on: its own, and `settings` over them."""
    from mimir_train.cli.commands import RunRequest, build_config  # torch comes with it

    flags = {name.replace("__", "."): value for name, value in settings.items()}
    return build_config(
        RunRequest(preset=None, output_dir=run, config_file=None, assignments=(), flags=flags, resume=resume)
    )


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl, one a step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(run)]


def place_of(cache: Cache, number: int, feature: str = "t5") -> tuple[Path, int]:
    """Where the first byte of a feature of a clip lies."""
    tensor = cache.column(feature).tensors[0]  # type: ignore[arg-type]
    files = cache.snapshot.features[feature].files  # type: ignore[index]
    return Path(cache.storage.root) / files[int(tensor.file[number])], int(tensor.offset[number]) + 1


@contextmanager
def flipped_byte(path: Path, offset: int) -> Iterator[None]:
    """One byte of a file is another inside the block."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(bytes(data))
    try:
        yield
    finally:
        data[offset] ^= 0x10
        path.write_bytes(bytes(data))
