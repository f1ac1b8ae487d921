"""The corpus of odd and bad clips: how each is made, what must become of it, and what its pixels must be."""

import io
import os
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

from mimir_precompute.decoding.frames import Pixels
from tests.precompute import media
from tests.precompute.decoding.hostile_child import MARK
from tests.precompute.media import FFV1, MPEG4, VideoStyle, image_bytes, video_bytes

NINE_FRAMES, ONE_FRAME = "ok 9x64x96", "ok 1x64x96"
X265 = VideoStyle(
    codec="libx265",
    pixel_format="yuv420p10le",
    options=(("x265-params", "log-level=none:crf=2:pools=1:frame-threads=1"), ("preset", "ultrafast")),
)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One line of the table."""

    name: str
    kind: str
    make: Callable[[Path], object]
    """Puts it at a path."""
    expected: str
    """"ok BUCKET", or "stage: reason" of its latents; text features never ask for the video."""
    pixels: Pixels | None = None
    """(F, H, W, 3), made without the code under test; None where the clip is of no use."""
    columns: dict[str, object] = field(default_factory=dict)
    """Of its line in metadata.jsonl, beside the name and the caption."""


def scene(index: int, *, height: int = 64, width: int = 96) -> Pixels:
    """(h, w, 3): a slope of grey that tells every corner from every other, brighter with each frame.

    Grey, so that no matrix of colours matters; smooth, so that no kernel of resizing does.
    """
    y, x = np.mgrid[:height, :width]
    grey = 20 + 9 * index + 70 * x / max(1, width - 1) + 35 * y / max(1, height - 1)
    return np.repeat(np.round(grey)[..., None], 3, axis=-1).astype(np.uint8)


def scenes(count: int, *, height: int = 64, width: int = 96) -> list[Pixels]:
    return [scene(index, height=height, width=width) for index in range(count)]


def covered(frames: list[Pixels], picks: list[int] | range) -> Pixels:
    """Resized to cover 64x96 and cropped in the centre, by Pillow."""
    cut = []
    for index in picks:
        height, width = frames[index].shape[:2]
        scale = max(64 / height, 96 / width)
        size = (max(96, round(width * scale)), max(64, round(height * scale)))
        image = np.asarray(Image.fromarray(frames[index]).resize(size, Image.Resampling.BICUBIC))
        top, left = (image.shape[0] - 64) // 2, (image.shape[1] - 96) // 2
        cut.append(image[top : top + 64, left : left + 96])
    return np.stack(cut)


def data(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def misbehaving(how: str) -> Callable[[Path], object]:
    """A good clip that makes a hostile child misbehave."""
    return data(video_bytes(scenes(9)) + MARK + how.encode())


def noise(count: int = 12) -> list[Pixels]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 64, 96, 3), np.uint8))


def cut(source: bytes, share: float) -> Callable[[Path], object]:
    return data(source[: int(len(source) * share)])


def patched(source: bytes, box: bytes, offset: int, content: bytes) -> bytes:
    """Overwrite bytes after the four letters of a box."""
    place = source.index(box) + 4 + offset
    return source[:place] + content + source[place + len(content) :]


def damaged() -> bytes:
    """A video with a hole in it that its decoder notices."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 32, 48, 3), np.uint8)
    source = bytearray(video_bytes(list(pixels), VideoStyle(options=(("qp", "20"), ("preset", "ultrafast")))))
    place = len(source) * 3 // 4
    source[place : place + 6000] = b"\xff" * 6000
    return bytes(source)


def with_flipped_bits(source: bytes, count: int) -> bytes:
    """Bits of the film, not of its index."""
    first, last = source.index(b"mdat") + 100, len(source)
    flipped = bytearray(source)
    for place in np.random.default_rng(0).integers(first, last, count):
        flipped[place] ^= 4
    return bytes(flipped)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("clip.mp4", b"x" * 1000)
    return buffer.getvalue()


def with_cover_first(frames: list[Pixels]) -> bytes:
    """An mp4 whose first video stream is a cover picture."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 48, 32, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        video = container.add_stream("libx264", rate=8, options={"qp": "0", "preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = 96, 64, "yuv444p"
        picture = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 255, np.uint8), format="rgb24")
        container.mux([*cover.encode(picture), *cover.encode()])
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())
    return buffer.getvalue()


def with_many_streams(frames: list[Pixels]) -> bytes:
    """A matroska file of three sounds and two videos, of which the second is marked as the default."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        videos = [container.add_stream("ffv1", rate=8) for _ in range(2)]
        sounds = [container.add_stream("aac", rate=16000, layout="mono") for _ in range(3)]
        for video in videos:
            video.width, video.height, video.pix_fmt = 96, 64, "yuv444p"
        videos[0].disposition, videos[1].disposition = Disposition(0), Disposition.default
        for frame in frames:
            for video, pixels in zip(videos, (np.zeros_like(frame), frame), strict=True):
                container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in videos:
            container.mux(stream.encode())
        for sound in sounds:
            container.mux(media._silence(sound))
    return buffer.getvalue()


