"""Decodes image files of any kind to RGB bytes, or raises `ImageDecodeError`."""

import contextlib
import struct
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps

from hmar_jax.data.source_config import DecodeConfig
from hmar_jax.errors import printable

try:
    import pillow_heif  # reads .heic files; optional
except ImportError:
    pass
else:
    pillow_heif.register_heif_opener()

MAX_PIXELS = DecodeConfig().max_pixels
_EXIF_ORIENTATION = 0x0112
_STRIP_PIXELS = 1 << 22
# Formats that Pillow recognises and does not decode (others are StubImageFile), or only by a
# program that interprets them (Ghostscript).
_NOT_DECODED = ("EPS", "MPEG")
# Some decoders warn of half of Pillow's own limit. `max_pixels` stands in its place.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageDecodeError(Exception):
    """An image cannot be decoded.

    Attributes:
      path: which image; unprintable characters are escaped.
      reason: what is wrong with it, in one line.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # both as arguments, so that the error survives pickling
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def image_endings() -> frozenset[str]:
    """The endings of file names, such as ".jpg", of the formats that can be decoded.

    They are those that Pillow and its registered plugins list for the formats that they open.
    """
    Image.init()
    return frozenset(
        ending.lower()
        for ending, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in _NOT_DECODED and not _is_stub(Image.OPEN[name][0])
    )


def _is_stub(factory) -> bool:
    return isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)


def decode_image(
    file: str | BinaryIO, path: str | None = None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decodes any image that PIL can read to RGB.

    CMYK, palette and 16-bit gray images are converted. Transparent pixels are composited over
    white. Of an animation, the first frame is taken. The EXIF orientation is applied.

    Args:
      file: a path or an open binary file.
      path: the image's name in errors; by default the path itself.
      max_pixels: the most pixels, width times height; checked before pixels are decoded.

    Returns:
      (h, w, 3) uint8.

    Raises:
      ImageDecodeError: the image cannot be decoded completely, or has more pixels.
    """
    return decode(file, lambda image: _to_array(_to_rgb(image)), path, max_pixels)


def read_profile(path: str, max_pixels: int = MAX_PIXELS) -> bytes | None:
    """The ICC profile of what `decode_image` returns, if the file has one for RGB.

    Raises:
      ImageDecodeError: the file is no image, or has more pixels.
    """
    is_rgb = lambda image: image.mode in ("RGB", "RGBA", "P")
    convert = lambda image: image.info.get("icc_profile") if is_rgb(image) else None
    return decode(path, convert, max_pixels=max_pixels)


def describe_losses(path: str, max_pixels: int = MAX_PIXELS) -> list[str]:
    """What `decode_image` leaves out beside transparency, in words; nothing of most images.

    Raises:
      ImageDecodeError: the file is no image, or has more pixels.
    """
    return decode(path, _describe_losses, max_pixels=max_pixels)


def _describe_losses(image: Image.Image) -> list[str]:
    losses = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # photographs of telephones, with a preview
        losses.append(f"only the first of {frames} frames is read")
    if image.mode == "I" or image.mode.startswith("I;16"):
        losses.append("its 16 bits become 8")
    return losses


def decode(
    file: str | BinaryIO,
    convert: Callable[[Image.Image], Any],
    path: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Any:
    """Decodes an image as `decode_image` does, with another conversion of the upright image.

    Raises:
      ImageDecodeError: the image cannot be decoded completely, has more pixels, or `convert` fails.
    """
    try:
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(open(file, "rb")) if isinstance(file, str) else file
            image = _open_image(opened, file if isinstance(file, str) else "")
            _check_size(image, max_pixels)
            return convert(_apply_orientation(image))
    except MemoryError:
        raise  # caused by the machine, not by the image
    except Exception as error:
        # PIL's decoders raise nearly every built-in exception on damaged input.
        known = isinstance(error, OSError) and error.strerror
        reason = " ".join(str(known or error).split()) or type(error).__name__
        raise ImageDecodeError(printable(path or str(file)), reason) from error


def _open_image(file: BinaryIO, name: str) -> Image.Image:
    """Does what PIL.Image.open does, without its limit of pixels.

    That limit is a global of Pillow: to change it would change it for the whole program.

    Args:
      file: at its start.
      name: of the file, if it has one: uncompressed pixels are then read as a memory map.
    """
    Image.preinit()  # the common formats first
    Image.init()
    prefix, notes = file.read(16), []
    if not prefix:
        raise ValueError("the file is empty")
    for has_test in (True, False):  # formats that do not test the prefix take longer
        for format_name in tuple(Image.ID):
            factory, accept = Image.OPEN[format_name]
            if (accept is not None) != has_test:
                continue
            # Of files of a few bytes, some tests of the prefix fail too.
            with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):
                accepted = accept(prefix) if accept else True
                if isinstance(accepted, str):  # why this Pillow cannot read the format
                    notes.append(accepted)
                elif accepted:
                    file.seek(0)
                    return factory(file, name)
    raise ValueError("; ".join(["not an image of a known format", *notes]))


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(
            f"{width} x {height} pixels are more than max_pixels={max_pixels}; to read it, give "
            f"max_pixels={width * height} (--config.data.max_pixels, or --max_pixels)"
        )


def _to_array(image: Image.Image) -> np.ndarray:
    """An RGB image as (h, w, 3) uint8.

    NumPy takes all bytes of an image at once, and copies them. In strips, a large one takes a third
    of the time and half of the memory.
    """
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // width)
    if height <= rows:
        return np.array(image)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(height, top + rows)))
        pixels[top : top + rows] = np.asarray(strip)
    return pixels


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
