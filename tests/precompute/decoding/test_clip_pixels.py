"""Which frames and which bucket a clip gives, against a plain full decode; real clips."""

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mimir_precompute.clips.rejection import ClipRejected
from mimir_precompute.config import Bucket, Geometry
from mimir_precompute.decoding import clip_pixels as clips
from mimir_precompute.decoding import video_file
from mimir_precompute.decoding.clip_pixels import choose_bucket, num_frames_at, probe_clip, read_clip, read_first_frame
from mimir_precompute.decoding.frames import Span, shown_at
from tests.precompute import media
from tests.precompute.media import NINE, ONE, TINY, VideoStyle, grey_frames, numbers, psnr, rejection, video_bytes

CLIPS = Path(__file__).parents[3] / ".." / "shared" / "clips"
real_clips = pytest.mark.skipif(not CLIPS.is_dir(), reason="../shared/clips is not here")


class TestFramesByTime:
    @given(
        steps=st.lists(st.integers(0, 400), min_size=1, max_size=40),
        last=st.integers(0, 400),
        fps=st.sampled_from([1, 7, 8, 24, 30]),
        count=st.integers(0, 60),
    )
    def test_each_instant_gets_the_last_frame_that_began(
        self, steps: list[int], last: int, fps: int, count: int
    ) -> None:
        begins = [Fraction(sum(steps[1 : i + 1]), 1000) for i in range(len(steps))]
        ends = [*begins[1:], begins[-1] + Fraction(last, 1000)]
        spans = [Span(begin_s=b, end_s=e, item=i) for i, (b, e) in enumerate(zip(begins, ends, strict=True))]
        instants = [Fraction(i, fps) for i in range(count)]
        tolerance = Fraction(1, 1000)
        expected = [
            max(i for i, begin in enumerate(begins) if begin <= instant + tolerance)
            for instant in instants
            if instant <= ends[-1] + tolerance
        ]
        assert list(shown_at(spans, instants)) == expected

    def test_no_more_frames_are_asked_for_than_needed(self) -> None:
        asked = []

        def spans() -> Any:
            for i in range(1000):
                asked.append(i)
                yield Span(begin_s=Fraction(i, 24), end_s=Fraction(i + 1, 24), item=i)

        assert list(shown_at(spans(), [Fraction(i, 8) for i in range(9)])) == [0, 3, 6, 9, 12, 15, 18, 21, 24]
        assert asked[-1] == 25

    def test_variable_frame_rate_is_picked_by_stamp(self) -> None:
        stamps = (0, 10, 20, 30, 500, 510, 740, 760, 1010)
        source = video_bytes(
            grey_frames(9), VideoStyle(container="matroska", codec="ffv1", options=(), stamps_ms=stamps)
        )
        clip = read_clip(source, geometry=TINY)
        #       at 0 125 250 375 500 625 750 875 1000 ms
        assert numbers(clip.pixels) == [0, 3, 3, 3, 4, 5, 6, 7, 7]

    @pytest.mark.parametrize("container", ["mp4", "matroska"])
    @pytest.mark.parametrize("fps", [12, 24, 25, 30])
    def test_any_source_rate_gives_the_frames_of_a_plain_decode(self, fps: int, container: str) -> None:
        frames = [np.full((64, 96, 3), 5 + 6 * i, np.uint8) for i in range(40)]
        source = video_bytes(frames, VideoStyle(fps=fps, container=container))
        clip = read_clip(source, geometry=TINY)
        expected = media.naive_pick(source, fps=8, num_frames=9)
        assert [int(f.mean()) for f in clip.pixels] == pytest.approx([int(f.mean()) for f in expected], abs=1)

    def test_a_stream_that_starts_late_counts_from_its_first_frame(self) -> None:
        stamps = tuple(5000 + 125 * i for i in range(10))
        source = video_bytes(
            grey_frames(10), VideoStyle(container="matroska", codec="ffv1", options=(), stamps_ms=stamps)
        )
        assert numbers(read_clip(source, geometry=TINY).pixels) == list(range(9))

    def test_start_and_end_cut_out_a_clip(self) -> None:
        source = video_bytes(grey_frames(30))
        assert numbers(read_clip(source, geometry=TINY, start_s=1.0).pixels) == list(range(8, 17))
        assert numbers(read_clip(source, geometry=TINY, start_s=0.3, end_s=2.0).pixels) == list(range(2, 11))
        # what begins at the end belongs to the next scene: the frame before it is shown up to the end
        assert numbers(read_clip(source, geometry=TINY, start_s=0.0, end_s=1.0).pixels) == [*range(8), 7]
        assert read_clip(source, geometry=TINY, end_s=0.9).bucket == ONE
        for start_s, end_s in ((9.0, None), (1.0, 1.0), (2.0, 1.0)):
            assert rejection(source, start_s=start_s, end_s=end_s).reason == "too_short"

    @pytest.mark.parametrize("margin_s", [1, -3], ids=["as it is", "a jump that goes too far"])
    def test_a_far_start_is_reached_by_a_jump_with_the_same_result(
        self, margin_s: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(video_file, "_SEEK_MARGIN_S", margin_s)
        frames = [np.full((64, 96, 3), (3 * i) % 251, np.uint8) for i in range(300)]
        options = (("preset", "medium"), ("qp", "0"), ("g", "12"), ("bf", "3"))
        source = video_bytes(frames, VideoStyle(fps=24, options=options))
        reference = media.naive_frames(source)
        for start_s in (4.0, 5.21, 7.4999, 9.04):
            clip = read_clip(source, geometry=TINY, start_s=start_s)
            instants = [Fraction(str(start_s)) + Fraction(i, 8) + Fraction(1, 1000) for i in range(9)]
            expected = [[p for time, p in reference if time <= t][-1] for t in instants]
            assert np.array_equal(clip.pixels, np.stack(expected)), start_s


class TestBuckets:
    @pytest.mark.parametrize(("num_frames", "bucket"), [(1, ONE), (3, ONE), (7, ONE), (8, NINE), (9, NINE), (10, NINE)])
    def test_the_last_frame_reaches_up_to_its_end(self, num_frames: int, bucket: Bucket) -> None:
        """The ninth instant of eight frames at 8 fps falls on the end of the eighth, which counts."""
        clip = read_clip(video_bytes(grey_frames(num_frames)), geometry=TINY)
        assert clip.bucket == bucket
        assert numbers(clip.pixels) == [min(i, num_frames - 1) for i in range(bucket.frames)]

    def test_a_clip_too_short_for_every_bucket_is_rejected_and_never_padded(self) -> None:
        only_nine = Geometry(buckets=(NINE,), fps=8)
        rejected = rejection(video_bytes(grey_frames(7)), only_nine)
        assert (rejected.stage, rejected.reason) == ("geometry", "too_short")
        assert rejected.detail == "gives 8 frames at 8 fps; the shortest bucket takes 9"
        assert rejection(video_bytes(grey_frames(7)), TINY, bucket=NINE).reason == "too_short"

    def test_most_frames_then_least_cropped_then_most_pixels(self) -> None:
        wide, tall = Bucket(frames=9, height=64, width=128), Bucket(frames=9, height=128, width=64)
        large, longer = Bucket(frames=9, height=128, width=256), Bucket(frames=17, height=64, width=64)
        geometry = Geometry(buckets=(ONE, wide, tall, longer, large), fps=8)
        assert choose_bucket(17, width=1920, height=1080, geometry=geometry) == longer
        assert choose_bucket(16, width=1920, height=1080, geometry=geometry) == large
        assert choose_bucket(16, width=1080, height=1920, geometry=geometry) == tall
        assert choose_bucket(8, width=1080, height=1920, geometry=geometry) == ONE
        assert choose_bucket(0, width=1080, height=1920, geometry=geometry) is None

    def test_the_choice_does_not_depend_on_the_header(self, monkeypatch: pytest.MonkeyPatch) -> None:
        geometry = Geometry(buckets=(ONE, NINE, Bucket(frames=17, height=32, width=48)), fps=8)
        source = video_bytes(grey_frames(12))
        right = read_clip(source, geometry=geometry)
        assert right.bucket == NINE
        for guess in geometry.buckets:
            monkeypatch.setattr(clips, "_first_guess", lambda *_, guess=guess: guess)
            clip = read_clip(source, geometry=geometry)
            assert clip.bucket == NINE
            assert np.array_equal(clip.pixels, right.pixels)

    def test_a_named_bucket_is_filled_even_if_a_longer_one_could_be(self) -> None:
        assert read_clip(video_bytes(grey_frames(12)), geometry=TINY, bucket=ONE).pixels.shape == (1, 64, 96, 3)

    def test_a_duration_gives_as_many_frames_as_decoding_does(self) -> None:
        assert [num_frames_at(d, 8) for d in (0.0, 0.1, 0.125, 0.9, 1.0, 6.125)] == [1, 1, 2, 8, 9, 50]


class TestFirstFrame:
    def test_a_truncated_clip_still_shows_its_first_frame_in_its_own_proportions(self) -> None:
        whole = video_bytes(grey_frames(35, height=64, width=128), VideoStyle(faststart=True))
        cut = whole[: len(whole) * 3 // 4]
        assert rejection(cut).reason == "truncated"
        still = read_first_frame(cut, longest_side=128)
        assert still.shape == (64, 128, 3)
        assert media.read_number(still) == 0

    def test_the_still_is_of_where_the_clip_begins(self) -> None:
        source = video_bytes(grey_frames(32), VideoStyle(fps=2, options=(("qp", "0"), ("g", "2"))))
        assert 20 <= media.read_number(read_first_frame(source, longest_side=96, start_s=12.0)) <= 24

    def test_an_image_is_its_own_first_frame(self) -> None:
        source = media.image_bytes(np.zeros((96, 64, 3), np.uint8), "PNG", exif_orientation=6)
        assert read_first_frame(source, longest_side=48).shape == (32, 48, 3)

    def test_bytes_without_a_frame_are_rejected(self) -> None:
        with pytest.raises(ClipRejected) as rejected:
            read_first_frame(b"no clip at all, but text", longest_side=96)
        assert rejected.value.reason == "unsupported_format"


@real_clips
class TestRealClips:
    @pytest.mark.parametrize("name", ["cog_1", "cog_3", "cog_4", "horse", "train", "hiker", "crush_027", "h265_10bit"])
    def test_real_clips_fill_the_bucket_with_the_right_frames(self, name: str) -> None:
        source = (CLIPS / f"{name}.mp4").read_bytes()
        clip = read_clip(source, geometry=TINY)
        assert clip.bucket == NINE
        for pixels, stored in zip(clip.pixels, media.naive_pick(source, fps=8, num_frames=9), strict=True):
            height, width = stored.shape[:2]
            kept_width, kept_height = min(width, height * 1.5), min(height, width / 1.5)
            left, top = (width - kept_width) / 2, (height - kept_height) / 2
            box = (left, top, left + kept_width, top + kept_height)
            reference = Image.fromarray(stored).resize((96, 64), Image.Resampling.BICUBIC, box)
            # another kernel of the same kind, on pixels from FFmpeg's fast conversion: hard edges differ a little,
            # while the neighbouring frame or a shift by a pixel costs far more
            assert psnr(pixels, np.asarray(reference)) > 28

    def test_a_native_clip_is_not_resampled(self) -> None:
        source = (CLIPS / "cog_1.mp4").read_bytes()
        bucket = Bucket(frames=49, height=480, width=720)
        clip = read_clip(source, geometry=Geometry(buckets=(bucket,), fps=8))
        assert clip.pixels.shape == (49, 480, 720, 3)
        with av.open(io.BytesIO(source), "r") as container:
            for index, frame in enumerate(container.decode(video=0)):
                stored = (frame.to_ndarray()[:480].astype(float) - 16) * 255 / 219
                luma = clip.pixels[index] @ (0.299, 0.587, 0.114)
                difference = np.abs(luma - stored.clip(0, 255))
                # colours outside of RGB are clipped, which moves the luma of few pixels
                assert np.quantile(difference, 0.9) < 1.5, index

    def test_the_long_clip_is_sampled_by_time_from_anywhere(self) -> None:
        source = (CLIPS / "nasa.mp4").read_bytes()
        bucket = Bucket(frames=9, height=176, width=320)
        geometry = Geometry(buckets=(bucket,), fps=8)
        for start_s in (0, 6, 11):
            clip = read_clip(source, geometry=geometry, start_s=start_s)
            expected = media.naive_pick(source, fps=8, num_frames=9, start_s=Fraction(start_s))
            assert psnr(clip.pixels, np.stack(expected)[:, 2:178]) > 35, start_s
        assert rejection(source, geometry, start_s=12.1).reason == "too_short"

    def test_the_damaged_clip_is_rejected_with_a_true_reason(self) -> None:
        rejected = rejection(CLIPS / "corrupted.mp4")
        assert (rejected.stage, rejected.reason) == ("decode", "undecodable")
        assert "after 28 decoded frames" in rejected.detail

    def test_the_turned_clip_stands_upright_in_the_one_frame_bucket(self) -> None:
        source = (CLIPS / "rotated_90.mov").read_bytes()
        clip = read_clip(source, geometry=TINY)
        assert clip.bucket == ONE
        upright = Bucket(frames=1, height=560, width=320)
        pixels = read_clip(source, geometry=Geometry(buckets=(upright,), fps=8)).pixels[0]
        stored = media.naive_frames(source)[0][1]
        assert psnr(pixels, np.rot90(stored, -1)[4:564]) > 35

    def test_the_anamorphic_clip_is_shown_wider(self) -> None:
        info = probe_clip(CLIPS / "action.mp4")
        assert (info.width, info.height, info.frames, info.end_s, info.codec) == (427, 256, 280, 10.0, "h264")
