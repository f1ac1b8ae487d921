"""From planned rows to what an encoder takes: pixels, captions and answers, fetched ahead of the encoder."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mimir_precompute.clips.fetch import ClipFetcher
from mimir_precompute.clips.rejection import ClipRejected, RejectionReason
from mimir_precompute.clips.source import hash_source
from mimir_precompute.config import Geometry
from mimir_precompute.decoding.clip_pixels import ClipDecoder
from mimir_precompute.encoders.base import Encoded, EncoderInput
from mimir_precompute.overlap import Channel, Crew
from mimir_precompute.remake import Remake
from mimir_precompute.shard_writer import answers_hash, caption_hash
from mimir_shared.errors import InputError
from mimir_shared.feature_folder import FeatureFolder
from mimir_shared.manifest import CommitRecord, SampleRecord
from mimir_shared.plan_file import Plan, PlannedClip
from mimir_shared.storage.folder import machine_faults


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A clip that the encoder is to see."""

    clip: PlannedClip
    item: EncoderInput
    bucket: str | None
    source_xxh3: int | None

    def without_input(self) -> "Sent":
        """What is kept once the encoder has the input."""
        return Sent(clip=self.clip, bucket=self.bucket, source_xxh3=self.source_xxh3)


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A clip that the encoder has."""

    clip: PlannedClip
    bucket: str | None
    source_xxh3: int | None


@dataclass(frozen=True, kw_only=True)
class Copied:
    """A clip whose feature was made before from the same input; it is read when it is written."""

    clip: PlannedClip
    original: SampleRecord
    record: CommitRecord
    """The commit record that has `original`."""
    folder: FeatureFolder

    def read(self) -> Encoded:
        """The feature as it was made. Raises: CacheError where it is damaged."""
        document, tensors = self.folder.read_sample(self.record, self.original)
        valid_rows = document.pop("valid_rows", {})
        for name in ("key", "caption", "bucket"):
            document.pop(name, None)
        return Encoded(tensors=tensors, document=document, valid_rows=valid_rows)


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A clip that cannot be used."""

    clip: PlannedClip
    rejection: ClipRejected
    bucket: str | None = None
    source_xxh3: int | None = None


@dataclass(frozen=True, kw_only=True)
class Untried:
    """A quarantined clip whose line is taken over from an earlier generation of the shard."""

    clip: PlannedClip
    original: SampleRecord


Prepared = Ready | Copied | Rejected | Untried

Slot = Channel[Prepared]
"""Where a clip is put once it is prepared."""

_SPARE = 2
"""Clips that may wait, prepared, beyond those in the threads."""


class Claims(Protocol):
    """Which shards this worker is to make, one after the other. Called from two threads."""

    def next(self) -> int | None:
        """Claim a shard; waits while other workers have all the rest. None when nothing is left to do, or closed."""
        ...

    def finished(self, shard: int) -> None:
        """Say that a claimed shard is committed."""
        ...

    def close(self) -> None:
        """Let go of all claims, and end a wait in `next`. May be called twice."""
        ...


class ClipPreparer:
    """Prepares the rows of a plan for one feature, shard by shard."""

    def __init__(
        self,
        plan: Plan,
        geometry: Geometry,
        folder: FeatureFolder,
        answers: FeatureFolder | None,
        decoder: ClipDecoder,
        remakes: Mapping[int, Remake],
    ) -> None:
        """For one feature.

        Args:
            remakes: shard → what of it is to be encoded anew, for shards that are made again.
        """
        self.plan = plan
        self.geometry = geometry
        self.folder = folder
        self.answers = answers
        self.decoder = decoder
        self.fetcher = ClipFetcher(plan.settings.source_root)
        self.remakes = remakes
        self.done = folder.generations()

    def for_shard(self, shard: int) -> "ShardPreparer":
        """Read what the rows of a shard depend on. Raises InputError where `answers` has not been made."""
        if self.answers is None:
            return ShardPreparer(self, shard, None)
        generation = self.answers.generations().get(shard)
        if generation is None:
            raise InputError(
                f"{self.answers.storage.root}: shard {shard} has no `answers` yet, from which `llm` is made; "
                f"encode both: --features answers,llm"
            )
        return ShardPreparer(self, shard, self.answers.read_record(shard, generation))


