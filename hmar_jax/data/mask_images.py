"""Mask images, as paint programs write them, to boolean masks."""

import numpy as np
from PIL import Image

from hmar_jax.data.decoding import MAX_PIXELS, decode
from hmar_jax.errors import InputError

_HALF = 128  # of 255: the darkest gray that counts as white, the least opacity that counts


def read_mask(path: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Reads a mask: white where new content goes, black or transparent where the image stays.

    Gray (1, 8 or 16 bits), palette and colour images are read; lossy compression does no harm. A
    mask whose values are 0 and 1 alone is one of numbers: 1 is white.

    Returns:
      (h, w) bool, True where the mask is white (at least half) and opaque (at least half).

    Raises:
      ImageDecodeError: the image cannot be decoded completely.
    """
    return decode(path, _white_and_opaque, max_pixels=max_pixels)


def read_transparency(path: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image's transparent pixels, also the partly transparent ones at the border of a hole.

    Returns:
      (h, w) bool, True where the image is not opaque.

    Raises:
      InputError: the image has no transparency.
      ImageDecodeError: the image cannot be decoded completely.
    """
    hole = find_transparent(path, max_pixels)
    if not hole.any():
        raise InputError(
            f"image {path} has no transparent pixels (0 of {hole.size:,}), which its own mask must "
            "have"
        )
    return hole


def find_transparent(path: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """(h, w) bool, True where the image is not opaque.

    Raises:
      ImageDecodeError: the image cannot be decoded completely.
    """
    return decode(path, lambda image: _alpha(image) < 255, max_pixels=max_pixels)


def describe_values(path: str, max_pixels: int = MAX_PIXELS) -> str:
    """The least and the largest value of a mask image, for errors."""
    values = decode(path, _gray, max_pixels=max_pixels)
    opacity = decode(path, _alpha, max_pixels=max_pixels)
    seen = values[opacity >= _HALF]
    if not seen.size:
        return "all of it is transparent"
    return f"its values lie in [{seen.min():g}, {seen.max():g}] of 255"


def _white_and_opaque(image: Image.Image) -> np.ndarray:
    return (_gray(image) >= _HALF) & (_alpha(image) >= _HALF)


def _gray(image: Image.Image) -> np.ndarray:
    """(h, w) float in [0, 255]: the mean of the channels, whatever is transparent."""
    if image.mode == "F":
        raise ValueError("floating-point pixels of unknown range; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.array(image).astype(np.float64)
        # Programs also write 8 bits, or 0 and 1, into files of 16.
        white = 65535 if values.max() > 255 else 255
    elif image.mode == "L":
        values, white = np.array(image).astype(np.float64), 255
    elif image.mode == "1":
        values, white = np.array(image).astype(np.float64), 1
    else:
        # Straight to RGB, a palette's transparent entry could change its colour.
        plain = image.convert("RGBA") if image.has_transparency_data else image
        plain = plain.convert("RGB")
        values, white = np.array(plain).astype(np.float64).mean(-1), 255
    if values.max() == 1 and image.format != "JPEG":  # there it is noise
        white = 1
    return values * (255 / white)


def _alpha(image: Image.Image) -> np.ndarray:
    """(h, w) opacity, uint8."""
    if image.has_transparency_data and not image.mode.startswith("I"):
        return np.array(image.convert("RGBA").getchannel("A"))
    return np.full((image.height, image.width), 255, np.uint8)
