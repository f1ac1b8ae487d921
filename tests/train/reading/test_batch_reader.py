"""The reader: equal to the naive one bit for bit, in memory that is used again and never under anyone's eyes."""

import ctypes
import gc
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mimir_shared.clip_table import Clip
from mimir_shared.errors import CacheError, MachineError
from mimir_train.cache_reader import Cache, open_cache
from mimir_train.order.clip_order import TrainingOrder
from mimir_train.reading.batch_layout import TensorRequest
from mimir_train.reading.batch_memory import BatchMemory
from mimir_train.reading.batch_reader import BatchReader, HostBatch
from mimir_train.reading.step_reader import ReadOptions, StepBatch, StepReader
from mimir_train.reading.threads import ReaderThreads
from tests.train.caches import IMAGE, T5_ROWS, VIDEO, build_cache, flipped_byte
from tests.train.naive_reader import bits, read_cache, stack

REQUESTS = [
    TensorRequest(feature="latents", name="vae_moments"),
    TensorRequest(feature="t5", name="t5_embeds", num_rows=T5_ROWS + 3),
    TensorRequest(feature="llm", name="query_hidden"),
    TensorRequest(feature="llm", name="answer_hidden_0"),
    TensorRequest(feature="llm", name="instruction_hidden_0"),
]
RAGGED = ("t5_embeds", "query_hidden", "answer_hidden_0")


