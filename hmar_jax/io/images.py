"""Images: PNG files, and grids of images with labels."""

import io
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hmar_jax.io.files import write_atomically

_GAP = 2  # pixels between images
_MIN_SIDE = 48  # smaller images are enlarged by an integer factor in grids


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Pixels as uint8; floating-point ones, of which 1 is white, are clipped and rounded."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    return (images.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)


def encode_png(image: Image.Image | np.ndarray) -> bytes:
    """An image as the bytes of a PNG file.

    Args:
      image: a PIL image, or (h, w, 3): uint8, or floating-point in [0, 1].
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(to_uint8(image))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def save_image(path: os.PathLike | str, image: Image.Image | np.ndarray) -> None:
    """Writes a PNG file, which a reader sees complete or not at all.

    Args:
      path: local, or gs://.
      image: as `encode_png` takes it.

    Raises:
      OSError: it cannot be written.
    """
    write_atomically(path, encode_png(image))


def make_grid(
    images: np.ndarray, columns: int, labels: Sequence[str] = (), titles: Sequence[str] = ()
) -> Image.Image:
    """Arranges images in a grid, row by row.

    Args:
      images: (B, h, w, 3), uint8 or floating-point in [0, 1].
      columns: images per row.
      labels: one per row, at its left.
      titles: written over groups of columns of equal size, which stand a little apart.

    Returns:
      A PIL image.
    """
    factor = max(1, -(-_MIN_SIDE // images.shape[1]))
    pixels = to_uint8(images).repeat(factor, axis=1).repeat(factor, axis=2)
    _, height, width, _ = pixels.shape
    rows, group_size = -(-len(pixels) // columns), columns // max(len(titles), 1)
    font_size = max(10, min(height // 3, 16))
    font = ImageFont.load_default(size=font_size)
    left = round(max(map(font.getlength, labels))) + 4 * _GAP if labels else _GAP
    top = round(font_size * 1.4) + _GAP if titles else _GAP
    # Groups of columns stand apart, and are at least as wide as their titles.
    title_width = round(max(map(font.getlength, titles), default=0)) + 2 * _GAP
    group = max(group_size * (width + _GAP) + 2 * _GAP * (len(titles) > 1), title_width)
    x_of = lambda column: left + column // group_size * group + column % group_size * (width + _GAP)
    right = max(x_of(columns - 1) + width + _GAP, left + len(titles) * title_width)
    canvas = Image.new("RGB", (right, top + rows * (height + _GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(pixels):
        y = top + i // columns * (height + _GAP)
        canvas.paste(Image.fromarray(image), (x_of(i % columns), y))
    for row, label in enumerate(labels):
        y = top + row * (height + _GAP) + height // 2
        draw.text((left - 2 * _GAP, y), label, "black", font, anchor="rm")
    for i, title in enumerate(titles):
        draw.text((x_of(i * group_size), top - 2 * _GAP), title, "black", font, anchor="ls")
    return canvas


def resize_image(image: np.ndarray, side: int) -> np.ndarray:
    """(h, w, 3) float in [0, 1] -> (side, side, 3), by Lanczos, each channel in full precision."""
    size, method = (side, side), Image.Resampling.LANCZOS
    channels = [
        Image.fromarray(image[..., c].astype(np.float32)).resize(size, method) for c in range(3)
    ]
    return np.stack([np.asarray(c) for c in channels], -1).clip(0, 1)
