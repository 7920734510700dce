"""Images side by side, with a label beside each row."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GAP = 2  # pixels between images
_MIN_SIDE = 48  # smaller images are enlarged by a whole factor, so that they can be seen


def draw(
    images: np.ndarray, columns: int, labels: Sequence[str] = (), titles: Sequence[str] = ()
) -> Image.Image:
    """A grid of images, row by row.

    Args:
      images: (B, h, w, 3) float in [0, 1].
      columns: images in a row.
      labels: one a row, written at its left.
      titles: written over equal shares of the columns, which stand a little apart.

    Returns:
      A PIL image.
    """
    factor = max(1, -(-_MIN_SIDE // images.shape[1]))
    pixels = (np.asarray(images, np.float32).clip(0, 1) * 255).round().astype(np.uint8)
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    _, height, width, _ = pixels.shape
    rows, share = -(-len(pixels) // columns), columns // max(len(titles), 1)
    font = ImageFont.load_default(size=max(10, min(height // 3, 16)))
    left = round(max(map(font.getlength, labels))) + 4 * _GAP if labels else _GAP
    top = round(font.size * 1.4) + _GAP if titles else _GAP
    # Groups of columns stand apart, and are at least as wide as what is written over them.
    title_width = round(max(map(font.getlength, titles), default=0)) + 2 * _GAP
    group = max(share * (width + _GAP) + 2 * _GAP * (len(titles) > 1), title_width)
    x_of = lambda column: left + column // share * group + column % share * (width + _GAP)
    right = max(x_of(columns - 1) + width + _GAP, left + len(titles) * title_width)
    canvas = Image.new("RGB", (right, top + rows * (height + _GAP)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, image in enumerate(pixels):
        canvas.paste(
            Image.fromarray(image), (x_of(i % columns), top + i // columns * (height + _GAP))
        )
    for row, label in enumerate(labels):
        pen.text(
            (left - 2 * _GAP, top + row * (height + _GAP) + height // 2),
            label,
            "black",
            font,
            anchor="rm",
        )
    for i, title in enumerate(titles):
        pen.text((x_of(i * share), top - 2 * _GAP), title, "black", font, anchor="ls")
    return canvas
