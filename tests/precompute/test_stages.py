"""Decode, encode and write at once: order, bounds, overlap and failures, proven with events and not with clocks."""

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimir_precompute import pipeline
from mimir_precompute.clips.clip_list import read_clip_list
from mimir_precompute.clips.rejection import ClipRejected
from mimir_precompute.config import Bucket, Geometry
from mimir_precompute.decoding.clip_pixels import ClipPixels
from mimir_precompute.encoders.base import Encoded, Encoder, EncoderInput
from mimir_precompute.inspection.status import read_status
from mimir_precompute.pipeline import EncodeJob, EncodeOutcome, encode_cache
from mimir_precompute.planning.plan import PlanRequest, update_plan
from mimir_precompute.prepare import Prepared, Ready, Rejected, in_batches
from mimir_precompute.provenance import RunLog
from mimir_precompute.shard_writer import ShardWriter
from mimir_precompute.workers.progress import Progress
from mimir_shared.features import FeatureName
from mimir_shared.plan_file import PlannedClip, read_plan
from mimir_shared.storage.folder import LocalStorage
from tests.fake_encoders import FakeEncoders, tree

SOON_S = 30.0
"""Longer than any of this takes on a busy machine: what hangs fails."""

BUCKET = Bucket(frames=1, height=64, width=96)


@dataclass
class Stages:
    """What the stages have done so far, and gates that a test holds shut."""

    decoded: int = 0
    written: int = 0
    most_in_flight: int = 0
    may_write: threading.Event = field(default_factory=threading.Event)
    encoded: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    fail: dict[str, BaseException] = field(default_factory=dict)
    """Stage → what it raises at its fourth clip."""

    def __post_init__(self) -> None:
        self.may_write.set()

    def decode(
        self, source: bytes | Path, *, geometry: Geometry, start_s: float | None = None, end_s: float | None = None
    ) -> ClipPixels:
        """As a ClipDecoder: one grey frame that follows from the file's name."""
        assert isinstance(source, Path)
        with self.lock:
            self.decoded += 1
            self.most_in_flight = max(self.most_in_flight, self.decoded - self.written)
            self.raise_at_fourth("decode", self.decoded)
        number = int(source.stem)
        return ClipPixels(pixels=np.full((1, 64, 96, 3), number % 256, np.uint8), bucket=BUCKET, source_xxh3=number)

    def close(self) -> None:
        pass

    def raise_at_fourth(self, stage: str, count: int) -> None:
        if count == 4 and stage in self.fail:
            raise self.fail[stage]


class CountingEncoders(FakeEncoders):
    """Fake encoders that tell the stages what they encode."""

    def __init__(self, stages: Stages, batch: int = 2) -> None:
        super().__init__(batch=batch, buckets=("1x64x96",))
        self.stages = stages
        self.sizes: list[tuple[str, ...]] = []

    def build(self, feature: FeatureName) -> Encoder:
        encoder = super().build(feature)
        encode = encoder.encode

        def encode_and_tell(batch: Sequence[EncoderInput]) -> list[Encoded]:
            self.sizes.append(tuple(item.key for item in batch))
            for item in batch:
                self.stages.encoded.append(item.key)
                self.stages.raise_at_fourth("encode", len(self.stages.encoded))
            return encode(batch)

        encoder.encode = encode_and_tell  # type: ignore[method-assign]
        return encoder


def make_cache(folder: Path, clips: int, shard_size: int) -> LocalStorage:
    """A plan over files that only the fake decoder can read."""
    source = folder / "clips"
    source.mkdir(parents=True)
    rows = []
    for number in range(clips):
        (source / f"{number:04d}.mp4").write_bytes(b"x")
        rows.append(f'{{"file_name": "{number:04d}.mp4", "text": "clip {number}"}}')
    (source / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    storage = LocalStorage(folder / "cache")
    request = PlanRequest(buckets=(BUCKET,), fps=8, shard_size=shard_size)
    update_plan(storage, None, read_clip_list(str(source)), request)
    return storage


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    """Stages that see every clip that is written."""
    found = Stages()
    add = ShardWriter.add

    def add_and_tell(writer: ShardWriter, clip: PlannedClip, *rest: Any, **options: Any) -> None:
        assert found.may_write.wait(SOON_S)
        found.raise_at_fourth("write", found.written + 1)
        add(writer, clip, *rest, **options)
        with found.lock:
            found.written += 1

    monkeypatch.setattr(ShardWriter, "add", add_and_tell)
    return found


def encode(storage: LocalStorage, stages: Stages, *, batch: int = 2, **options: Any) -> EncodeOutcome:
    plan = read_plan(storage)
    job = EncodeJob(
        storage=storage,
        plan=plan,
        encoders=options.pop("encoders", None) or CountingEncoders(stages, batch),
        shards=options.pop("shards", tuple(range(plan.num_shards))),
        features=("latents",),
        decoder=stages,
        **options,
    )
    return encode_cache(job, Progress(quiet=True), RunLog(storage, "cpu"))


def in_time(work: Callable[[], Any]) -> None:
    """Run it in a thread and raise what it raises; fail if it does not end."""
    fault: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as raised:  # handed on  # noqa: BLE001
            fault.append(raised)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SOON_S)
    assert not thread.is_alive(), "hangs"
    if fault:
        raise fault[0]


