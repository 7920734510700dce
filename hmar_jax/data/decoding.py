"""Decodes image files of any kind to RGB bytes, or raises `ImageDecodeError`."""

from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

_EXIF_ORIENTATION = 0x0112


class ImageDecodeError(Exception):
    """An image cannot be decoded.

    Attributes:
      path: which image.
      reason: what is wrong with it, in one line.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # both as arguments, so that the error survives pickling
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def decode_image(file: str | BinaryIO, path: str | None = None) -> np.ndarray:
    """Decodes any image that PIL can read to RGB.

    CMYK, palette and 16-bit gray images are converted. Transparent pixels are composited over
    white. Of an animation, the first frame is taken. The EXIF orientation is applied.

    Args:
      file: a path or an open binary file.
      path: the image's name in errors; by default the path itself.

    Returns:
      (h, w, 3) uint8.

    Raises:
      ImageDecodeError: the image cannot be decoded completely.
    """
    return decode(file, lambda image: np.array(_to_rgb(image)), path)


def decode(
    file: str | BinaryIO, convert: Callable[[Image.Image], np.ndarray], path: str | None = None
) -> np.ndarray:
    """Decodes an image as `decode_image` does, with another conversion of the upright image.

    Raises:
      ImageDecodeError: the image cannot be decoded completely, or `convert` fails.
    """
    try:
        with Image.open(file) as image:
            return convert(_apply_orientation(image))
    except MemoryError:
        raise  # caused by the machine, not by the image
    except Exception as error:
        # PIL's decoders raise nearly every built-in exception on damaged input.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageDecodeError(str(file) if path is None else path, reason) from error


def _apply_orientation(image: Image.Image) -> Image.Image:
    try:
        is_rotated = image.getexif().get(_EXIF_ORIENTATION, 1) != 1
    except Exception:  # unreadable EXIF does not make the pixels unreadable
        return image
    return ImageOps.exif_transpose(image) if is_rotated else image


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode == "F":
        raise ValueError("floating-point pixels of unknown range; save it with 8 or 16 bits")
    if mode == "I" or mode.startswith("I;16"):  # some 16-bit formats open as "I"
        gray = np.clip(np.array(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((gray * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")
