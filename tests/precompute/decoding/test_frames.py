"""How frames and images become upright RGB of a bucket's size."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import ClassVar

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from mimir_precompute.clips.rejection import ClipRejected
from mimir_precompute.config import Bucket, Geometry
from mimir_precompute.decoding.clip_pixels import probe_clip, read_clip
from mimir_precompute.decoding.frames import FrameCutter, Orientation
from tests.precompute import media
from tests.precompute.media import (
    MPEG4,
    NINE,
    ONE,
    TINY,
    VideoStyle,
    grey_frames,
    numbers,
    psnr,
    rejection,
    video_bytes,
)


class TestUpright:
    MATRICES: ClassVar = {
        0: (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30),
        90: (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30),
        180: (-65536, 0, 0, 0, -65536, 0, 0, 0, 1 << 30),
        270: (0, -65536, 0, 65536, 0, 0, 0, 0, 1 << 30),
    }
    # red | green over blue | white, turned clockwise
    TURNED: ClassVar = {
        0: ("red", "green", "blue", "white"),
        90: ("blue", "red", "white", "green"),
        180: ("white", "blue", "green", "red"),
        270: ("green", "white", "red", "blue"),
    }

    @pytest.mark.parametrize("degrees", [0, 90, 180, 270])
    def test_the_display_matrix_is_honoured(self, degrees: int) -> None:
        source = video_bytes([media.quadrants()] * 9, VideoStyle(matrix=self.MATRICES[degrees]))
        size = (64, 96) if degrees in (0, 180) else (96, 64)
        bucket = Bucket(frames=9, height=size[0], width=size[1])
        clip = read_clip(source, geometry=Geometry(buckets=(bucket,), fps=8))
        assert clip.pixels.flags.c_contiguous
        assert media.corner_names(clip.pixels[-1]) == self.TURNED[degrees]
        info = probe_clip(source)
        assert (info.height, info.width) == size

    def test_a_mirrored_video_is_mirrored_back(self) -> None:
        matrix = (-65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
        source = video_bytes([media.quadrants()] * 9, VideoStyle(matrix=matrix))
        assert media.corner_names(read_clip(source, geometry=TINY).pixels[0]) == ("green", "red", "white", "blue")

    def test_a_slanted_video_is_refused(self) -> None:
        matrix = (46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30)
        assert rejection(video_bytes(grey_frames(9), VideoStyle(matrix=matrix))).reason == "unsupported_format"

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation_is_honoured_as_pillow_does(self, orientation: int) -> None:
        source = media.image_bytes(media.quadrants(), "JPEG", exif_orientation=orientation)
        upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(source))))
        bucket = Bucket(frames=1, height=upright.shape[0], width=upright.shape[1])
        clip = read_clip(source, geometry=Geometry(buckets=(bucket,), fps=8))
        assert media.corner_names(clip.pixels[0]) == media.corner_names(upright)
        assert (probe_clip(source).height, probe_clip(source).width) == upright.shape[:2]

    def test_pixels_that_are_not_square_are_stretched(self) -> None:
        frame = np.zeros((64, 96, 3), np.uint8)
        frame[16:48, 40:56] = 255  # 32 high, 16 wide as stored, a square when shown
        source = video_bytes([frame] * 9, VideoStyle(sample_aspect=Fraction(2)))
        assert probe_clip(source).width == 192
        square = Bucket(frames=9, height=64, width=64)
        shown = read_clip(source, geometry=Geometry(buckets=(square,), fps=8)).pixels[0, :, :, 0] > 127
        assert abs(int(shown[32].sum()) - 32) <= 1
        assert abs(int(shown[:, 32].sum()) - 32) <= 1
        wide = Bucket(frames=9, height=64, width=256)
        shown = read_clip(source, geometry=Geometry(buckets=(wide,), fps=8)).pixels[0, :, :, 0] > 127
        assert abs(int(shown[32].sum()) - 32 * 256 / 192) <= 1, "the width decides the scale"


class TestSizeAndColour:
    def test_the_centre_is_kept_at_the_right_scale(self) -> None:
        y, x = np.mgrid[:480, :832]
        image = np.stack([x * 255 // 831, y * 255 // 479, ((x - 416) ** 2 + (y - 240) ** 2 < 80**2) * 255], -1)
        source = media.image_bytes(image.astype(np.uint8), "PNG")
        bucket = Bucket(frames=1, height=240, width=320)
        clip = read_clip(source, geometry=Geometry(buckets=(bucket,), fps=8))
        reference = Image.fromarray(image.astype(np.uint8)).resize(
            (320, 240), Image.Resampling.BICUBIC, (96, 0, 736, 480)
        )
        assert psnr(clip.pixels[0], np.asarray(reference)) > 38

    def test_shrinking_leaves_no_moire(self) -> None:
        stripes = np.zeros((640, 960, 3), np.uint8)
        stripes[:, ::2] = 255
        clip = read_clip(media.image_bytes(stripes, "PNG"), geometry=TINY)
        assert clip.pixels[0, :, 4:-4].std() < 3
        assert abs(float(clip.pixels.mean()) - 127.5) < 2

    @pytest.mark.parametrize("size", [(321, 241), (97, 65), (2, 2), (1, 1), (4000, 16), (16, 4000), (9000, 2)])
    def test_odd_tiny_and_extreme_sizes_fill_the_bucket(self, size: tuple[int, int]) -> None:
        width, height = size
        frame = np.full((height, width, 3), (200, 100, 50), np.uint8)
        clip = read_clip(media.image_bytes(frame, "PNG"), geometry=TINY)
        assert np.abs(clip.pixels.astype(int) - (200, 100, 50)).max() <= 1

    def test_a_wide_picture_is_cropped_before_it_is_enlarged(self) -> None:
        frame = np.zeros((16, 2000, 3), np.uint8)
        frame[:, 988:1012] = 255
        clip = read_clip(media.image_bytes(frame, "PNG"), geometry=TINY)
        assert clip.pixels[0].min() > 200

    @pytest.mark.parametrize(
        ("colorspace", "full", "height", "matrix"),
        [
            (1, False, 64, "709"),
            (5, False, 64, "601"),
            (1, True, 64, "709"),
            (5, True, 64, "601"),
            (2, False, 64, "601"),
            (2, False, 720, "709"),
        ],
    )
    def test_matrix_and_range_of_the_stream_are_used(
        self, colorspace: int, full: bool, height: int, matrix: str
    ) -> None:
        wanted = (200, 60, 30)
        kr, kb = {"709": (0.2126, 0.0722), "601": (0.299, 0.114)}[matrix]
        r, g, b = (value / 255 for value in wanted)
        luma = kr * r + (1 - kr - kb) * g + kb * b
        chroma = ((b - luma) / (2 * (1 - kb)), (r - luma) / (2 * (1 - kr)))
        planes = [luma * 255, *(c * 255 + 128 for c in chroma)] if full else [16 + 219 * luma]
        if not full:
            planes += [128 + 224 * c for c in chroma]
        stored = np.stack([np.full((height, height), round(p), np.uint8) for p in planes])
        frame = av.VideoFrame.from_ndarray(stored, format="yuv444p")
        frame.colorspace, frame.color_range = colorspace, 2 if full else 1
        style = VideoStyle(colorspace=colorspace, color_range=2 if full else 1)
        clip = read_clip(video_bytes([frame], style), geometry=TINY)
        assert np.abs(clip.pixels.reshape(-1, 3).mean(0) - wanted).max() <= 2.5

    def test_ten_bit_hevc_is_read(self) -> None:
        if not media.has_encoder("libx265"):
            pytest.skip("this FFmpeg has no libx265")
        options = (("x265-params", "log-level=none:crf=4:pools=1:frame-threads=1"), ("preset", "ultrafast"))
        style = VideoStyle(codec="libx265", pixel_format="yuv420p10le", options=options)
        assert numbers(read_clip(video_bytes(grey_frames(9), style), geometry=TINY).pixels) == list(range(9))

    @pytest.mark.parametrize(
        ("codec", "container", "options"),
        [
            ("libsvtav1", "mp4", (("preset", "12"), ("crf", "10"), ("svtav1-params", "lp=1"))),
            ("libvpx-vp9", "webm", (("crf", "4"), ("deadline", "realtime"), ("cpu-used", "8"))),
            ("mpeg4", "avi", (("qscale", "2"),)),
            ("mjpeg", "avi", (("qscale", "2"),)),
        ],
    )
    def test_other_codecs_and_containers_are_read(
        self, codec: str, container: str, options: tuple[tuple[str, str], ...]
    ) -> None:
        if not media.has_encoder(codec):
            pytest.skip(f"this FFmpeg has no {codec}")
        pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        style = VideoStyle(codec=codec, pixel_format=pixel_format, container=container, options=options)
        clip = read_clip(video_bytes(grey_frames(10), style), geometry=TINY)
        assert numbers(clip.pixels) == list(range(9))

    def test_odd_sizes_of_video_are_read(self) -> None:
        style = VideoStyle(codec="mpeg4", pixel_format="yuv420p", options=(("qscale", "2"),))
        source = video_bytes(grey_frames(9, height=241, width=321), style)
        assert numbers(read_clip(source, geometry=TINY).pixels) == list(range(9))

    def test_transparent_pixels_are_laid_on_black(self) -> None:
        rgba = np.full((64, 96, 4), (200, 100, 50, 128), np.uint8)
        rgba[:32, :, 3] = 0
        image = read_clip(media.image_bytes(rgba, "PNG"), geometry=TINY).pixels[0]
        frames = [av.VideoFrame.from_ndarray(rgba, format="rgba")] * 9
        style = VideoStyle(codec="png", pixel_format="rgba", container="mov", options=())
        video = read_clip(video_bytes(frames, style), geometry=TINY).pixels[8]
        for pixels in (image, video):
            assert np.abs(pixels[:24].astype(int)).max() == 0
            assert np.abs(pixels[40:].astype(int) - (100, 50, 25)).max() <= 1

    def test_the_same_bytes_come_out_whatever_the_thread(self, capfd: pytest.CaptureFixture[str]) -> None:
        y, x = np.mgrid[:240, :320]
        frames = [np.stack([x + 9 * i, y + 5 * i, x * y // 99], -1).astype(np.uint8) for i in range(9)]
        sources = [video_bytes(frames, MPEG4), video_bytes(frames), bytes(100), video_bytes(frames)[:5000]]
        barrier = threading.Barrier(4)

        def read(source: bytes) -> object:
            barrier.wait()
            try:
                return read_clip(source, geometry=TINY).pixels.tobytes()
            except ClipRejected as rejected:
                return str(rejected)

        with ThreadPoolExecutor(4) as pool:
            runs = [list(pool.map(read, sources)) for _ in range(4)]
        assert all(run == runs[0] for run in runs)
        out, err = capfd.readouterr()
        assert (out, err) == ("", ""), "FFmpeg's chatter reached the terminal"


class TestImages:
    @pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
    def test_an_image_is_a_clip_of_one_frame(self, image_format: str) -> None:
        source = media.image_bytes(media.quadrants(), image_format)
        clip = read_clip(source, geometry=TINY, start_s=3.0)
        assert clip.bucket == ONE
        assert psnr(clip.pixels[0], media.quadrants()) > 25
        info = probe_clip(source)
        assert (info.is_image, info.frames, info.codec, info.end_s) == (True, 1, image_format.lower(), None)

    def test_an_image_fills_no_bucket_of_many_frames(self) -> None:
        source = media.image_bytes(media.quadrants(), "PNG")
        assert rejection(source, Geometry(buckets=(NINE,), fps=8)).reason == "too_short"

    def test_grey_palette_and_sixteen_bit_pictures_are_read(self) -> None:
        grey = np.full((64, 96), 90, np.uint8)
        assert np.unique(read_clip(media.image_bytes(grey, "PNG"), geometry=TINY).pixels) == 90
        deep = np.full((64, 96), 90 << 8, np.uint16)
        assert np.unique(read_clip(media.image_bytes(deep, "PNG"), geometry=TINY).pixels) == 90
        buffer = io.BytesIO()
        Image.fromarray(media.quadrants()).quantize(4).save(buffer, "PNG")
        clip = read_clip(buffer.getvalue(), geometry=TINY)
        assert media.corner_names(clip.pixels[0]) == ("red", "green", "blue", "white")

    def test_an_animated_image_is_refused(self) -> None:
        buffer = io.BytesIO()
        first, *rest = (Image.fromarray(frame) for frame in grey_frames(3))
        first.save(buffer, "WEBP", save_all=True, append_images=rest)
        assert rejection(buffer.getvalue()).reason == "unsupported_format"

    @pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
    def test_a_cut_image_is_rejected(self, image_format: str) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
        source = media.image_bytes(noise, image_format)
        for share in (0.2, 0.5, 0.9):
            assert rejection(source[: int(len(source) * share)]).reason in ("truncated", "undecodable")

    def test_a_picture_of_huge_declared_size_is_rejected_before_decoding(self) -> None:
        assert rejection(media.huge_png_bytes()).reason == "too_large"


def test_the_cut_of_a_transposed_frame_is_a_turned_cut() -> None:
    """The centre crop is symmetric: cutting then turning equals turning then cutting."""
    noise = np.random.default_rng(0).integers(0, 256, (120, 200, 3), np.uint8)
    turned = Orientation(transpose=True, mirror_x=True)
    bucket = Bucket(frames=1, height=96, width=64)
    upright = FrameCutter(bucket=bucket, orientation=Orientation(), sample_aspect=Fraction(1))
    stored = FrameCutter(bucket=bucket, orientation=turned, sample_aspect=Fraction(1))
    a = stored.cut(av.VideoFrame.from_ndarray(noise, format="rgb24"))
    b = upright.cut(av.VideoFrame.from_ndarray(np.ascontiguousarray(turned.apply(noise)), format="rgb24"))
    assert psnr(a, b) > 35