@contextmanager
def running(work: Callable[[], Any]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield thread
    thread.join(SOON_S)
    assert not thread.is_alive(), "hangs"


def wait_until(is_true: Callable[[], bool]) -> bool:
    """Wait for a condition as long as a busy machine may need; False if it never comes."""
    condition = threading.Condition()
    with condition:
        for _ in range(int(SOON_S / 0.01)):
            if is_true():
                return True
            condition.wait(0.01)
    return False


@pytest.mark.parametrize("batch", [1, 3])
def test_the_cache_is_the_same_for_any_number_of_decode_workers(tmp_path: Path, stages: Stages, batch: int) -> None:
    caches = []
    for workers in (1, 2, 4):
        storage = make_cache(tmp_path / f"{workers}", clips=13, shard_size=5)
        in_time(lambda: encode(storage, stages, batch=batch, decode_workers=workers))  # noqa: B023 (called at once)
        # a plan holds the folder that its clips are in, and a snapshot the plan's seal
        caches.append(tree(storage.root, leave_out=("logs", "plan", "snapshots")))
    assert {name.split("/")[2] for name in caches[0]} == {"spec.json", "data", "manifests"}
    data = [{name: content for name, content in cache.items() if "/data/" in name} for cache in caches]
    assert data[0] == data[1] == data[2]
    assert len(data[0]) == 3


def test_batches_never_cross_a_shard_and_are_as_large_as_they_may_be(tmp_path: Path, stages: Stages) -> None:
    storage = make_cache(tmp_path, clips=13, shard_size=5)
    encoders = CountingEncoders(stages, batch=2)
    in_time(lambda: encode(storage, stages, encoders=encoders))
    plan = read_plan(storage)
    expected = []
    for shard in range(plan.num_shards):
        keys = [clip.key for clip in plan.shard_clips(shard)]
        expected += [tuple(keys[begin : begin + 2]) for begin in range(0, len(keys), 2)]
    assert encoders.sizes == expected


def test_a_batch_is_handed_out_once_it_is_full_and_rows_without_input_wait_for_nothing() -> None:
    def clip(row: int) -> PlannedClip:
        return PlannedClip(f"{row}", 0, row, "", "", None, None, None, None, None, False)

    def ready(row: int, bucket: str) -> Ready:
        item = EncoderInput(key=f"{row}", caption="")
        return Ready(clip=clip(row), item=item, bucket=bucket, source_xxh3=None)

    def rejected(row: int) -> Rejected:
        return Rejected(clip=clip(row), rejection=ClipRejected("decode", "truncated", ""))

    taken: list[int] = []

    def rows() -> Iterator[Prepared]:
        given = [rejected(0), ready(1, "a"), rejected(2), ready(3, "a"), rejected(4), ready(5, "a"), ready(6, "b")]
        for row in given:
            taken.append(row.clip.row)
            yield row

    batches = []
    for batch in in_batches(rows(), 2):
        batches.append([row.clip.row for row in batch])
        if batch[-1].clip.row < 5:
            assert taken[-1] == batch[-1].clip.row
    assert batches == [[0], [1, 2, 3], [4], [5], [6]]


def test_the_encoder_goes_on_into_the_next_shards_while_a_write_is_stuck(tmp_path: Path, stages: Stages) -> None:
    storage = make_cache(tmp_path, clips=16, shard_size=2)
    stages.may_write.clear()
    with running(lambda: encode(storage, stages, batch=1)):
        # the first shard has not one clip on disk; its successor is encoded
        assert wait_until(lambda: len(stages.encoded) >= 4), stages.encoded
        assert stages.written == 0
        stages.may_write.set()
    assert read_status(storage).complete


def test_the_encoder_goes_on_while_a_shard_is_committed(
    tmp_path: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make_cache(tmp_path, clips=12, shard_size=4)
    may_commit = threading.Event()
    commit_shard = pipeline.commit_shard

    def commit_later(*arguments: Any, **options: Any) -> Any:
        assert may_commit.wait(SOON_S)
        return commit_shard(*arguments, **options)

    monkeypatch.setattr(pipeline, "commit_shard", commit_later)
    with running(lambda: encode(storage, stages, batch=1)):
        assert wait_until(lambda: len(stages.encoded) == 8), stages.encoded
        assert read_status(storage).features["latents"][0].shards_done == 0
        may_commit.set()
    assert read_status(storage).complete


def test_clips_in_flight_are_bounded_whatever_the_number_of_clips(tmp_path: Path, stages: Stages) -> None:
    workers, batch = 3, 2
    # the threads', those that wait prepared, two batches at the encoder, and those that wait to be written
    bound = workers + 2 + 1 + 3 * batch + pipeline._CLIPS_TO_WRITE + 2 * batch
    storage = make_cache(tmp_path, clips=bound + 100, shard_size=bound + 100)
    stages.may_write.clear()
    with running(lambda: encode(storage, stages, batch=batch, decode_workers=workers)):
        assert wait_until(lambda: len(stages.encoded) >= pipeline._CLIPS_TO_WRITE)
        threading.Event().wait(0.5)  # time in which an unbounded pipeline would decode all
        assert stages.decoded <= bound
        stages.may_write.set()
    assert stages.written == bound + 100
    assert stages.most_in_flight <= bound


@pytest.mark.parametrize("clips", [40, 160])
def test_pixels_are_let_go_once_they_are_encoded(tmp_path: Path, stages: Stages, clips: int) -> None:
    storage = make_cache(tmp_path, clips=clips, shard_size=20)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Watched(np.ndarray):
        """An array that can be pointed to weakly."""

        __hash__ = object.__hash__

    decode = stages.decode

    def decode_watched(source: bytes | Path, **options: Any) -> ClipPixels:
        nonlocal most
        found = decode(source, **options)
        pixels = found.pixels.view(Watched)
        with stages.lock:
            alive.add(pixels)
            most = max(most, len(alive))
        return ClipPixels(pixels=pixels, bucket=found.bucket, source_xxh3=found.source_xxh3)

    stages.decode = decode_watched  # type: ignore[method-assign]
    in_time(lambda: encode(storage, stages, batch=2, decode_workers=2))
    # two threads, two that wait prepared, one in hand; a batch at the encoder, and two that are let go
    assert most <= 2 + 2 + 1 + 3 * 2


@pytest.mark.parametrize("stage", ["decode", "encode", "write"])
@pytest.mark.parametrize("fault", [RuntimeError("a bug of ours"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failure_in_any_stage_ends_the_run_with_it_and_leaves_nothing_behind(
    tmp_path: Path, stages: Stages, stage: str, fault: BaseException
) -> None:
    storage = make_cache(tmp_path, clips=60, shard_size=20)
    stages.fail[stage] = fault
    with pytest.raises(type(fault)) as caught:
        in_time(lambda: encode(storage, stages))
    assert caught.value is fault
    assert "raise_at_fourth" in [entry.name for entry in caught.traceback]
    assert not list(storage.root.glob("tmp/*"))
    assert not list(storage.root.glob("latents/*/manifests/*"))
    assert not list(storage.root.glob("latents/*/data/*"))
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(("prepare", "write"))] == []
    stages.fail.clear()
    in_time(lambda: encode(storage, stages))
    assert read_status(storage).complete


def test_a_failure_while_the_writer_is_slow_keeps_what_was_committed_and_commits_no_half_shard(
    tmp_path: Path, stages: Stages
) -> None:
    storage = make_cache(tmp_path, clips=12, shard_size=3)
    stages.fail["write"] = OSError(28, "No space left on device")  # at the first clip of the second shard
    with pytest.raises(Exception, match=r"writing shard 1 of latents: No space left on device.*\(ENOSPC\)") as caught:
        in_time(lambda: encode(storage, stages))
    assert getattr(caught.value, "exit_code", None) == 5
    assert read_status(storage).features["latents"][0].shards_done == 1
    stages.fail.clear()
    in_time(lambda: encode(storage, stages))
    assert read_status(storage).complete


def test_a_claim_that_waits_for_others_holds_up_neither_our_clips_nor_a_failure(
    tmp_path: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make_cache(tmp_path, clips=6, shard_size=3)

    class OneShardIsFree:
        """Claims of which the second never comes: another worker has that shard."""

        def __init__(self) -> None:
            self.given = False
            self.closed = threading.Event()
            self.done: list[int] = []

        def next(self) -> int | None:
            if self.given:
                assert self.closed.wait(SOON_S)
                return None
            self.given = True
            return 0

        def finished(self, shard: int) -> None:
            self.done.append(shard)

        def close(self) -> None:
            self.closed.set()

    claims = OneShardIsFree()
    monkeypatch.setattr(pipeline, "ShardClaims", lambda *_, **__: claims)
    with running(lambda: encode(storage, stages, shards=(0,))):
        assert wait_until(lambda: claims.done == [0])
        assert read_status(storage).features["latents"][0].shards_done == 1
        claims.closed.set()
    again = make_cache(tmp_path / "again", clips=6, shard_size=3)
    monkeypatch.setattr(pipeline, "ShardClaims", lambda *_, **__: OneShardIsFree())
    stages.fail["write"] = RuntimeError("a bug of ours")
    stages.written = 3
    with pytest.raises(RuntimeError, match="a bug of ours"):
        in_time(lambda: encode(again, stages))


def test_status_sees_the_worker_while_it_works_and_nobody_afterwards(tmp_path: Path, stages: Stages) -> None:
    storage = make_cache(tmp_path, clips=6, shard_size=3)
    stages.may_write.clear()
    with running(lambda: encode(storage, stages)):
        assert wait_until(lambda: len(read_status(storage).workers) == 1)
        (worker,) = read_status(storage).workers
        assert (worker.state, worker.report.pid, worker.report.feature) == ("working", os.getpid(), "latents")
        stages.may_write.set()
    after = read_status(storage)
    assert after.complete
    assert after.workers == []
    assert not (storage.root / "logs" / "workers").exists()