@pytest.fixture(scope="module", params=["webdataset", "zarr"])
def any_root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in either format."""
    folder = tmp_path_factory.mktemp(request.param) / "cache"
    return build_cache(folder, {VIDEO: 21, IMAGE: 13}, shard_size=5, data_format=request.param)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("reader") / "cache", {VIDEO: 21, IMAGE: 13}, shard_size=5)


@pytest.fixture
def cache(root: Path) -> Cache:
    return open_cache(str(root))


@pytest.fixture
def order(cache: Cache) -> TrainingOrder:
    return TrainingOrder(cache.buckets(), seed=3, global_batch_size=4, shards_per_block=2)


def steps_of(cache: Cache, order: TrainingOrder, **options: object) -> StepReader:
    return StepReader(cache, order, REQUESTS, ReadOptions(**options))  # type: ignore[arg-type]


def clips_of(cache: Cache, batch: StepBatch) -> list[Clip]:
    return [cache.clip(number) for number in batch.numbers]


def read_all(reader: BatchReader, numbers: list[int]) -> HostBatch:
    pending = reader.start(numbers, verify=True)
    assert reader.wait(pending) == {}
    return pending.tensors()


# --- what is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("borrow", [False, True])
@pytest.mark.parametrize("verify", ["always", "never"])
def test_batches_equal_the_naive_readers_bit_for_bit(
    any_root: Path, order: TrainingOrder, threads: int, borrow: bool, verify: str
) -> None:
    naive = read_cache(any_root)
    cache = open_cache(str(any_root))
    with steps_of(cache, order, threads=threads, borrow=borrow, verify=verify) as reader:
        seen = set()
        for batch in reader.steps(0, 3 * order.steps_per_epoch):
            assert {clip.bucket for clip in clips_of(cache, batch)} == {batch.bucket}
            for request in REQUESTS:
                expected = stack([naive[clip.key][request.name] for clip in clips_of(cache, batch)], request.num_rows)
                found = batch.host.tensors[request.name]
                assert found.dtype == expected.dtype
                assert torch.equal(bits(found), bits(expected)), f"{request.name} of step {batch.step}"
            assert batch.host.lengths.keys() == set(RAGGED)
            for name in RAGGED:
                assert batch.host.lengths[name].tolist() == [
                    len(naive[clip.key][name]) for clip in clips_of(cache, batch)
                ]
                assert batch.host.mask(name).sum(dim=1).tolist() == batch.host.lengths[name].tolist()
            seen.update(clip.key for clip in clips_of(cache, batch))
    assert len(seen) > 30


def test_rows_of_an_earlier_batch_do_not_shine_through_the_padding(cache: Cache) -> None:
    lengths = cache.column("llm").tensors
    (query,) = (tensor for tensor in lengths if tensor.name == "query_hidden")
    video = cache.clips.numbers_of_bucket[VIDEO]
    longest = int(max(video, key=lambda number: query.shape[number, 0]))
    shortest = int(min(video, key=lambda number: query.shape[number, 0]))
    with BatchReader(cache, [TensorRequest(feature="llm", name="query_hidden", num_rows=6)], batch_size=1,
                     num_threads=1, borrow=True) as reader:  # fmt: skip
        pending = reader.start([longest], verify=True)
        reader.wait(pending)
        assert pending.tensors().tensors["query_hidden"].all()
        reader.release(pending)
        batch = read_all(reader, [shortest])
        assert reader.memory.num_slots == 1
        rows = int(batch.lengths["query_hidden"])
        assert rows < 6
        assert not batch.tensors["query_hidden"][0, rows:].any()


def test_tensors_begin_at_addresses_that_kernels_like(cache: Cache, order: TrainingOrder) -> None:
    with steps_of(cache, order) as reader:
        for batch in reader.steps(0, 4):
            assert all(tensor.data_ptr() % 64 == 0 for tensor in batch.host.tensors.values())


# --- memory -------------------------------------------------------------------------------------------------------


def test_a_batch_that_is_kept_is_never_written_over(root: Path, cache: Cache, order: TrainingOrder) -> None:
    naive = read_cache(root)
    with steps_of(cache, order, prefetch=1) as reader:
        # every other batch is let go of, so that memory is used again all the time; of one a slice alone is kept
        batches = reader.steps(0, 60)
        kept = [batch for batch in batches if batch.step % 2 == 0]
    slices = [(clips_of(cache, batch)[2].key, batch.host.tensors["vae_moments"][2, 1:3]) for batch in kept]
    expected = {key: naive[key]["vae_moments"][1:3] for key, _ in slices}
    del kept
    with steps_of(cache, order) as reader:
        for _ in reader.steps(0, 20):
            pass
    for key, part in slices:
        assert torch.equal(bits(part), bits(expected[key]))


def test_a_borrowed_batch_is_written_over_and_a_lent_one_is_not(cache: Cache, order: TrainingOrder) -> None:
    def first_after_many(borrow: bool) -> tuple[torch.Tensor, torch.Tensor]:
        with steps_of(cache, order, prefetch=1, borrow=borrow) as reader:
            batches = reader.steps(0, 12)
            first = next(batches).host.tensors["t5_embeds"]
            before = first.clone()
            for _ in batches:
                pass
            return first, before

    borrowed, before = first_after_many(borrow=True)
    assert not torch.equal(borrowed, before)
    lent, before = first_after_many(borrow=False)
    assert torch.equal(lent, before)


def test_a_borrowed_batch_holds_until_the_next_is_asked_for(root: Path, cache: Cache, order: TrainingOrder) -> None:
    naive = read_cache(root)
    with steps_of(cache, order, borrow=True, prefetch=3) as reader:
        for batch in reader.steps(0, 12):
            time.sleep(0.01)  # the threads read all that they may
            expected = stack([naive[clip.key]["vae_moments"] for clip in clips_of(cache, batch)])
            assert torch.equal(bits(batch.host.tensors["vae_moments"]), bits(expected))


@pytest.mark.parametrize("borrow", [False, True])
def test_memory_is_flat_over_ten_thousand_batches(root: Path, cache: Cache, borrow: bool) -> None:
    requests = [TensorRequest(feature="t5", name="t5_embeds"), TensorRequest(feature="llm", name="query_hidden")]
    order = TrainingOrder(cache.buckets(), seed=3, global_batch_size=2)
    options = ReadOptions(threads=2, prefetch=2, borrow=borrow)
    process = psutil.Process()
    gc.disable()  # nothing may depend on it
    try:
        with StepReader(cache, order, requests, options) as reader:
            resident = {}
            for batch in reader.steps(0, 10_000):
                if batch.step in (1_000, 9_999):
                    resident[batch.step] = process.memory_info().rss
                    slots = reader.reader.memory.num_slots
    finally:
        gc.enable()
    assert slots <= 5
    assert resident[9_999] - resident[1_000] < 2_000_000


def test_memory_comes_back_when_the_last_view_is_gone() -> None:
    memory = BatchMemory(4096)
    slot = memory.lend()
    assert slot.ctypes.data % 4096 == 0
    tensor = torch.from_numpy(slot[64:128])[3:5]
    del slot
    other = memory.lend()
    assert memory.num_slots == 2
    other[:] = 1
    assert not tensor.any()
    del tensor
    again = memory.lend()
    assert memory.num_slots == 2
    assert not again.any()


# --- what goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_ends_the_run_with_an_error(cache: Cache, order: TrainingOrder) -> None:
    with steps_of(cache, order, threads=2, prefetch=1) as reader:
        batches = reader.steps(0, 100_000)
        next(batches)
        for thread in threading.enumerate():
            if thread.name.startswith("reader-"):
                identity = ctypes.c_ulong(thread.ident or 0)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, ctypes.py_object(SystemExit))
        begun = time.monotonic()
        # while it reads, the fault is the batch's; between two works, nobody is left to tell
        with pytest.raises((MachineError, SystemExit)):
            deque(batches, maxlen=0)
    assert time.monotonic() - begun < 60


def test_work_left_by_a_dead_thread_is_not_waited_for() -> None:
    class Fatal:
        num_parts = 3

        def do(self, part: int) -> None:
            return

    threads = ReaderThreads(1)
    threads._queue.put(None)  # as a thread that ends between two works
    job = threads.start(Fatal())
    with pytest.raises(MachineError, match=r"reader-0: 1 of 1 threads that read the cache ended without a word") as e:
        threads.wait(job)
    assert e.value.exit_code == 5


@pytest.mark.parametrize("fault", [SystemExit(3), MemoryError("no more"), KeyboardInterrupt()])
def test_whatever_a_thread_raises_is_raised_at_its_batch(
    cache: Cache, order: TrainingOrder, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    real = cache.storage.read_into
    calls: Iterator[int] = iter(range(10_000))

    def sometimes(name: str, offset: int, buffers: list[memoryview], seen: Any = None) -> int:
        if next(calls) == 40:
            raise fault
        return real(name, offset, buffers, seen)

    monkeypatch.setattr(cache.storage, "read_into", sometimes)
    with steps_of(cache, order, threads=2) as reader, pytest.raises(type(fault)):
        for _ in reader.steps(0, 100):
            pass
    # and what is left of it reads on
    with steps_of(cache, order, threads=2) as reader:
        assert len(list(reader.steps(0, 3))) == 3


def test_an_unreadable_file_is_the_machines_fault(
    cache: Cache, order: TrainingOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str, offset: int, buffers: list[memoryview], seen: Any = None) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(cache.storage, "read_into", broken)
    with steps_of(cache, order, on_bad_sample="substitute") as reader:
        with pytest.raises(MachineError, match=r"shard \d, row \d, source .*Input/output error; run the same"):
            next(reader.steps(0, 1))


def test_the_error_of_a_bad_clip_names_it_and_no_other(root: Path, tmp_path: Path) -> None:
    cache = open_cache(str(shutil.copytree(root, tmp_path / "copy")))
    order = TrainingOrder(cache.buckets(), seed=3, global_batch_size=4)
    column = cache.column("llm")
    place = next(tensor for tensor in column.tensors if tensor.name == "instruction_hidden_0")
    number = 17
    path = cache.storage.root / cache.snapshot.features["llm"].files[place.file[number]]  # type: ignore[operator]
    clip = cache.clip(number)
    with flipped_byte(path, int(place.offset[number]) + 5), steps_of(cache, order, threads=3) as reader:
        with pytest.raises(CacheError, match=rf"{path}: `llm` of clip '{clip.key}' \(shard {clip.shard}, row"):
            for _ in reader.steps(0, order.steps_per_epoch * 3):
                pass
