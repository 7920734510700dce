"""Any picture file to RGB bytes, or one line about what is wrong with it."""

from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps


class ImageDecodeError(Exception):
    """A picture that cannot be decoded. Attributes: `path` (str; which picture) and `reason` (str; one line)."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # both as arguments, so that the error survives pickling
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def decode_image(file: str | BinaryIO, path: str | None = None) -> np.ndarray:
    """Decodes any picture that PIL reads to RGB.

    CMYK, palette and 16-bit grey pictures are converted, transparency is laid over white, the first frame of an
    animation is taken, and the EXIF orientation is applied.

    Args:
      file: a path or an open binary file.
      path: how errors name the picture; the path itself when `file` is one.

    Returns:
      uint8 (h, w, 3).

    Raises:
      ImageDecodeError: it cannot be decoded completely.
    """
    try:
        with Image.open(file) as picture:
            return np.array(_to_rgb(_upright(picture)))
    except MemoryError:
        raise  # the machine's fault, not the picture's
    except (
        Exception
    ) as error:  # PIL's decoders raise nearly every built-in exception on damaged input
        reason = " ".join(str(error).split()) or type(error).__name__
        if path is None:
            path = str(file)
        raise ImageDecodeError(path, reason) from error


def _upright(picture: Image.Image) -> Image.Image:
    try:
        turned = picture.getexif().get(0x0112, 1) != 1  # 0x0112: orientation
    except Exception:  # unreadable EXIF does not make the pixels unreadable
        return picture
    return ImageOps.exif_transpose(picture) if turned else picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    mode = picture.mode
    if mode == "F":
        raise ValueError(
            "floating-point pixels, whose range is not known; save it with 8 or 16 bits"
        )
    if mode == "I" or mode.startswith("I;16"):  # "I" is what some 16-bit formats open as
        grey = np.clip(np.array(picture).astype(np.int64), 0, 65535)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert(
            "RGB"
        )
    return picture if mode == "RGB" else picture.convert("RGB")
