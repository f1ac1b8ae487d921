"""The sandbox: the same pixels, one clip lost to whatever goes wrong, and nobody blamed wrongly."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mimir_precompute.clips.rejection import ClipRejected
from mimir_precompute.clips.source import hash_source
from mimir_precompute.config import DecodeLimits
from mimir_precompute.decoding import sandbox as decode_sandbox
from mimir_precompute.decoding.clip_pixels import ClipPixels, probe_clip, read_clip, read_first_frame
from mimir_precompute.decoding.process import CHILD_PROGRAM, DecodeChild
from mimir_precompute.decoding.sandbox import DecodeSandbox
from mimir_shared.errors import MachineError
from tests.precompute import media
from tests.precompute.decoding.hostile_child import MARK
from tests.precompute.media import TINY, VideoStyle, grey_frames, numbers, video_bytes

HOSTILE = (str(Path(__file__).with_name("hostile_child.py")),)
QUICK = DecodeLimits(timeout_s=1, memory_gb=1)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[DecodeSandbox]:
    with DecodeSandbox() as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def hostile() -> Iterator[DecodeSandbox]:
    with DecodeSandbox(QUICK, program=HOSTILE) as sandbox:
        yield sandbox


def clip(how: str = "") -> bytes:
    """A good clip of nine grey frames, which tells a hostile child what to do."""
    return GOOD + (MARK + how.encode() if how else b"")


GOOD = video_bytes(grey_frames(9))


def decode(sandbox: DecodeSandbox, how: str = "") -> ClipPixels:
    return sandbox.decode(clip(how), geometry=TINY)


def blamed(sandbox: DecodeSandbox, how: str) -> ClipRejected:
    with pytest.raises(ClipRejected) as caught:
        decode(sandbox, how)
    return caught.value


def children(sandbox: DecodeSandbox) -> list[int]:
    return [child._process.pid for child in sandbox._children]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def peak_bytes(pid: int) -> int:
    """The most memory that a process has had; 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    _, found, rest = status.partition("VmHWM:")
    return int(rest.split()[0]) * 1024 if found else 0


def wait_for_end(pid: int, within_s: float = 5) -> None:
    until = time.monotonic() + within_s
    while is_alive(pid):
        assert time.monotonic() < until, f"process {pid} still lives"
        time.sleep(0.05)


class TestSameAsInTheProcess:
    @pytest.mark.parametrize(
        "source",
        [
            GOOD,
            video_bytes(grey_frames(30), VideoStyle(container="matroska", codec="ffv1", options=())),
            media.image_bytes(media.quadrants(), "PNG"),
            media.image_bytes(media.quadrants(), "JPEG", exif_orientation=6),
            media.image_bytes(media.quadrants(), "WEBP"),
        ],
        ids=["mp4", "matroska", "png", "jpeg", "webp"],
    )
    def test_pixels_bucket_hash_and_headers_are_the_same(
        self, sandbox: DecodeSandbox, source: bytes, tmp_path: Path
    ) -> None:
        path = tmp_path / "clip"
        path.write_bytes(source)
        ours = read_clip(source, geometry=TINY)
        for given in (source, path):
            theirs = sandbox.decode(given, geometry=TINY)
            assert (theirs.bucket, theirs.source_xxh3) == (ours.bucket, ours.source_xxh3)
            assert np.array_equal(theirs.pixels, ours.pixels)
            assert theirs.pixels.flags.writeable
            assert sandbox.probe(given) == probe_clip(source)
            still = sandbox.read_first_frame(given, longest_side=50)
            assert np.array_equal(still, read_first_frame(source, longest_side=50))

    def test_a_part_of_a_clip_is_the_same(self, sandbox: DecodeSandbox) -> None:
        source = video_bytes(grey_frames(30))
        assert numbers(sandbox.decode(source, geometry=TINY, start_s=0.3, end_s=2.0).pixels) == list(range(2, 11))

    @pytest.mark.parametrize(
        "source",
        [
            b"",
            b"<html>",
            GOOD[:-1],
            GOOD.replace(b"moov", b"moof"),
            b"\x1a\x45\xdf\xa3" + bytes(4000),
            media.image_bytes(media.quadrants(), "PNG")[:-40],
            media.huge_png_bytes(),
            media.audio_only_bytes(),
            b"\x89PNG\r\n\x1a\n" + b"\xff" * 100,
        ],
        ids=["empty", "html", "cut", "no index", "zeros", "cut image", "huge image", "audio", "garbage"],
    )
    def test_a_bad_clip_is_rejected_in_the_same_words(self, sandbox: DecodeSandbox, source: bytes) -> None:
        ours = media.rejection(source)
        with pytest.raises(ClipRejected) as caught:
            sandbox.decode(source, geometry=TINY)
        assert caught.value.args == ours.args
        assert (ours.source_xxh3 is None) == (ours.stage == "fetch")

    def test_the_pixels_outlive_the_sandbox(self) -> None:
        with DecodeSandbox() as sandbox:
            first, second = decode(sandbox), sandbox.decode(video_bytes(grey_frames(20)[10:]), geometry=TINY)
        assert numbers(first.pixels) == list(range(9))
        assert numbers(second.pixels) == list(range(10, 19))

    def test_many_threads_share_it(self, sandbox: DecodeSandbox) -> None:
        sources = [video_bytes(grey_frames(35)[first : first + 9]) for first in range(20)]
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda source: sandbox.decode(source, geometry=TINY), sources))
        assert [numbers(one.pixels)[0] for one in found] == list(range(20))
        assert 1 <= len(children(sandbox)) <= 6


