"""Reading byte ranges: into the buffers that are given, by many threads, with few files open."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from mimir_shared.storage.folder import LocalStorage
from mimir_shared.storage.open_files import OpenFiles


def file_of(folder: Path, name: str, nbytes: int, seed: int = 0) -> bytes:
    data = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8).tobytes()
    (folder / name).write_bytes(data)
    return data


def test_buffers_are_filled_one_after_the_other(tmp_path: Path) -> None:
    data = file_of(tmp_path, "a", 10_000)
    buffers = [bytearray(7), bytearray(0), bytearray(5000), bytearray(100)]
    count = LocalStorage(tmp_path).read_into("a", 33, [memoryview(buffer) for buffer in buffers])
    assert count == 5107
    assert b"".join(buffers) == data[33 : 33 + 5107]


def test_short_reads_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_of(tmp_path, "a", 5000)
    real = os.preadv
    calls = []

    def some(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        return real(descriptor, [buffers[0][:300]], offset)  # as a network file system may

    monkeypatch.setattr(os, "preadv", some)
    buffers = [bytearray(1000), bytearray(1500)]
    assert LocalStorage(tmp_path).read_into("a", 100, [memoryview(buffer) for buffer in buffers]) == 2500
    assert b"".join(buffers) == data[100:2600]
    assert len(calls) == 9


def test_the_end_of_a_file_is_told(tmp_path: Path) -> None:
    data = file_of(tmp_path, "a", 100)
    buffer = bytearray(80)
    assert LocalStorage(tmp_path).read_into("a", 60, [memoryview(buffer)]) == 40
    assert buffer == data[60:] + bytes(40)


def test_more_buffers_than_one_call_takes(tmp_path: Path) -> None:
    data = file_of(tmp_path, "a", 4000)
    buffers = [bytearray(2) for _ in range(2000)]
    assert LocalStorage(tmp_path).read_into("a", 0, [memoryview(buffer) for buffer in buffers]) == 4000
    assert b"".join(buffers) == data


@pytest.mark.parametrize("sizes", [[10], [1_200_000, 5, 0, 2_800_000], [1 << 20, 1 << 20], [1] * 700, [0, 0]])
def test_who_watches_sees_every_byte_once_and_in_order(tmp_path: Path, sizes: list[int]) -> None:
    data = file_of(tmp_path, "a", 4_100_000)
    watched = bytearray()
    buffers = [memoryview(bytearray(size)) for size in sizes]
    count = LocalStorage(tmp_path).read_into("a", 17, buffers, watched.extend)
    assert count == sum(sizes)
    assert watched == b"".join(buffers) == data[17 : 17 + count]


def test_who_watches_is_not_shown_what_a_short_file_does_not_have(tmp_path: Path) -> None:
    data = file_of(tmp_path, "a", 2_400_000)
    watched = bytearray()
    buffer = memoryview(bytearray(3_600_000))
    assert LocalStorage(tmp_path).read_into("a", 0, [buffer], watched.extend) == 2_400_000
    assert watched == data[: 2 << 20]
    assert bytes(buffer[:2_400_000]) == data


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LocalStorage(tmp_path).read_into("a", 0, [memoryview(bytearray(1))])


def test_threads_share_few_descriptors_and_read_right(tmp_path: Path) -> None:
    contents = [file_of(tmp_path, str(i), 20_000, seed=i) for i in range(12)]
    files = OpenFiles(limit=3)
    before = len(os.listdir("/proc/self/fd"))
    wrong: list[tuple[int, int]] = []

    def read_many(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(150):
            number, offset = int(rng.integers(12)), int(rng.integers(10_000))
            buffer = bytearray(9000)
            count = files.read_into(f"{tmp_path}/{number}", offset, [memoryview(buffer)])
            if count != 9000 or buffer != contents[number][offset : offset + 9000]:
                wrong.append((number, offset))

    threads = [threading.Thread(target=read_many, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(files) <= 3
    assert len(os.listdir("/proc/self/fd")) - before <= 3
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_was_replaced_is_read_anew_once_it_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_bytes(b"old")
    files = OpenFiles()
    data = bytearray(3)
    files.read_into(str(path), 0, [memoryview(data)])
    other = tmp_path / "other"
    other.write_bytes(b"new")
    other.rename(path)
    for forgotten, expected in ((tmp_path / "folde", b"old"), (path.parent, b"new")):
        files.forget(str(forgotten))
        files.read_into(str(path), 0, [memoryview(data)])
        assert bytes(data) == expected
    assert len(files) == 1


def test_a_file_that_is_forgotten_while_it_is_read_is_closed_when_that_is_done(tmp_path: Path) -> None:
    data = file_of(tmp_path, "file", 3 << 20)
    files, path = OpenFiles(), str(tmp_path / "file")
    before = len(os.listdir("/proc/self/fd"))
    seen: list[bytes] = []

    def replace_meanwhile(piece: memoryview) -> None:
        files.forget(path)
        seen.append(bytes(piece))

    assert files.read_into(path, 0, [memoryview(bytearray(3 << 20))], replace_meanwhile) == 3 << 20
    assert b"".join(seen) == data
    assert len(os.listdir("/proc/self/fd")) == before