class ShardPreparer:
    """Prepares the rows of one shard. Called from several threads at once."""

    def __init__(self, feature: ClipPreparer, shard: int, answers: CommitRecord | None) -> None:
        self.clips = feature.plan.shard_clips(shard)
        """What the shard is to hold, in row order."""
        self._feature = feature
        self._answers = answers
        self._remake = feature.remakes.get(shard)
        self._older_records: dict[int, CommitRecord] = {}

    def prepare(self, clip: PlannedClip) -> Prepared:
        """Fetch, decode or copy one row. A fault of the clip makes it Rejected; one of the machine raises."""
        if self._remake is not None and self._remake.base is not None:
            original = self._remake.takes_over(clip.row)
            if original is not None:
                return self._take_over(clip, original, self._remake.base)
        source_xxh3 = None
        try:
            if self._feature.plan.is_superseded(clip):
                raise ClipRejected("plan", "superseded", "a later plan changed or removed this clip")
            older = self._feature.plan.older_rows(clip)
            if self._feature.folder.feature == "latents":
                with self._feature.fetcher.fetch(clip) as source:
                    if older:
                        source_xxh3 = hash_source(source)
                    copied = self._copy(clip, older, source_xxh3)
                    return copied if copied is not None else self._decode(clip, source)
            answer = self._answer(clip)
            source_xxh3 = None if answer is None else answers_hash(answer)
            copied = self._copy(clip, older, source_xxh3)
            return copied if copied is not None else self._text(clip, answer, source_xxh3)
        except ClipRejected as rejection:
            if source_xxh3 is None:
                source_xxh3 = rejection.source_xxh3
            if rejection.reason == "missing":
                self._feature.fetcher.refuse_vanished_root(clip)
            return Rejected(clip=clip, rejection=rejection, source_xxh3=source_xxh3)

    def _decode(self, clip: PlannedClip, source: Path | bytes) -> Ready:
        decoder, geometry = self._feature.decoder, self._feature.geometry
        pixels = decoder.decode(source, geometry=geometry, start_s=clip.start_s, end_s=clip.end_s)
        return Ready(
            clip=clip,
            item=EncoderInput(key=clip.key, caption=clip.caption, clip_pixels=pixels.pixels),
            bucket=str(pixels.bucket),
            source_xxh3=pixels.source_xxh3,
        )

    def _answer(self, clip: PlannedClip) -> SampleRecord | None:
        """The clip's answers, for `llm`. Raises ClipRejected where they are lost."""
        if self._answers is None:
            return None
        sample = self._answers.samples[clip.row]
        if sample.status != "ok":
            reason: RejectionReason = sample.reason  # type: ignore[assignment]  # our own record
            raise ClipRejected("answers", reason, sample.detail or "")
        return sample

    def _text(self, clip: PlannedClip, answer: SampleRecord | None, source_xxh3: int | None) -> Ready:
        answers: Mapping[str, Any] | None = None
        if answer is not None:
            assert self._answers is not None, "an answer of a record"
            assert self._feature.answers is not None, "a record of a folder"
            answers, _ = self._feature.answers.read_sample(self._answers, answer)
        item = EncoderInput(key=clip.key, caption=clip.caption, answers=answers)
        return Ready(clip=clip, item=item, bucket=None, source_xxh3=source_xxh3)

    def _take_over(self, clip: PlannedClip, original: SampleRecord, base: CommitRecord) -> Copied | Untried:
        if original.status == "ok":
            return Copied(clip=clip, original=original, record=base, folder=self._feature.folder)
        return Untried(clip=clip, original=original)

    def _copy(self, clip: PlannedClip, older: Iterable[PlannedClip], source_xxh3: int | None) -> Copied | None:
        """The feature of an earlier row of this key that was made from the same input."""
        for earlier in older:
            generation = self._feature.done.get(earlier.shard)
            if generation is None:
                continue
            if earlier.shard not in self._older_records:
                self._older_records[earlier.shard] = self._feature.folder.read_record(earlier.shard, generation)
            record = self._older_records[earlier.shard]
            sample = record.samples[earlier.row]
            if self._feature.folder.feature == "latents":
                same = (clip.start_s, clip.end_s) == (earlier.start_s, earlier.end_s)
            else:
                same = sample.caption_xxh3 == caption_hash(clip.caption)
            if same and sample.source_xxh3 == source_xxh3 and sample.status == "ok":
                return Copied(clip=clip, original=sample, record=record, folder=self._feature.folder)
        return None


def prepare_shards(
    crew: Crew, preparer: ClipPreparer, claims: Claims, workers: int
) -> Iterator[tuple[int, Iterator[Prepared]]]:
    """Prepare the rows of claimed shards in threads: (shard, its rows), all in order.

    Never more than a few clips are ahead of the one that is taken, whatever shard they are of. Each shard's rows are
    to be taken to their end before the next shard is asked for.
    """
    shards: Channel[tuple[int, Channel[Slot]]] = crew.channel(workers + _SPARE)
    # a ticket for each clip that was handed to a thread and not taken yet
    tickets: Channel[None] = crew.channel(workers + _SPARE)
    todo: Channel[tuple[ShardPreparer, PlannedClip, Slot]] = crew.channel(workers + _SPARE)

    def claim_and_assign() -> None:
        # not in the thread that encodes: a claim may wait for other workers while clips of ours are still to be encoded
        for shard in iter(claims.next, None):
            shard_preparer = preparer.for_shard(shard)
            slots: Channel[Slot] = crew.channel(workers + _SPARE)
            shards.put((shard, slots))
            for clip in shard_preparer.clips:
                tickets.put(None)
                slot: Slot = crew.channel(1)
                slots.put(slot)
                todo.put((shard_preparer, clip, slot))
            slots.close()
        shards.close()
        todo.close()

    def prepare() -> None:
        for shard_preparer, clip, slot in todo:
            with machine_faults(f"{preparer.folder.storage.root}: preparing clip {clip.key!r}"):
                slot.put(shard_preparer.prepare(clip))

    def take(slots: Channel[Slot]) -> Iterator[Prepared]:
        for slot in slots:
            yield slot.get()
            tickets.get()

    crew.start("claim", claim_and_assign, wake=claims.close)
    for number in range(workers):
        # once the crew stops, nobody waits for a decoder that hangs
        crew.start(f"prepare-{number}", prepare, wake=preparer.decoder.close)
    for shard, slots in shards:
        yield shard, take(slots)


def in_batches(prepared: Iterable[Prepared], batch_size: int) -> Iterator[list[Prepared]]:
    """Cut a shard's rows where the clips to be encoded are `batch_size`, or their bucket changes.

    Rows stay in order, those that need no encoder among them. A batch is handed out once it is full: nothing waits
    for a row that follows. The lists are the taker's, to be emptied.
    """
    batch: list[Prepared] = []
    bucket: str | None = None
    ready = 0
    for row in prepared:
        if isinstance(row, Ready):
            if ready and row.bucket != bucket:
                yield batch
                batch, ready = [], 0
            bucket = row.bucket
            ready += 1
        batch.append(row)
        del row  # whoever takes the batch is to be the last who holds its pixels
        if ready in (0, batch_size):
            yield batch
            batch, ready = [], 0
    if batch:
        yield batch
