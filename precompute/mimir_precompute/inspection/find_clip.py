"""Finding one clip in a plan and its samples in a cache, and its latents decoded back to a video."""

import difflib
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from mimir_shared.errors import InputError
from mimir_shared.feature_folder import FeatureFolder, find_features
from mimir_shared.features import FeatureTensor
from mimir_shared.manifest import CommitRecord, SampleRecord
from mimir_shared.plan_file import Plan, PlannedClip, read_plan
from mimir_shared.storage.protocol import Storage

_MOST_KEYS_COMPARED = 100_000
"""Spelling is compared with no more keys than this, which takes about a second."""


def find_clip(plan: Plan, key: str) -> PlannedClip:
    """The newest planned row of a key; a unique key without its file ending is understood as well.

    Raises: InputError that names similar keys.
    """
    newest = plan.newest_rows()
    shard, row = newest[complete_key(key, newest)]
    return plan.shard_clips(shard)[row]


def complete_key(key: str, known: Iterable[str]) -> str:
    """The key that is meant: the same, or the only one that differs by its file ending alone.

    Raises: InputError that names similar keys.
    """
    keys = known if isinstance(known, Mapping | set) else set(known)
    if key in keys:
        return key
    alike = sorted(one for one in keys if one.rsplit(".", 1)[0] == key)
    if len(alike) == 1:
        return alike[0]
    near = alike or sorted(one for one in keys if key and key.lower() in one.lower())
    if not near and len(keys) <= _MOST_KEYS_COMPARED:
        near = difflib.get_close_matches(key, sorted(keys), n=5)
    hint = f"; did you mean {', '.join(near[:5])}?" if near else ""
    raise InputError(f"key {key!r}: not in the plan of {len(keys)} clips{hint}")


def find_sample(
    storage: Storage, clip: PlannedClip, feature: str, fingerprint: str = ""
) -> tuple[FeatureFolder, CommitRecord, SampleRecord]:
    """Where a cache holds one feature of a clip; the first fingerprint at which it is ok.

    Args:
        fingerprint: how the feature's begins, where the cache has it more than once.
    Raises: InputError where the cache has none of it.
    """
    why = f"not in {storage.root} yet"
    present = [folder for folder in find_features(storage) if folder.feature == feature]
    fitting = [folder for folder in present if folder.fingerprint.startswith(fingerprint)]
    if present and not fitting:
        names = ", ".join(folder.fingerprint for folder in present)
        raise InputError(f"--feature {feature}={fingerprint}: {storage.root} has none such; expected one of {names}")
    for folder in fitting:
        generation = folder.generations().get(clip.shard)
        if generation is None:
            continue
        record = folder.read_record(clip.shard, generation)
        sample = record.samples[clip.row]
        if sample.stored is not None:
            return folder, record, sample
        why = f"quarantined at {sample.stage}: {sample.reason} ({sample.detail})"
    raise InputError(f"{clip.key!r} has no {feature}: {why}")


def read_clip_tensors(storage: Storage, key: str, feature: str) -> Mapping[str, FeatureTensor]:
    """The tensors of one clip. Raises InputError where the cache has none of it."""
    folder, record, sample = find_sample(storage, find_clip(read_plan(storage), key), feature)
    return folder.read_sample(record, sample)[1]


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