def interlaced(frames: list[Pixels]) -> bytes:
    options = (("qp", "0"), ("preset", "ultrafast"), ("flags", "+ildct+ilme"), ("x264-params", "tff=1"))
    return video_bytes(frames, VideoStyle(options=options))


def transparent() -> tuple[bytes, Pixels]:
    """A video with an alpha channel, and what it shows on black."""
    alpha = np.full((64, 96, 1), 128, np.uint8)
    alpha[:32] = 0
    frames = [np.concatenate([pixels, alpha], -1) for pixels in scenes(9)]
    style = VideoStyle(codec="png", pixel_format="rgba", container="mov", options=())
    source = video_bytes([av.VideoFrame.from_ndarray(frame, format="rgba") for frame in frames], style)
    return source, np.stack([np.round(f[..., :3] * (f[..., 3:] / 255)).astype(np.uint8) for f in frames])


def animated() -> bytes:
    buffer = io.BytesIO()
    first, *rest = (Image.fromarray(frame) for frame in scenes(3))
    first.save(buffer, "WEBP", save_all=True, append_images=rest)
    return buffer.getvalue()


def cmyk_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(scene(0)).convert("CMYK").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def without_samples(source: bytes) -> bytes:
    """The index of a faststart mp4, and an empty film."""
    return source[: source.index(b"mdat") - 4] + struct.pack(">I", 8) + b"mdat"


