"""Images: files, and grids of images with labels."""

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from hmar_jax.errors import InputError
from hmar_jax.io import labels as label_text
from hmar_jax.io.files import write_atomically

# Endings of file names, and PIL's names of the formats.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
}
_MAX_SIDES = {"JPEG": 65535, "WEBP": 16383}  # pixels, of the formats

_GAP = 2  # pixels between images
_MAX_LABEL_SIZES = 16  # of the font's size: the width beyond which labels are cut
_MIN_SIDE = 48  # smaller images are enlarged by an integer factor in grids


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Pixels as uint8; floating-point ones, of which 1 is white, are clipped and rounded."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    return (images.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)


def encode_image(image: Image.Image | np.ndarray, kind: str = "PNG") -> bytes:
    """An image as the bytes of a file.

    Args:
      image: a PIL image, or (h, w, 3): uint8, or floating-point in [0, 1].
      kind: "PNG" and "WEBP" are lossless, "JPEG" is of high quality.

    Raises:
      InputError: the image is larger than files of this kind can be.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(to_uint8(image))
    limit = _MAX_SIDES.get(kind)
    if limit and max(image.size) > limit:
        raise InputError(
            f"sides of {kind} images must be at most {limit:,} pixels; got {image.width:,} x "
            f"{image.height:,}; write a .png file"
        )
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **_SAVE_OPTIONS.get(kind, {}))
    return buffer.getvalue()


def save_image(path: os.PathLike | str, image: Image.Image | np.ndarray) -> None:
    """Writes an image file, which a reader sees complete or not at all.

    Args:
      path: local, or gs://. Its ending decides the format, see FORMATS; PNG without one of these.
      image: as `encode_image` takes it.

    Raises:
      InputError: the image is too large for the format.
      OSError: it cannot be written.
    """
    ending = os.path.splitext(os.fspath(path))[1].lower()
    write_atomically(path, encode_image(image, FORMATS.get(ending, "PNG")))


def make_grid(
    images: np.ndarray,
    columns: int,
    labels: Sequence[str] = (),
    titles: Sequence[str] = (),
    substitutes: Sequence[str] = (),
) -> Image.Image:
    """Arranges images in a grid, row by row.

    Args:
      images: (B, h, w, 3), uint8 or floating-point in [0, 1].
      columns: images per row.
      labels: one per row, at its left. Long ones are cut in the middle.
      titles: written over groups of columns of equal size, which stand a little apart.
      substitutes: one per row, written in place of a label of a script that the font lacks, such as
        the class id.

    Returns:
      A PIL image.
    """
    factor = max(1, -(-_MIN_SIDE // images.shape[1]))
    pixels = to_uint8(images).repeat(factor, axis=1).repeat(factor, axis=2)
    _, height, width, _ = pixels.shape
    rows, group_size = -(-len(pixels) // columns), columns // max(len(titles), 1)
    font_size = max(10, min(height // 3, 16))
    font = label_text.load_font(font_size)
    widest = max(_MAX_LABEL_SIZES * font_size, 2 * width)
    others = substitutes or [None] * len(labels)
    labels = [
        label_text.fit(label_text.printable(text, font, other), font, widest)
        for text, other in zip(labels, others, strict=True)
    ]
    titles = [label_text.printable(text, font) for text in titles]
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
