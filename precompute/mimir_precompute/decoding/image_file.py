"""One still image (PNG, JPEG, WebP) → RGB as stored, and how to turn it upright."""

import io
import struct
import warnings

import numpy as np
from PIL import Image

from mimir_precompute.clips.rejection import ClipRejected
from mimir_precompute.decoding.frames import Orientation, Pixels, lay_on_black
from mimir_precompute.decoding.video_file import MAX_FRAME_PIXELS

_EXIF_ORIENTATION = 0x0112

# Pillow tells the terminal of every odd EXIF field, and of large pictures, which are refused below anyway. Once and
# for all instead of around each call: warnings.catch_warnings is not safe between threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# Pillow has no closed list of what it raises on damaged files
_PILLOW_ERRORS = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error, ArithmeticError)


def decode_image(data: bytes) -> tuple[Pixels, Orientation]:
    """(h, w, 3) uint8 as stored, transparency laid on black, colour profiles not applied.

    Raises: ClipRejected (stage decode).
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > MAX_FRAME_PIXELS:
                detail = f"{image.width}x{image.height}; the limit is {MAX_FRAME_PIXELS} pixels"
                raise ClipRejected("decode", "too_large", detail)
            # a JPEG of several pictures holds previews of one; a PNG or WebP of several is a film
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise ClipRejected("decode", "unsupported_format", "an animated image; convert it to a video")
            orientation = Orientation.from_exif(image.getexif().get(_EXIF_ORIENTATION))
            return _to_rgb(image), orientation
    except Image.DecompressionBombError as error:
        raise ClipRejected("decode", "too_large", f"the limit is {MAX_FRAME_PIXELS} pixels") from error
    except _PILLOW_ERRORS as error:
        is_cut = "truncated" in str(error).lower()
        raise ClipRejected("decode", "truncated" if is_cut else "undecodable", "a damaged image") from error


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):
        # sixteen bits of grey: Pillow's own conversion would turn all above 255 into white
        grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return np.repeat(grey[..., np.newaxis], 3, axis=-1)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        return lay_on_black(np.asarray(image.convert("RGBA")))
    return np.asarray(image.convert("RGB"))