def fragmented(frames: list[Pixels]) -> bytes:
    buffer = io.BytesIO()
    options = {"movflags": "frag_keyframe+empty_moov"}
    with av.open(buffer, "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=8, options={"qp": "0", "preset": "ultrafast", "g": "4"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def listen(path: Path) -> None:
    """A socket in the file system."""
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(path.parent, os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{here}/{path.name}")  # a path to a socket may have a hundred characters
        os.close(here)


def playlists(port: int) -> dict[str, bytes]:
    """Files that make FFmpeg open others: a neighbour, or an address of this machine."""
    url = f"http://127.0.0.1:{port}"
    sdp = f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n"
    mpd = (
        f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        f'mediaPresentationDuration="PT1S"><Period><AdaptationSet><Representation id="1" bandwidth="1">'
        f"<BaseURL>{url}/clip.mp4</BaseURL><SegmentBase/></Representation></AdaptationSet></Period></MPD>"
    )
    return {
        "ffconcat to a neighbour": b"ffconcat version 1.0\nfile plain.mp4\n",
        "ffconcat to an address": f"ffconcat version 1.0\nfile {url}/clip.mp4\n".encode(),
        "HLS": f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{url}/clip.ts\n#EXT-X-ENDLIST\n".encode(),
        "HLS to a neighbour": b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nplain.mp4\n#EXT-X-ENDLIST\n",
        "DASH": mpd.encode(),
        "SDP": sdp.encode(),
        "ASX": f'<asx version="3.0"><entry><ref href="{url}/clip.mp4"/></entry></asx>'.encode(),
        "playlist behind the head of an mp4": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2"
        + f"\n#EXTM3U\n#EXTINF:5,\n{url}/clip.ts\n".encode(),
    }


def good_clips() -> Iterator[Clip]:
    """Odd, but to be used, and with which pixels."""
    nine = scenes(9)
    plain = covered(nine, range(9))

    def clip(name: str, kind: str, source: bytes, pixels: Pixels, expected: str = NINE_FRAMES) -> Clip:
        return Clip(name=name, kind=kind, make=data(source), expected=expected, pixels=pixels)

    yield clip("plain.mp4", "plain", video_bytes(nine), plain)
    yield clip("matroska.mp4", "wrong extension", video_bytes(nine, FFV1), plain)
    yield clip("video.txt.png", "wrong extension", video_bytes(nine), plain)
    yield clip("picture.mp4", "still image named mp4", image_bytes(nine[0], "PNG"), plain[:1], ONE_FRAME)
    stamps = (0, 10, 20, 30, 500, 510, 740, 760, 1010)
    variable = VideoStyle(container="matroska", codec="ffv1", options=(), stamps_ms=stamps)
    yield clip("variable.mkv", "variable frame rate", video_bytes(nine, variable), plain[[0, 3, 3, 3, 4, 5, 6, 7, 7]])
    late = VideoStyle(container="matroska", codec="ffv1", options=(), stamps_ms=tuple(3000 + 125 * i for i in range(9)))
    yield clip("late.mkv", "first frame late", video_bytes(nine, late), plain)
    yield clip("short.mp4", "frames missing", video_bytes(nine[:7]), plain[:1], ONE_FRAME)
    odd = scenes(9, height=241, width=321)
    yield clip("odd size.mp4", "odd size", video_bytes(odd, MPEG4), covered(odd, range(9)))
    small = media.grey_frames(9, height=2, width=2)
    yield clip("tiny.mp4", "tiny", video_bytes(small), covered(small, range(9)))
    wide, high = scenes(9, height=16, width=1600), scenes(9, height=1600, width=16)
    yield clip("wide.mp4", "extreme aspect", video_bytes(wide), covered(wide, range(9)))
    yield clip("high.mp4", "extreme aspect", video_bytes(high), covered(high, range(9)))
    standing = scenes(9, height=96, width=64)
    lying = [np.ascontiguousarray(np.rot90(frame)) for frame in standing]
    quarter = VideoStyle(matrix=(0, 65536, 0, -65536, 0, 0, 0, 0, 2**30))
    yield clip("rotated.mp4", "rotated", video_bytes(lying, quarter), covered(standing, range(9)))
    if media.has_encoder("libx265"):
        yield clip("ten bits.mp4", "10 bits", video_bytes(nine, X265), plain)
        hdr = VideoStyle(codec=X265.codec, pixel_format=X265.pixel_format, options=X265.options, colorspace=9)
        yield clip("hdr.mp4", "HDR", video_bytes(nine, hdr), plain)
    yield clip("alpha.mov", "alpha", *transparent())
    yield clip("interlaced.mp4", "interlaced", interlaced(nine), plain)
    yield clip("cover.mp4", "attached picture first", with_cover_first(nine), plain)
    yield clip("streams.mkv", "many streams", with_many_streams(nine), plain)
    yield clip("fragments.mp4", "fragmented", fragmented(nine), plain)
    squeezed = scenes(9, height=64, width=48)
    wide_pixels = VideoStyle(sample_aspect=Fraction(2))
    yield clip("wide pixels.mp4", "pixels not square", video_bytes(squeezed, wide_pixels), plain)
    yield clip(
        "turned.jpg", "rotated", image_bytes(lying[0], "JPEG", exif_orientation=6), covered(standing, [0]), ONE_FRAME
    )
    deep = scene(0)[..., 0].astype(np.uint16) << 8
    yield clip("deep.png", "16 bits", image_bytes(deep, "PNG"), plain[:1], ONE_FRAME)
    yield clip("print.jpg", "CMYK", cmyk_jpeg(), plain[:1], ONE_FRAME)
    for name in ("with space.mp4", "ünï—日本🎬.mp4", "new\nline.mp4", "-rf --help.mp4", "%03d.mp4", "http:x.m3u8"):
        yield clip(name, "odd name", video_bytes(nine), plain)


def bad_clips(port: int) -> Iterator[Clip]:
    """Of no use, and why."""
    whole = video_bytes(noise(), VideoStyle(faststart=True))
    yield from (
        Clip(name=name, kind=kind, make=make, expected=expected)
        for name, kind, make, expected in (
            ("gone.mp4", "missing", lambda path: None, "fetch: missing"),
            ("broken.mp4", "broken link", lambda path: path.symlink_to("nowhere"), "fetch: missing"),
            ("loop.mp4", "link to itself", lambda path: path.symlink_to(path.name), "fetch: unreadable"),
            ("folder.mp4", "directory", lambda path: path.mkdir(), "fetch: unreadable"),
            ("pipe.mp4", "FIFO", lambda path: os.mkfifo(path), "fetch: unreadable"),
            ("device.mp4", "device", lambda path: path.symlink_to("/dev/zero"), "fetch: unreadable"),
            ("socket.mp4", "socket", listen, "fetch: unreadable"),
            ("denied.mp4", "unreadable", data(whole), "fetch: unreadable"),
            ("a" * 260 + ".mp4", "name too long", lambda path: None, "fetch: unreadable"),
            ("frame%03d.png", "image sequence", lambda path: None, "fetch: missing"),
            ("pipe:0", "protocol as name", lambda path: None, "fetch: missing"),
            ("concat:plain.mp4|plain.mp4", "protocol as name", lambda path: None, "fetch: missing"),
            ("empty.mp4", "zero length", data(b""), "fetch: empty_file"),
            ("byte.mp4", "one byte", data(b"\0"), "decode: unsupported_format"),
            ("noise.mp4", "garbage", data(np.random.default_rng(0).bytes(5000)), "decode: unsupported_format"),
            ("zeros.mp4", "zeros", data(bytes(5000)), "decode: unsupported_format"),
            ("page.mp4", "HTML", data(b"<!DOCTYPE html><h1>404</h1>" * 99), "decode: unsupported_format"),
            ("text.mp4", "text", data(b"only words\n" * 99), "decode: unsupported_format"),
            ("film.gif", "GIF", data(b"GIF89a" + bytes(99)), "decode: unsupported_format"),
            ("archive.mp4", "archive", data(zipped()), "decode: unsupported_format"),
            ("moving.webp", "animated image", data(animated()), "decode: unsupported_format"),
            ("sound.mp4", "audio only", data(media.audio_only_bytes()), "decode: no_video_stream"),
            ("sound.wav.mp4", "audio only", data(b"RIFF\x24\0\0\0WAVEfmt " + bytes(99)), "decode: unsupported_format"),
            ("cut1.mp4", "truncated, index first", cut(whole, 0.6), "decode: truncated"),
            ("cut2.mp4", "truncated, index last", cut(video_bytes(noise()), 0.6), "decode: truncated"),
            ("cut3.mkv", "truncated matroska", cut(video_bytes(noise(), FFV1), 0.6), "decode: truncated"),
            ("cut4.jpg", "truncated image", cut(image_bytes(noise()[0], "JPEG"), 0.6), "decode: truncated"),
            ("cut5.mp4", "one byte short", data(whole[:-1]), "decode: truncated"),
            ("flips.mp4", "bit flips", data(damaged()), "decode: undecodable"),
            ("hollow.mp4", "no samples", data(without_samples(whole)), "decode: undecodable"),
            ("no index.mp4", "no index", data(whole.replace(b"moov", b"junk")), "decode: undecodable"),
            ("ebml.mkv", "garbage after a good head", data(b"\x1a\x45\xdf\xa3" + bytes(9999)), "decode: undecodable"),
            ("codec.mp4", "unknown codec", data(whole.replace(b"avc1", b"zzzz")), "decode: unsupported_format"),
            ("heif.mp4", "HEIF", data(whole.replace(b"ftypisom", b"ftypheic")), "decode: unsupported_format"),
            ("huge.png", "huge declared size", data(media.huge_png_bytes()), "decode: too_large"),
            ("huge.mkv", "huge declared size", data(claiming_a_huge_size()), "decode: too_large"),
            ("long.mp4", "huge declared length", data(lasting(whole)), "decode: too_large"),
            ("askew.mp4", "turned by 45 degrees", data(askew()), "decode: unsupported_format"),
            ("hang.mp4", "decoder hangs", misbehaving("hang"), "decode: timeout"),
            ("hold.mp4", "decoder hangs", misbehaving("hang with the lock"), "decode: timeout"),
            ("spin.mp4", "decoder spins", misbehaving("spin"), "decode: timeout"),
            ("abort.mp4", "decoder aborts", misbehaving("abort"), "decode: crashed_decoder"),
            ("segfault.mp4", "decoder crashes", misbehaving("segfault"), "decode: crashed_decoder"),
            ("leave.mp4", "decoder exits", misbehaving("leave"), "decode: crashed_decoder"),
            ("raise.mp4", "decoder raises", misbehaving("raise"), "decode: crashed_decoder"),
            ("lie.mp4", "decoder lies", misbehaving("claim another bucket"), "decode: crashed_decoder"),
            ("bomb.mp4", "decoder allocates without bound", misbehaving("allocate in python"), "decode: out_of_memory"),
        )
    )
    trimmed = {"start_s": 7.5, "end_s": 8.0}
    yield Clip(
        name="past the end.mp4",
        kind="part that is not there",
        make=data(video_bytes(scenes(9))),
        expected="geometry: too_short",
        columns=trimmed,
    )
    for name, content in playlists(port).items():
        is_headed = name == "playlist behind the head of an mp4"
        expected = "decode: undecodable" if is_headed else "decode: unsupported_format"
        yield Clip(name=f"{name}.mp4", kind="playlist in disguise", make=data(content), expected=expected)


def lasting(source: bytes) -> bytes:
    """An mp4 whose header says that its nine frames last for weeks."""
    longest = struct.pack(">I", 0x7FFFFFFF)
    source = patched(patched(source, b"mvhd", 16, longest), b"tkhd", 20, longest)
    source = patched(source, b"elst", 8, longest)
    return patched(patched(source, b"mdhd", 12, struct.pack(">I", 1) + longest), b"stts", 12, b"\0\1\0\0")


def claiming_a_huge_size() -> bytes:
    """A matroska file whose header says 16000x16000; this codec has no size of its own."""
    source = video_bytes(scenes(9, height=256, width=320), FFV1)
    for element in (b"\xb0\x82\x01\x40", b"\xba\x82\x01\x00"):  # PixelWidth 320, PixelHeight 256
        assert source.count(element) == 1
        source = source.replace(element, element[:2] + b"\x3e\x80")
    return source


def askew() -> bytes:
    return video_bytes(scenes(9), VideoStyle(matrix=(46341, 46341, 0, -46341, 46341, 0, 0, 0, 2**30)))
