"""How fast batches come out of a cache, against plain webdataset, raw preadv and memcpy, all in turns.

python benchmarks/read_cache.py [--clips 256] [--repetitions 5] [--quick]

Clips have the sizes of real ones, about 3.5 MB each (means of 49x480x720 latents, ragged T5 and LLM rows, bfloat16);
batches of 4, ragged tensors padded. Everything is in the page cache, as reading left it, and nobody computes on the
batches. One repetition takes every reader once, so that what else the machine does meets them all; ratios are taken
within a repetition.
"""

import argparse
import gc
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import torch
import webdataset
from safetensors.torch import load
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.synthetic_cache import build_cache, write_merged_tars

from mimir_shared.feature_column import FeatureColumn
from mimir_shared.manifest import CacheFormat
from mimir_train.cache_reader import Cache, open_cache
from mimir_train.config import VerifyReads
from mimir_train.order.clip_order import TrainingOrder
from mimir_train.reading.batch_layout import TensorRequest
from mimir_train.reading.batch_memory import BatchMemory
from mimir_train.reading.step_reader import ReadOptions, StepReader

BATCH_SIZE: Final = 4
WORKERS: Final = 2
REQUESTS: Final = (
    TensorRequest(feature="latents", name="vae_mean"),
    TensorRequest(feature="t5", name="t5_embeds"),
    TensorRequest(feature="llm", name="query_hidden"),
    TensorRequest(feature="llm", name="answer_hidden_0"),
    TensorRequest(feature="llm", name="instruction_hidden_0"),
)
VERIFY: Final[tuple[VerifyReads, ...]] = ("never", "always")
FORMATS: Final[tuple[CacheFormat, ...]] = ("webdataset", "zarr")
RAGGED: Final = ("t5_embeds", "query_hidden", "answer_hidden_0")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One pass of one reader."""

    nbytes: int
    """Of tensors as stored, padding not counted."""
    wall_s: float
    cpu_s: float
    """Of this process and of its workers."""

    @property
    def megabytes_per_s(self) -> float:
        return self.nbytes / self.wall_s / 1e6

    @property
    def cpu_s_per_gb(self) -> float:
        return self.cpu_s / (self.nbytes / 1e9)


def cpu_seconds() -> float:
    """Used so far by this process and those that it started."""
    process = psutil.Process()
    family = [process, *process.children(recursive=True)]
    return sum(sum(one.cpu_times()[:2]) for one in family)


def measure(read: Callable[[], int]) -> Measured:
    gc.collect()
    cpu, started = cpu_seconds(), time.perf_counter()
    nbytes = read()
    return Measured(nbytes=nbytes, wall_s=time.perf_counter() - started, cpu_s=cpu_seconds() - cpu)


# --- the readers --------------------------------------------------------------------------------------------------


def pad_and_stack(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a webdataset user writes as collate function."""
    batch = {}
    for name in (name for name in samples[0] if not name.startswith("__")):  # webdataset's own: strings
        tensors = [sample[name] for sample in samples]
        batch[name] = torch.nn.utils.rnn.pad_sequence(tensors, True) if name in RAGGED else torch.stack(tensors)
    return batch


