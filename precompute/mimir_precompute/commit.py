"""How a finished shard becomes part of a cache: data under its content name, then the commit record.

The record is created only where there is none: of two workers that made the same shard the first wins,
and the other finds either the same bytes (all is well) or others (the first stay, and that is told).
"""

import os
from typing import Literal

from mimir_precompute.shard_writer import FinishedShard
from mimir_shared.errors import MachineError
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
    Raises: MachineError where the disk holds another number of bytes than were written.
    """
    path = data_name(shard, finished.sha256, ENDING)
    name = f"{folder.directory}/{path}"
    _publish_data(folder, temporary, name, finished)
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
    committed = folder.storage.create(folder.record_path(shard, generation), record)
    if committed or folder.read_record_metadata(shard, generation)[0].files == metadata.files:
        # `gc` may have found the data without a record, if this worker slept very long between the two;
        # it looks for records once more after it took a file away, so one of both puts it back
        while not folder.storage.exists(name):
            _publish_data(folder, temporary, name, finished)
        return "committed" if committed else "same"
    return "other"


def _publish_data(folder: FeatureFolder, temporary: TemporaryFile, name: str, finished: FinishedShard) -> None:
    folder.storage.publish_content(temporary, name, finished.sha256)
    nbytes = os.fstat(temporary.file.fileno()).st_size
    if nbytes != finished.nbytes:
        raise MachineError(
            f"{folder.storage.root}/{name}: {nbytes} bytes are on disk, {finished.nbytes} were written; the disk loses "
            f"data: mend it and run the same command again"
        )