class TestOneClipIsLost:
    @pytest.mark.parametrize(
        ("how", "reason"),
        [
            ("abort", "crashed_decoder"),
            ("segfault", "crashed_decoder"),
            ("overflow", "crashed_decoder"),
            ("leave", "crashed_decoder"),
            ("leave with an error", "crashed_decoder"),
            ("raise", "crashed_decoder"),
            ("allocate in c", "crashed_decoder"),
            ("say nothing sensible", "crashed_decoder"),
            ("say nothing", "crashed_decoder"),
            ("claim another bucket", "crashed_decoder"),
            ("claim a bucket and more", "crashed_decoder"),
            ("claim a picture", "crashed_decoder"),
            ("claim a length", "crashed_decoder"),
            ("claim a reason", "crashed_decoder"),
            ("send control characters", "crashed_decoder"),
            ("claim a fault", "crashed_decoder"),
            ("nest", "crashed_decoder"),
        ],
    )
    def test_the_clip_is_rejected_for_what_it_did_and_the_next_one_decoded(
        self, hostile: DecodeSandbox, how: str, reason: str
    ) -> None:
        decode(hostile)
        rejected = blamed(hostile, how)
        assert (rejected.stage, rejected.reason) == ("decode", reason)
        assert rejected.source_xxh3 == hash_source(clip(how))
        assert "secret" not in rejected.detail
        assert numbers(decode(hostile).pixels) == list(range(9))

    def test_a_child_cannot_open_send_or_write_anything(self, hostile: DecodeSandbox) -> None:
        assert numbers(decode(hostile, "find a way out").pixels) == list(range(9))

    def test_decoders_that_hang_or_spin_are_ended_whether_or_not_they_let_go_of_the_interpreter(
        self, hostile: DecodeSandbox
    ) -> None:
        ways = ("hang", "hang with the lock", "spin")
        with ThreadPoolExecutor(3) as pool:
            assert [found.reason for found in pool.map(lambda how: blamed(hostile, how), ways)] == ["timeout"] * 3
        assert numbers(decode(hostile).pixels) == list(range(9))

    def test_a_bomb_fills_neither_the_child_nor_us(self) -> None:
        before = peak_bytes(os.getpid())
        largest = 0
        with DecodeSandbox(DecodeLimits(memory_gb=0.3), program=HOSTILE) as sandbox:
            with ThreadPoolExecutor(1) as pool:
                found = pool.submit(blamed, sandbox, "allocate in python")
                while not found.done():
                    largest = max([largest, *map(peak_bytes, children(sandbox))])
                    time.sleep(0.005)
            assert found.result().reason == "out_of_memory"
        assert 250e6 < largest < 300e6 + 120e6, "its limit and what it had before"
        assert peak_bytes(os.getpid()) - before < 50e6

    def test_a_picture_within_the_header_limits_may_still_take_too_much(self) -> None:
        source = media.image_bytes(np.zeros((8000, 8000, 4), np.uint8), "PNG")
        with DecodeSandbox(DecodeLimits(memory_gb=0.3)) as sandbox:
            with pytest.raises(ClipRejected) as caught:
                sandbox.decode(source, geometry=TINY)
            assert caught.value.reason == "out_of_memory"
            assert numbers(decode(sandbox).pixels) == list(range(9))


