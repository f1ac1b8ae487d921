"""How a finished shard becomes part of a cache: data under its content name, then the commit record.

The record is created only where there is none: of two workers that made the same shard the first wins,
and the other finds either the same bytes (all is well) or others (the first stay, and that is told).
"""

from typing import Literal

from mimir_precompute.shard_writer import FinishedShard
from mimir_shared.feature_folder import FeatureFolder
from mimir_shared.formats.webdataset import ENDING
from mimir_shared.layout import data_name
from mimir_shared.manifest import DataFile, RecordMetadata, write_record
from mimir_shared.storage import TemporaryFile

CommitResult = Literal["committed", "same", "other"]


def commit_shard(
    folder: FeatureFolder,
    temporary: TemporaryFile,
    finished: FinishedShard,
    *,
    shard: int,
    fingerprint: str,
    plan_seal: str,
    generation: int = 0,
) -> CommitResult:
    """Publish a shard's data and then its record.

    Returns: "committed"; "same" where another worker committed the same bytes first; "other" where it
        committed other bytes, which stay.
    """
    path = data_name(shard, finished.sha256, ENDING)
    folder.storage.publish_content(temporary, f"{folder.directory}/{path}", finished.sha256)
    ok = sum(sample.status == "ok" for sample in finished.samples)
    metadata = RecordMetadata(
        feature=folder.feature,
        shard=shard,
        generation=generation,
        format="webdataset",
        fingerprint=fingerprint,
        plan=plan_seal,
        files=(DataFile(path=path, bytes=finished.nbytes, sha256=finished.sha256),),
        ok=ok,
        quarantined=len(finished.samples) - ok,
        statistics=finished.statistics,
    )
    record = write_record(metadata, finished.samples)
    if folder.storage.create(folder.record_path(shard, generation), record):
        return "committed"
    first, _ = folder.read_record_metadata(shard, generation)
    return "same" if first.files == metadata.files else "other"
