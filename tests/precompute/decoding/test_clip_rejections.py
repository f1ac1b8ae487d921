"""Every way in which a clip can be unusable, told apart from the faults of the machine."""

import errno
import os
import pickle
from pathlib import Path

import av
import numpy as np
import pytest
import xxhash

from mimir_precompute.clips import source as clip_source
from mimir_precompute.clips.source import hash_source
from mimir_precompute.decoding import image_file, video_file
from mimir_precompute.decoding.clip_pixels import read_clip
from mimir_shared.errors import MachineError
from tests.precompute import media
from tests.precompute.media import (
    FFV1,
    MPEG4,
    NINE,
    TINY,
    VideoStyle,
    grey_frames,
    numbers,
    rejection,
    video_bytes,
)


class TestRejections:
    def test_faults_of_one_file_are_told_apart(self, tmp_path: Path) -> None:
        (tmp_path / "link.mp4").symlink_to("gone.mp4")
        (tmp_path / "loop.mp4").symlink_to("loop.mp4")
        (tmp_path / "folder.mp4").mkdir()
        (tmp_path / "empty.mp4").touch()
        os.mkfifo(tmp_path / "pipe.mp4")
        expected = {
            "none.mp4": "missing",
            "link.mp4": "missing",
            "empty.mp4/clip.mp4": "missing",
            "loop.mp4": "unreadable",
            "folder.mp4": "unreadable",
            "pipe.mp4": "unreadable",
            "a" * 300: "unreadable",
            "empty.mp4": "empty_file",
        }
        for name, reason in expected.items():
            rejected = rejection(tmp_path / name)
            assert (rejected.stage, rejected.reason) == ("fetch", reason), name

    def test_a_file_that_may_not_be_read_is_unreadable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def deny(*_: object) -> int:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(os, "open", deny)
        assert rejection(tmp_path / "clip.mp4").reason == "unreadable"

    @pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EMFILE, errno.ENOSPC])
    def test_a_fault_of_the_machine_blames_no_clip(
        self, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "open", fail)
        with pytest.raises(MachineError, match=os.strerror(code)):
            read_clip(tmp_path / "clip.mp4", geometry=TINY)

    def test_a_disk_that_fails_while_decoding_blames_no_clip(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (9, 64, 96, 3), np.uint8)
        path = tmp_path / "clip.mkv"
        path.write_bytes(video_bytes(list(noise), FFV1))
        true_read = clip_source.SourceFile.read
        reads = failures = 0
        for failing in range(12):

            def read(self: clip_source.SourceFile, size: int = -1, failing: int = failing) -> bytes:
                nonlocal reads
                reads += 1
                if reads > failing:
                    monkeypatch.setattr(self, "_file", Broken())
                return true_read(self, size)

            reads = 0
            monkeypatch.setattr(clip_source.SourceFile, "read", read)
            try:
                read_clip(path, geometry=TINY)
                assert reads <= failing, "it went on with a part of the file"
            except MachineError:
                failures += 1
        assert failures == 12, "the clip was read by fewer than twelve calls"

    @pytest.mark.parametrize(
        "source",
        [
            b"<html><body>404</body></html>" * 50,
            bytes(5000),
            b"GIF89a" + bytes(99),
            b"#EXTM3U\n#EXTINF:5,\nx.mp4\n",
            b'<?xml version="1.0"?><MPD/>',
            b"RIFF\x24\0\0\0WAVEfmt " + bytes(99),
            b"fLaC" + bytes(99),
            b"x",
        ],
        ids=["html", "zeros", "gif", "hls", "dash", "wav", "flac", "one byte"],
    )
    def test_what_begins_like_nothing_that_we_read_meets_no_decoder(
        self, source: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(av, "open", None)
        assert rejection(source).reason == "unsupported_format"

    def test_a_playlist_in_disguise_does_not_open_its_neighbour(self, tmp_path: Path) -> None:
        disguised = media.ffconcat_beside(tmp_path, video_bytes(grey_frames(9)))
        with av.open(str(disguised), options={"safe": "0"}) as opened:
            assert opened.format.name == "concat", "the control: plain FFmpeg falls for it"
        assert rejection(disguised).reason == "unsupported_format"

    def test_a_name_is_never_asked_for_the_format(self, tmp_path: Path) -> None:
        path = tmp_path / "http:clip.m3u8"
        path.write_bytes(video_bytes(grey_frames(9)))
        assert read_clip(path, geometry=TINY).bucket == NINE

    def test_garbage_after_a_good_beginning_is_undecodable(self) -> None:
        garbage = np.random.default_rng(0).bytes(4096)
        for head in (b"\x00\x00\x00\x18ftypisom", b"\x1a\x45\xdf\xa3", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"):
            assert rejection(head + garbage).reason in ("undecodable", "truncated")

    def test_sound_alone_is_no_video(self) -> None:
        assert rejection(media.audio_only_bytes()).reason == "no_video_stream"

    def test_sound_beside_the_video_does_no_harm(self) -> None:
        source = video_bytes(grey_frames(9), VideoStyle(with_audio=True))
        assert numbers(read_clip(source, geometry=TINY).pixels) == list(range(9))

    def test_a_heif_picture_is_refused(self) -> None:
        source = video_bytes(grey_frames(9))
        assert rejection(source.replace(b"ftypisom", b"ftypavif", 1)).reason == "unsupported_format"

    @pytest.mark.parametrize(
        "style",
        [
            VideoStyle(faststart=True),
            VideoStyle(),
            FFV1,
            VideoStyle(codec="mpeg4", pixel_format="yuv420p", container="avi", options=()),
        ],
        ids=["index first", "index last", "matroska", "avi"],
    )
    def test_a_cut_video_is_rejected_wherever_it_is_cut(self, style: VideoStyle) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (12, 64, 96, 3), np.uint8)
        source = video_bytes(list(noise), style)
        assert read_clip(source, geometry=TINY).bucket == NINE
        for share in (0.002, 0.02, 0.3, 0.6, 0.9, 0.99):
            rejected = rejection(source[: int(len(source) * share)])
            assert rejected.reason == "truncated", (share, rejected)
        assert rejection(source[:-1]).reason == "truncated"

    def test_damage_anywhere_in_a_short_clip_rejects_it(self) -> None:
        for num_frames, is_rejected in ((60, True), (120, False)):
            noise = np.random.default_rng(0).integers(0, 256, (num_frames, 32, 48, 3), np.uint8)
            source = bytearray(video_bytes(list(noise), VideoStyle(options=(("qp", "20"), ("preset", "ultrafast")))))
            start = len(source) * 3 // 4
            source[start : start + 6000] = b"\xff" * 6000
            if is_rejected:
                assert rejection(bytes(source)).reason == "undecodable"
            else:
                assert read_clip(bytes(source), geometry=TINY).bucket == NINE, "far longer than needed: left alone"

    def test_frames_beyond_the_limits_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source = video_bytes(grey_frames(9))
        monkeypatch.setattr(video_file, "MAX_DECODED_FRAMES", 5)
        assert rejection(source).reason == "too_large"
        monkeypatch.setattr(video_file, "MAX_FRAME_PIXELS", 64 * 96 - 1)
        assert rejection(source).detail == "frames of 96x64; the limit is 6143 pixels"
        monkeypatch.setattr(image_file, "MAX_FRAME_PIXELS", 64 * 96 - 1)
        assert rejection(media.image_bytes(media.quadrants(), "PNG")).reason == "too_large"

    def test_a_rejection_survives_the_way_between_processes(self) -> None:
        rejected = rejection(bytes(100))
        copy = pickle.loads(pickle.dumps(rejected))  # noqa: S301  # of our own making
        assert (copy.stage, copy.reason, copy.detail) == (rejected.stage, rejected.reason, rejected.detail)


class Broken:
    def read(self, size: int = -1) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0

    def tell(self) -> int:
        return 0


class TestSource:
    def test_the_hash_is_of_the_bytes_from_a_file_or_from_memory(self, tmp_path: Path) -> None:
        source = video_bytes(grey_frames(9)) + bytes(3 * 2**20)
        (tmp_path / "clip.mp4").write_bytes(source)
        expected = xxhash.xxh3_64_intdigest(source)
        assert hash_source(source) == hash_source(tmp_path / "clip.mp4") == expected
        assert read_clip(tmp_path / "clip.mp4", geometry=TINY).source_xxh3 == expected

    def test_a_file_and_its_bytes_give_the_same_pixels(self, tmp_path: Path) -> None:
        source = video_bytes(grey_frames(9), MPEG4)
        (tmp_path / "clip").write_bytes(source)
        from_file, from_bytes = read_clip(tmp_path / "clip", geometry=TINY), read_clip(source, geometry=TINY)
        assert np.array_equal(from_file.pixels, from_bytes.pixels)
