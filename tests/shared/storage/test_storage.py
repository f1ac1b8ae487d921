"""Publishing: a file appears whole under its name, once."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mimir_shared.errors import InputError, MachineError
from mimir_shared.storage.folder import LocalStorage, machine_faults
from mimir_shared.storage.open import open_storage


def test_create_publishes_the_bytes_and_leaves_no_temporary(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    assert storage.create("a/b/c.bin", b"first")
    assert storage.read("a/b/c.bin") == b"first"
    assert list((tmp_path / "tmp").iterdir()) == []
    storage.tidy()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_the_second_create_of_a_name_loses_and_changes_nothing(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    assert storage.create("x", b"first")
    assert not storage.create("x", b"second")
    assert storage.read("x") == b"first"


def _race(root: str, number: int, barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    if LocalStorage(Path(root)).create("shard", f"worker {number}".encode()):
        results.put(number)  # type: ignore[attr-defined]


def test_of_16_processes_that_create_one_name_exactly_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        root = tmp_path / str(attempt)
        root.mkdir()
        barrier, results = context.Barrier(16), context.Queue()
        workers = [context.Process(target=_race, args=(str(root), n, barrier, results)) for n in range(16)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        winners = [results.get(timeout=5)]
        assert results.empty()
        assert LocalStorage(root).read("shard") == f"worker {winners[0]}".encode()


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)

    def write_half() -> None:
        with storage.temporary() as temporary:
            temporary.file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_publishing_without_hard_links_still_has_one_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    storage = LocalStorage(tmp_path)
    assert storage.create("x", b"first")
    assert not storage.create("x", b"second")
    assert storage.read("x") == b"first"


def test_temporaries_of_dead_processes_are_removed_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    code = (
        "import os,sys; from pathlib import Path; from mimir_shared.storage.folder import LocalStorage;"
        "s=LocalStorage(Path(sys.argv[1])); t=s.temporary(); t.__enter__(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    with storage.temporary() as mine:
        assert len(list((tmp_path / "tmp").iterdir())) == 2
        assert storage.remove_abandoned() == 1
        assert mine.path.exists()
    storage.tidy()
    assert not (tmp_path / "tmp").exists()


def test_a_cache_that_cannot_be_written_is_told_early(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        LocalStorage(blocked / "cache").check_writable()


def test_a_full_disk_is_a_fault_of_the_machine_with_exit_code_5() -> None:
    with pytest.raises(MachineError, match="ENOSPC") as caught, machine_faults("writing shard 3"):
        raise OSError(28, "No space left on device")
    assert caught.value.exit_code == 5
    assert "writing shard 3" in str(caught.value)


def test_a_scheme_that_is_not_supported_is_refused() -> None:
    with pytest.raises(InputError, match="ftp"):
        open_storage("ftp://host/cache")


def test_what_is_to_be_removed_goes_though_another_process_has_removed_the_folder_of_temporaries(
    tmp_path: Path,
) -> None:
    storage = LocalStorage(tmp_path)
    storage.create("t5/spec.json", b"damaged")
    LocalStorage(tmp_path).tidy()
    assert not (tmp_path / "tmp").exists()
    storage.remove_tree("t5/spec.json")
    assert not storage.exists("t5/spec.json")
    with pytest.raises(FileNotFoundError):
        storage.set_aside("t5/spec.json")


def test_a_file_is_published_again_though_gc_has_removed_the_folders_that_it_lay_in(tmp_path: Path) -> None:
    storage, name = LocalStorage(tmp_path), "latents/0123456789ab/data/000001-aaaaaaaa.zarr/vae_mean/c"
    assert storage.create(name, b"chunk")
    collector = LocalStorage(tmp_path)
    collector.remove(name)
    for folder in (Path(name).parent, Path(name).parent.parent):
        collector.remove_empty_folder(str(folder))
    assert storage.create(name, b"chunk")
    assert storage.read(name) == b"chunk"
