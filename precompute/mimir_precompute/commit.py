"""How a finished shard becomes part of a cache: data under its content name, then the commit record.

The record is created only where there is none: of two workers that made the same shard the first wins,
and the other finds either the same bytes (all is well) or others (the first stay, and that is told).
"""

import os
from typing import Literal

from mimir_precompute.shard_writer import FinishedShard
from mimir_shared.errors import MachineError
from mimir_shared.feature_folder import FeatureFolder
from mimir_shared.formats.shard_format import WrittenFile
from mimir_shared.manifest import CacheFormat, RecordMetadata, write_record

CommitResult = Literal["committed", "same", "other"]


def commit_shard(
    folder: FeatureFolder,
    finished: FinishedShard,
    *,
    data_format: CacheFormat,
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
    _publish_data(folder, finished)
    ok = sum(sample.status == "ok" for sample in finished.samples)
    metadata = RecordMetadata(
        feature=folder.feature,
        shard=shard,
        generation=generation,
        format=data_format,
        fingerprint=fingerprint,
        plan=plan_seal,
        files=tuple(written.data_file for written in finished.files),
        ok=ok,
        quarantined=len(finished.samples) - ok,
        statistics=finished.statistics,
    )
    record = write_record(metadata, finished.samples)
    committed = folder.storage.create(folder.record_path(shard, generation), record)
    if committed or folder.read_record_metadata(shard, generation)[0].files == metadata.files:
        # `gc` may have found the data without a record, if this worker slept very long between the two;
        # it looks for records once more after it took a file away, so one of both puts it back
        while not all(folder.storage.exists(_name(folder, written)) for written in finished.files):
            _publish_data(folder, finished)
        return "committed" if committed else "same"
    return "other"


def _publish_data(folder: FeatureFolder, finished: FinishedShard) -> None:
    for written in finished.files:
        name, expected = _name(folder, written), written.data_file
        folder.storage.publish_content(written.temporary, name, expected.sha256)
        nbytes = os.fstat(written.temporary.file.fileno()).st_size
        if nbytes != expected.bytes:
            raise MachineError(
                f"{folder.storage.root}/{name}: {nbytes} bytes are on disk, {expected.bytes} were written; the disk "
                f"loses data: mend it and run the same command again"
            )


def _name(folder: FeatureFolder, written: WrittenFile) -> str:
    return f"{folder.directory}/{written.data_file.path}"
