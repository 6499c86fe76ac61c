"""The bytes of an image file to an upright PIL image in RGB or grey, or the reason why there is none.

What is odd but readable is read: palettes, CMYK, 16-bit grey (its upper byte), EXIF rotation, animations (the first
frame). Transparency is laid on white. Large JPEG files are decoded at 1/2, 1/4 or 1/8 where that leaves twice the pixels
that are needed (`shrink`). Damage that PIL's decoders take without a word, such as flipped bits amid the pixels of a
JPEG, is not seen. Knows no labels and draws no random numbers. PIL's warnings are the caller's to silence: warning filters
belong to the process, not to the thread that decodes.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)  # where PIL stops too: a few bytes can unfold to any size
_ORIENTATION = 0x0112  # EXIF tag
_SIDEWAYS = range(5, 9)  # orientations that swap width and height
_TURNS = {  # orientation -> what turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """A file that holds no image this module can read; the message is the reason, in a few words."""


def opened(data: bytes) -> tuple[Image.Image, int]:
    """The image, if it is a JPEG not decoded yet, and its EXIF orientation in 1 .. 8. Raises BadImage."""
    if not data:
        raise BadImage("the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
        if image.format != "JPEG":
            image.load()  # PNG decodes when asked for its EXIF, and does not fail a second time
        orientation = _orientation(image)
    except Exception as error:  # PIL's plugins raise nearly anything on damaged files
        raise BadImage(_reason(error)) from None
    return image, orientation


def upright_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    """Width and height as the image is meant to be seen."""
    return (image.height, image.width) if orientation in _SIDEWAYS else image.size


def shrink(image: Image.Image, factor: float) -> None:
    """Let the decoder of a JPEG leave out detail, if at least 1/factor of width and height remain to be had."""
    if image.format == "JPEG" and factor >= 2:
        image.draft(None, (int(image.width / factor) + 1, int(image.height / factor) + 1))


def pixels(image: Image.Image, orientation: int, channels: int = 3) -> Image.Image:
    """The decoded image in mode RGB (3 channels) or L (1), turned upright. Raises BadImage."""
    try:
        image.load()
        image = _coloured(image, "RGB" if channels == 3 else "L")
        return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(_reason(error)) from None


def _coloured(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode:
        return image
    if image.mode.startswith("I"):  # I;16 and I: 16 bits in PNG and TIFF files; convert would cut them off at 255
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert(mode)
    if image.mode == "F":
        raise BadImage("its pixels are fractions of an unknown range")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        ground.alpha_composite(image)
        image = ground
    return image.convert(mode)


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata of an image that may be sound
        return 1
    return found if found in range(1, 9) else 1


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is no image of a known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"it unfolds to more than {MAX_PIXELS:,} pixels"
    text = " ".join(str(error).split()).rstrip(".")
    if text.startswith("cannot identify image file"):
        return "it is no image of a known format"
    return text[:120] or type(error).__name__
