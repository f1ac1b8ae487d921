"""From planned rows to what an encoder takes: pixels, captions and answers, fetched ahead of the encoder."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimir_precompute.clip_source import hash_source
from mimir_precompute.clips import ClipDecoder
from mimir_precompute.config import Geometry
from mimir_precompute.encoders.base import Encoded, EncoderInput
from mimir_precompute.rejection import ClipRejected, RejectionReason
from mimir_precompute.shard_writer import caption_hash
from mimir_shared.errors import InputError, MachineError
from mimir_shared.feature_folder import FeatureFolder
from mimir_shared.features import FeatureName
from mimir_shared.manifest import CommitRecord, SampleRecord
from mimir_shared.plan_file import Plan, PlannedClip


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A clip that the encoder is to see."""

    clip: PlannedClip
    item: EncoderInput
    bucket: str | None
    source_xxh3: int | None


@dataclass(frozen=True, kw_only=True)
class Copied:
    """A clip whose feature was made before from the same input."""

    clip: PlannedClip
    original: SampleRecord
    encoded: Encoded


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A clip that cannot be used."""

    clip: PlannedClip
    rejection: ClipRejected
    bucket: str | None = None
    source_xxh3: int | None = None


Prepared = Ready | Copied | Rejected


class ClipPreparer:
    """Prepares the rows of a plan for one feature. Called from several threads at once."""

    def __init__(
        self,
        plan: Plan,
        geometry: Geometry,
        folder: FeatureFolder,
        answers: FeatureFolder | None,
        decoder: ClipDecoder,
    ) -> None:
        self._plan = plan
        self._geometry = geometry
        self._folder = folder
        self._answers = answers
        self._decoder = decoder
        self._root = Path(plan.settings.source_root)
        self._done = folder.generations()
        self._records: dict[tuple[FeatureName, int], CommitRecord] = {}

    def start_shard(self, shard: int) -> None:
        """Read what the rows of a shard depend on. Raises InputError where `answers` has not been made."""
        self._records = {}
        if self._answers is not None:
            generation = self._answers.generations().get(shard)
            if generation is None:
                raise InputError(
                    f"{self._answers.storage.root}: shard {shard} has no `answers` yet, from which `llm` is made; "
                    f"encode both: --features answers,llm"
                )
            self._records["answers", shard] = self._answers.read_record(shard, generation)

    def prepare(self, clip: PlannedClip) -> Prepared:
        """Fetch, decode or copy one row. A fault of the clip makes it Rejected; one of the machine raises."""
        source_xxh3 = None
        try:
            if self._plan.is_superseded(clip):
                raise ClipRejected("plan", "superseded", "a later plan changed or removed this clip")
            if self._folder.feature == "latents":
                source = find_source(self._root, clip)
                older = self._plan.older_rows(clip)
                if older:
                    source_xxh3 = hash_source(source)
                copied = self._copy(clip, older, source_xxh3)
                return copied if copied is not None else self._decode(clip, source)
            copied = self._copy(clip, self._plan.older_rows(clip), None)
            return copied if copied is not None else self._text(clip)
        except ClipRejected as rejection:
            if source_xxh3 is None:
                source_xxh3 = rejection.source_xxh3
            return Rejected(clip=clip, rejection=rejection, source_xxh3=source_xxh3)

    def _decode(self, clip: PlannedClip, source: Path | bytes) -> Ready:
        pixels = self._decoder.decode(source, geometry=self._geometry, start_s=clip.start_s, end_s=clip.end_s)
        return Ready(
            clip=clip,
            item=EncoderInput(key=clip.key, caption=clip.caption, clip_pixels=pixels.pixels),
            bucket=str(pixels.bucket),
            source_xxh3=pixels.source_xxh3,
        )

    def _text(self, clip: PlannedClip) -> Ready:
        answers: Mapping[str, Any] | None = None
        if self._answers is not None:
            record = self._records["answers", clip.shard]
            sample = record.samples[clip.row]
            if sample.status != "ok":
                reason: RejectionReason = sample.reason  # type: ignore[assignment]  # our own record
                raise ClipRejected("answers", reason, sample.detail or "")
            answers, _ = self._answers.read_sample(record, sample)
        item = EncoderInput(key=clip.key, caption=clip.caption, answers=answers)
        return Ready(clip=clip, item=item, bucket=None, source_xxh3=None)

    def _copy(self, clip: PlannedClip, older: Iterable[PlannedClip], source_xxh3: int | None) -> Copied | None:
        """The feature of an earlier row of this key that was made from the same input."""
        for earlier in older:
            generation = self._done.get(earlier.shard)
            if generation is None:
                continue
            if (self._folder.feature, earlier.shard) not in self._records:
                record = self._folder.read_record(earlier.shard, generation)
                self._records[self._folder.feature, earlier.shard] = record
            record = self._records[self._folder.feature, earlier.shard]
            sample = record.samples[earlier.row]
            if self._folder.feature == "latents":
                trim = (clip.start_s, clip.end_s) == (earlier.start_s, earlier.end_s)
                same = trim and sample.source_xxh3 == source_xxh3
            else:
                same = sample.caption_xxh3 == caption_hash(clip.caption)
            if same and sample.status == "ok":
                return Copied(clip=clip, original=sample, encoded=self._read_encoded(record, sample))
        return None

    def _read_encoded(self, record: CommitRecord, sample: SampleRecord) -> Encoded:
        document, tensors = self._folder.read_sample(record, sample)
        valid_rows = document.pop("valid_rows", {})
        for name in ("key", "caption", "bucket"):
            document.pop(name, None)
        return Encoded(tensors=tensors, document=document, valid_rows=valid_rows)


def find_source(root: Path, clip: PlannedClip) -> Path | bytes:
    """The file of a planned clip, or its bytes where it is a member of a tar.

    Args:
        root: `source_root` of the plan.
    Raises: ClipRejected where the tar is missing or cut, MachineError where it cannot be read.
    """
    if clip.source_offset is None:
        return root / clip.source
    tar_name, _, _ = clip.source.partition("::")
    assert clip.source_bytes is not None, f"{clip.source} is a member of a tar without a length"
    try:
        with open(root / tar_name, "rb") as tar:
            tar.seek(clip.source_offset)
            data = tar.read(clip.source_bytes)
    except FileNotFoundError as fault:
        raise ClipRejected("fetch", "missing", "the tar that holds it is missing") from fault
    except OSError as fault:
        raise MachineError(f"{root / tar_name}: cannot be read: {fault.strerror}; run it again") from fault
    if len(data) != clip.source_bytes:
        raise ClipRejected("fetch", "truncated", f"{len(data)} of {clip.source_bytes} bytes are left in its tar")
    return data


def prepare_ahead(preparer: ClipPreparer, clips: Iterable[PlannedClip], workers: int) -> Iterator[Prepared]:
    """Prepare clips in threads, in order, never more than a few beyond the one that is taken."""
    ahead = workers + 2
    with ThreadPoolExecutor(workers, thread_name_prefix="prepare") as pool:
        queue: deque[Future[Prepared]] = deque()
        try:
            for clip in clips:
                queue.append(pool.submit(preparer.prepare, clip))
                if len(queue) > ahead:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        finally:
            for future in queue:
                future.cancel()


def in_batches(prepared: Iterable[Prepared], batch_size: int) -> Iterator[list[Prepared]]:
    """Cut a shard's rows where the clips to be encoded are `batch_size`, or their bucket changes.

    Rows stay in order, those that need no encoder among them.
    """
    batch: list[Prepared] = []
    bucket: str | None = None
    ready = 0
    for row in prepared:
        if isinstance(row, Ready):
            if ready and (ready == batch_size or row.bucket != bucket):
                yield batch
                batch, ready = [], 0
            bucket = row.bucket
            ready += 1
        batch.append(row)
    if batch:
        yield batch
