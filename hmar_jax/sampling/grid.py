"""Pictures side by side, with a label beside each row."""

from typing import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GAP = 2  # pixels between pictures
_MIN_SIDE = 48  # smaller pictures are enlarged by a whole factor, so that they can be seen


def draw(images: np.ndarray, columns: int, labels: Sequence[str] = ()) -> Image.Image:
    """A grid of pictures, row by row.

    Args:
      images: (B, h, w, 3) float in [0, 1].
      columns: pictures in a row.
      labels: one a row, written at its left.

    Returns:
      A PIL picture.
    """
    factor = max(1, -(-_MIN_SIDE // images.shape[1]))
    pixels = (np.asarray(images, np.float32).clip(0, 1) * 255).round().astype(np.uint8)
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    _, height, width, _ = pixels.shape
    rows = -(-len(pixels) // columns)
    font = ImageFont.load_default(size=max(10, min(height // 3, 16)))
    margin = max((round(font.getlength(label)) for label in labels), default=-_GAP) + 4 * _GAP if labels else _GAP
    canvas = Image.new("RGB", (margin + columns * (width + _GAP), _GAP + rows * (height + _GAP)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, picture in enumerate(pixels):
        canvas.paste(Image.fromarray(picture), (margin + i % columns * (width + _GAP), _GAP + i // columns * (height + _GAP)))
    for row, label in enumerate(labels):
        pen.text((margin - 2 * _GAP, _GAP + row * (height + _GAP) + height // 2), label, "black", font, anchor="rm")
    return canvas
