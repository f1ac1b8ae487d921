"""All that a cache knows of one clip, and its latents decoded back to a video."""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from mimir_shared.errors import InputError
from mimir_shared.feature_folder import FeatureFolder, find_features
from mimir_shared.features import FeatureTensor
from mimir_shared.manifest import SampleRecord
from mimir_shared.plan_file import Plan, PlannedClip, read_plan
from mimir_shared.storage_protocol import Storage


def find_clip(plan: Plan, key: str) -> PlannedClip:
    """The newest planned row of a key; a unique key without its file ending is understood as well.

    Raises: InputError that names similar keys.
    """
    newest = plan.newest_rows()
    if key not in newest:
        alike = sorted(known for known in newest if known.rsplit(".", 1)[0] == key)
        if len(alike) != 1:
            near = sorted(known for known in newest if key.lower() in known.lower())[:5]
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise InputError(f"key {key!r}: not in the plan of {len(newest)} clips{hint}")
        key = alike[0]
    shard, row = newest[key]
    return plan.shard_clips(shard)[row]


def describe_clip(storage: Storage, key: str) -> dict[str, Any]:
    """Everything known of one clip, as plain JSON values."""
    plan = read_plan(storage)
    clip = find_clip(plan, key)
    described: dict[str, Any] = {
        "key": clip.key,
        "caption": clip.caption,
        "source": clip.source,
        "source_root": plan.settings.source_root,
        "source_bytes": clip.source_bytes,
        "start_s": clip.start_s,
        "end_s": clip.end_s,
        "shard": clip.shard,
        "row": clip.row,
        "features": {},
    }
    for folder in find_features(storage):
        described["features"][f"{folder.feature}/{folder.fingerprint}"] = _describe_feature(folder, clip)
    return described


def _describe_feature(folder: FeatureFolder, clip: PlannedClip) -> dict[str, Any]:
    generation = folder.generations().get(clip.shard)
    if generation is None:
        return {"status": "not encoded yet"}
    record = folder.read_record(clip.shard, generation)
    sample = record.samples[clip.row]
    described: dict[str, Any] = {"status": sample.status, "generation": generation, "bucket": sample.bucket}
    if sample.stored is None:
        return {**described, "stage": sample.stage, "reason": sample.reason, "detail": sample.detail}
    document, tensors = folder.read_sample(record, sample)
    files = [f"{folder.directory}/{data_file.path}" for data_file in record.metadata.files]
    described["file"] = files[sample.stored.json_file]
    described["tensors"] = [
        {
            **_describe_tensor(tensors[place.name]),
            "name": place.name,
            "file": files[place.file],
            "offset": place.offset,
            "nbytes": place.nbytes,
        }
        for place in sample.stored.tensors
    ]
    described["document"] = {name: value for name, value in document.items() if name not in ("key", "caption")}
    return described


def _describe_tensor(tensor: FeatureTensor) -> dict[str, Any]:
    described: dict[str, Any] = {"dtype": tensor.dtype, "shape": list(tensor.array.shape)}
    if tensor.dtype != "i32" and tensor.array.size:
        values = tensor.to_float32().astype(np.float64)
        described |= {"mean": float(values.mean()), "std": float(values.std())}
        described |= {"min": float(values.min()), "max": float(values.max())}
    return described


def read_clip_tensors(storage: Storage, key: str, feature: str) -> Mapping[str, FeatureTensor]:
    """The tensors of one clip. Raises InputError where the cache has none of it."""
    clip = find_clip(read_plan(storage), key)
    for folder in find_features(storage):
        if folder.feature == feature:
            generation = folder.generations().get(clip.shard)
            if generation is not None:
                record = folder.read_record(clip.shard, generation)
                sample: SampleRecord = record.samples[clip.row]
                if sample.stored is None:
                    raise InputError(
                        f"{clip.key!r} has no {feature}: quarantined at {sample.stage}: {sample.reason} "
                        f"({sample.detail})"
                    )
                return folder.read_sample(record, sample)[1]
    raise InputError(f"{clip.key!r} has no {feature} in {storage.root} yet")


def posterior_mean(tensors: Mapping[str, FeatureTensor]) -> np.ndarray:
    """(C, T, h, w) float32 unscaled latents, from whichever tensors the cache keeps."""
    if "vae_moments" in tensors:
        moments = tensors["vae_moments"].to_float32()
        return moments[: moments.shape[0] // 2]
    return (tensors["vae_mean"] if "vae_mean" in tensors else tensors["vae_sample"]).to_float32()


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write (F, H, W, 3) uint8 frames as an H.264 mp4; H and W are even.

    Raises: InputError where the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            # without mbtree equal frames give equal bytes, however many threads x264 takes
            stream.options = {"crf": "16", "x264-params": "mbtree=0"}
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode(None))
    except OSError as fault:
        raise InputError(f"{path}: cannot be written: {fault.strerror or fault}") from fault