def decode(sample: dict[str, Any]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load(sample["safetensors"])
    return tensors


class PlainWebdataset:
    """The usual pipeline in DataLoader workers, which live on from pass to pass."""

    def __init__(self, tars: list[str], nbytes: int) -> None:
        dataset = webdataset.WebDataset(tars, shardshuffle=False).map(decode).batched(BATCH_SIZE, pad_and_stack)
        self._loader: DataLoader[Any] = DataLoader(
            dataset, batch_size=None, num_workers=WORKERS, persistent_workers=True
        )
        self._nbytes = nbytes

    def read(self) -> int:
        clips = sum(len(batch["vae_mean"]) for batch in self._loader)
        assert clips, "no clip came out of the tars"
        return self._nbytes


class OurReader:
    """As the training loop reads: in order, shuffled, several epochs in a pass for it would be over too soon."""

    def __init__(self, cache: Cache, options: ReadOptions, epochs: int) -> None:
        self._order = TrainingOrder(cache.buckets(), seed=0, global_batch_size=BATCH_SIZE)
        self._reader = StepReader(cache, self._order, REQUESTS, options)
        tensors = [tensor for feature in ("latents", "t5", "llm") for tensor in cache.column(feature).tensors]
        self._nbytes: list[int] = np.sum([tensor.nbytes for tensor in tensors], axis=0).tolist()
        self._epochs = epochs

    def read(self) -> int:
        nbytes = 0
        for batch in self._reader.steps(0, self._epochs * self._order.steps_per_epoch):
            nbytes += sum(self._nbytes[number] for number in batch.numbers)
        return nbytes

    def close(self) -> None:
        self._reader.close()


class RawPreadv:
    """One thread, one call a clip and feature at the same offsets, into four batches of memory in turns."""

    def __init__(self, cache: Cache, epochs: int) -> None:
        self._cache = cache
        self._columns = [cache.column(feature) for feature in ("latents", "t5", "llm")]
        self._files = {column.feature: cache.snapshot.features[column.feature].files for column in self._columns}
        self._ranges = [self._range(column, number) for number in range(len(cache)) for column in self._columns]
        most = max(nbytes for _, _, nbytes in self._ranges) * len(self._columns) * BATCH_SIZE
        memory = BatchMemory(most)
        self._slots = [memory.borrow() for _ in range(4)]
        self._epochs = epochs

    def _range(self, column: FeatureColumn, number: int) -> tuple[str, int, int]:
        first = column.tensors[0]
        nbytes = sum(int(tensor.nbytes[number]) for tensor in column.tensors)
        return self._files[column.feature][int(first.file[number])], int(first.offset[number]), nbytes

    def read(self) -> int:
        done, place, turn = 0, 0, 0
        for _ in range(self._epochs):
            for index, (name, offset, nbytes) in enumerate(self._ranges):
                if index % (BATCH_SIZE * len(self._columns)) == 0:
                    place, turn = 0, (turn + 1) % len(self._slots)
                buffer = self._slots[turn].data[place : place + nbytes]
                done += self._cache.storage.read_into(name, offset, [buffer])
                place += nbytes
        return done


class Memcpy:
    """One thread that copies as many bytes from memory to memory, the source as large as four batches."""

    def __init__(self, nbytes: int) -> None:
        self._batch = 14_000_000
        memory = BatchMemory(4 * self._batch)
        self._source, self._target = memory.borrow(), memory.borrow()
        self._source[:] = 1
        self._times = max(nbytes // (4 * self._batch), 1)

    def read(self) -> int:
        for _ in range(self._times):
            np.copyto(self._target, self._source)
        return self._times * 4 * self._batch


# --- the comparison -----------------------------------------------------------------------------------------------


def fill_page_cache_by_reading(folder: Path) -> None:
    """Leave files in the page cache as an earlier epoch would: pages that were written lie there in smaller pieces."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        while os.read(descriptor, 1 << 20):
            pass
        os.close(descriptor)


def readers_of(folder: Path, num_clips: int, epochs: int) -> Iterator[tuple[str, Callable[[], int]]]:
    """(name, one pass) of everything that is compared."""
    caches = {}
    for data_format in FORMATS:
        root = build_cache(folder / data_format, num_clips, shard_size=num_clips // 8, data_format=data_format)
        caches[data_format] = open_cache(str(root))
    cache = caches["webdataset"]
    nbytes = sum(int(t.nbytes.sum()) for feature in cache.features for t in cache.column(feature).tensors)
    sys.stderr.write(f"{num_clips} clips, {nbytes / num_clips / 1e6:.2f} MB each\n")
    merged = write_merged_tars(cache, folder / "merged")
    fill_page_cache_by_reading(folder)
    yield "webdataset, 2 workers", PlainWebdataset(merged, nbytes).read
    yield "memcpy, 1 thread", Memcpy(nbytes * epochs).read
    yield "preadv, 1 thread", RawPreadv(cache, epochs).read
    for threads in (1, 2):
        for verify in VERIFY:
            name = f"ours, {threads} thread{'s' if threads > 1 else ''}, {'' if verify == 'always' else 'no '}checksums"
            options = ReadOptions(verify=verify, threads=threads, borrow=True)
            yield name, OurReader(cache, options, epochs).read
    options = ReadOptions(verify="always", threads=2)
    yield "ours, 2 threads, checksums, batches that may be kept", OurReader(cache, options, epochs).read
    for verify in VERIFY:
        options = ReadOptions(verify=verify, threads=2, borrow=True)
        name = f"ours, zarr, 2 threads, {'' if verify == 'always' else 'no '}checksums"
        yield name, OurReader(caches["zarr"], options, epochs).read


def table(passes: dict[str, list[Measured]]) -> str:
    """Medians; the range of MB/s; ratios to webdataset and to one thread's preadv, each within its repetition."""

    def ratio(name: str, other: str) -> float:
        pairs = zip(passes[name], passes[other], strict=True)
        return statistics.median(one.megabytes_per_s / two.megabytes_per_s for one, two in pairs)

    lines = ["| reader | MB/s (range) | x webdataset | x preadv, 1 thread | CPU s/GB |", "|---|---|---|---|---|"]
    for name, found in passes.items():
        speeds = [one.megabytes_per_s for one in found]
        cpu = statistics.median(one.cpu_s_per_gb for one in found)
        lines.append(
            f"| {name} | {statistics.median(speeds):.0f} ({min(speeds):.0f}–{max(speeds):.0f}) | "
            f"{ratio(name, 'webdataset, 2 workers'):.1f} | {ratio(name, 'preadv, 1 thread'):.2f} | {cpu:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=240, help="three copies of 3.5 MB each are kept meanwhile")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=3, help="of a pass of our reader, of preadv and of memcpy")
    parser.add_argument("--quick", action="store_true", help="48 clips, 3 repetitions: does it run, and how roughly")
    parser.add_argument("--folder", type=Path, default=None, help="where the data is kept meanwhile")
    options = parser.parse_args()
    if options.quick:
        options.clips, options.repetitions = 48, 3
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="mimir-read-", dir=options.folder))
    try:
        readers = list(readers_of(folder, options.clips, options.epochs))
        passes: dict[str, list[Measured]] = {name: [] for name, _ in readers}
        for repetition in range(-1, options.repetitions):  # the first fills caches, and is not counted
            for name, read in readers:
                found = measure(read)
                if repetition >= 0:
                    passes[name].append(found)
        sys.stdout.write(table(passes) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