class TestBlame:
    def test_three_children_must_fail_that_had_no_other_clip(
        self, hostile: DecodeSandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decode(hostile)
        started = watch_starts(monkeypatch, lambda _: HOSTILE)
        assert blamed(hostile, "abort").detail == "the decoder died of SIGABRT"
        assert len(started) == 3, "the first, used child counts for nothing"

    def test_a_clip_that_succeeds_at_the_third_attempt_is_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        started = watch_starts(monkeypatch, lambda number: HOSTILE if number < 2 else CHILD_PROGRAM)
        with DecodeSandbox(QUICK, program=HOSTILE) as sandbox:
            assert numbers(decode(sandbox, "abort").pixels) == list(range(9))
        assert len(started) == 3

    def test_what_an_earlier_clip_left_behind_is_not_blamed_on_the_next(self, hostile: DecodeSandbox) -> None:
        decode(hostile, "poison")
        assert numbers(decode(hostile).pixels) == list(range(9))

    def test_a_child_that_is_killed_from_outside_blames_no_clip(self, hostile: DecodeSandbox) -> None:
        with pytest.raises(MachineError, match="killed 3 times from outside"):
            decode(hostile, "be killed")

    def test_one_kill_from_outside_changes_nothing(self) -> None:
        with DecodeSandbox(program=HOSTILE) as sandbox:
            decode(sandbox)
            (pid,) = children(sandbox)
            killer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
            killer.start()
            assert numbers(decode(sandbox, "take a second").pixels) == list(range(9))
            assert pid not in children(sandbox)

    def test_a_child_that_somebody_stops_blames_no_clip(self, hostile: DecodeSandbox) -> None:
        with pytest.raises(MachineError, match="from outside"):
            decode(hostile, "stop")

    def test_a_decoder_that_computes_slowly_for_want_of_a_core_is_not_late(self, hostile: DecodeSandbox) -> None:
        started = time.monotonic()
        assert numbers(decode(hostile, "work slowly").pixels) == list(range(9))
        assert time.monotonic() - started > 2 * QUICK.timeout_s

    def test_a_disk_that_fails_in_the_child_blames_no_clip(self, hostile: DecodeSandbox) -> None:
        with pytest.raises(MachineError, match="Input/output error; the clip is not to blame"):
            decode(hostile, "fail to read")

    def test_a_host_that_cannot_give_the_memory_blames_no_clip(self) -> None:
        with DecodeSandbox(DecodeLimits(memory_gb=10**6), program=HOSTILE) as sandbox:
            decode(sandbox)
            with pytest.raises(MachineError, match="--decode-memory-gb"):
                sandbox._refuse_poor_host()

    def test_a_child_that_cannot_start_blames_no_clip(self) -> None:
        with DecodeSandbox(program=("-c", "raise SystemExit('no module av')")) as sandbox:
            with pytest.raises(MachineError, match=r"could not be started \(no module av\)"):
                decode(sandbox)

    def test_a_worker_without_descriptors_blames_no_clip(
        self, sandbox: DecodeSandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> int:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(os, "memfd_create", fail)
        with pytest.raises(MachineError, match="Too many open files"):
            decode(sandbox)


def watch_starts(monkeypatch: pytest.MonkeyPatch, program: object) -> list[int]:
    """Choose the program of the n-th child that is started from now on; the list grows with each."""
    started: list[int] = []

    def start(_: object, limits: DecodeLimits) -> DecodeChild:
        started.append(len(started))
        return DecodeChild(program(len(started) - 1), limits)  # type: ignore[operator]

    monkeypatch.setattr(decode_sandbox, "DecodeChild", start)
    return started


class TestLife:
    def test_a_child_has_no_descriptor_and_no_secret_of_ours(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_canary")
        with open(tmp_path / "secret", "w") as secret, DecodeSandbox() as sandbox:
            os.set_inheritable(secret.fileno(), True)
            decode(sandbox)
            (pid,) = children(sandbox)
            assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2"]
            assert b"canary" not in Path(f"/proc/{pid}/environ").read_bytes()
            assert "torch" not in Path(f"/proc/{pid}/maps").read_text()

    def test_closing_ends_the_children_and_a_decode_under_way(self) -> None:
        sandbox = DecodeSandbox(program=HOSTILE)
        decode(sandbox)
        (pid,) = children(sandbox)
        closer = threading.Timer(0.3, sandbox.close)
        closer.start()
        with pytest.raises(MachineError, match="stopped"):
            decode(sandbox, "hang")
        assert not is_alive(pid)
        closer.join()

    def test_a_child_outlives_the_thread_that_asked_first(self) -> None:
        with DecodeSandbox() as sandbox:
            thread = threading.Thread(target=decode, args=(sandbox,))
            thread.start()
            thread.join()
            before = children(sandbox)
            decode(sandbox)
            assert children(sandbox) == before

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_no_child_outlives_a_worker_that_is_killed(self, number: signal.Signals, tmp_path: Path) -> None:
        (tmp_path / "clip").write_bytes(clip("hang with the lock"))
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), *HOSTILE], stdout=subprocess.PIPE, text=True
        )
        assert worker.stdout is not None
        child = int(worker.stdout.readline())
        time.sleep(0.5)  # it has been asked, and hangs
        assert is_alive(child)
        worker.send_signal(number)
        assert worker.wait(5) == (-number if number == signal.SIGKILL else 143)
        wait_for_end(child)


WORKER = """
import sys, threading, time
from pathlib import Path
from mimir_precompute.config import Bucket, Geometry
from mimir_precompute.decoding.sandbox import DecodeSandbox
from mimir_precompute.termination import working_on
from mimir_shared.storage.folder import LocalStorage

folder, program = Path(sys.argv[1]), sys.argv[2]
sandbox = DecodeSandbox(program=(program,))
geometry = Geometry(buckets=(Bucket(frames=9, height=64, width=96),), fps=8)
with working_on(LocalStorage(folder)):
    threading.Thread(target=sandbox.decode, args=(folder / "clip",), kwargs={"geometry": geometry}).start()
    while not any(child.num_asked for child in sandbox._children):
        time.sleep(0.01)
    print(next(iter(sandbox._children))._process.pid, flush=True)
    time.sleep(600)
"""
