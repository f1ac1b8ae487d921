"""A cache as plain WebDataset tars with all features of a clip in one sample, for trainers that read nothing else.

    000123-1a2b3c4d.tar
      00012300041.json                    key, caption, bucket, valid_rows, and each feature's text under its name
      00012300041.latents.safetensors     and .t5.safetensors, .llm.safetensors: the tensors of each feature
    merged.json                           which snapshot was merged

An export, no cache: there are no commit records, so nothing can be verified, repaired or added to it. Each tar appears
whole or not at all, named by its content; the clips are those of the snapshot, ok in every feature.
"""

import json
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from mimir_precompute.workers.progress import Progress
from mimir_shared.errors import InputError
from mimir_shared.formats.webdataset import ENDING, SampleTar, document_bytes
from mimir_shared.layout import sample_stem
from mimir_shared.safetensors_bytes import tensors_to_safetensors
from mimir_shared.snapshot_reader import SnapshotReader
from mimir_shared.storage.folder import machine_faults
from mimir_shared.storage.protocol import Storage

MERGED_NAME: Final = "merged.json"


@dataclass(kw_only=True)
class MergeOutcome:
    tars: int = 0
    """Written by this call."""
    tars_done_before: int = 0
    clips: int = 0
    """Of the snapshot, in all tars."""
    nbytes: int = 0
    """Written by this call."""


def merge_features(cache: SnapshotReader, target: Storage, progress: Progress) -> MergeOutcome:
    """Write one tar for every shard of a snapshot; those that are there already are left as they are.

    Raises: InputError where the target holds the merge of another snapshot; CacheError where a sample is damaged;
        MachineError for faults of the disk.
    """
    _claim(cache, target)
    done = {name.partition("-")[0] for name in target.list("") if name.endswith(f".{ENDING}")}
    outcome = MergeOutcome(clips=len(cache))
    with progress.feature("merged", shards=cache.num_shards, clips=len(cache), verb="merge"):
        for shard, numbers in groupby(range(len(cache)), lambda number: cache.clip(number).shard):
            clips = list(numbers)
            nbytes = 0
            if f"{shard:06d}" in done:
                outcome.tars_done_before += 1
            else:
                nbytes = _merge_shard(cache, target, shard, clips)
                outcome.tars += 1
                outcome.nbytes += nbytes
            progress.advance(len(clips), quarantined=0)
            progress.shard_done(shard, nbytes=nbytes, quarantined=0)
    return outcome


def _claim(cache: SnapshotReader, target: Storage) -> None:
    """Say in the target what is merged there, or find that the same is."""
    features = {name: feature.fingerprint for name, feature in cache.snapshot.features.items()}
    document = {"snapshot": cache.snapshot.digest, "clips": len(cache), "features": features}
    data = json.dumps(document, indent=1).encode() + b"\n"
    if not target.create(MERGED_NAME, data) and target.read(MERGED_NAME) != data:
        raise InputError(
            f"{target.root}/{MERGED_NAME}: another snapshot was merged here, expected {cache.snapshot.digest[:12]} of "
            f"{cache.storage.root}; give an empty folder as --out"
        )


def _merge_shard(cache: SnapshotReader, target: Storage, shard: int, numbers: list[int]) -> int:
    """Write the tar of one shard; how many bytes it has."""
    with machine_faults(f"{target.root}: writing shard {shard}"), target.temporary() as temporary:
        tar = SampleTar(temporary)
        for number in numbers:
            stem = sample_stem(shard, cache.clip(number).row)
            tar.add(f"{stem}.json", document_bytes(_merged_document(cache, number)))
            for feature in cache.features:
                tensors = cache.read(number, feature)
                if tensors:
                    tar.add(f"{stem}.{feature}.safetensors", tensors_to_safetensors(tensors))
        output = tar.finish()
        target.publish_content(temporary, f"{shard:06d}-{output.sha256[:8]}.{ENDING}", output.sha256)
        return output.nbytes


def _merged_document(cache: SnapshotReader, number: int) -> dict[str, Any]:
    """What all features say of a clip: what they share once, the rest under the feature's name."""
    clip = cache.clip(number)
    valid_rows: dict[str, int] = {}
    merged: dict[str, Any] = {"key": clip.key, "caption": clip.caption, "bucket": clip.bucket, "valid_rows": valid_rows}
    for feature in cache.features:
        document = cache.document(clip.key, feature)
        valid_rows.update(document.pop("valid_rows", {}))
        own = {name: value for name, value in document.items() if name not in merged}
        if own:
            merged[feature] = own
    return merged
