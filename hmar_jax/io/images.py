"""Images: files, and grids of images with labels."""

import collections
import contextlib
import dataclasses
import functools
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


def encode_image(
    image: Image.Image | np.ndarray, kind: str = "PNG", profile: bytes | None = None
) -> bytes:
    """An image as the bytes of a file.

    Args:
      image: a PIL image, or (h, w, 3): uint8, or floating-point in [0, 1].
      kind: "PNG" and "WEBP" are lossless, "JPEG" is of high quality.
      profile: the ICC profile that says which colours the values stand for; None: sRGB's.

    Raises:
      InputError: the image is larger than files of this kind can be.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(to_uint8(image))
    _check_sides(kind, *image.size)
    buffer = io.BytesIO()
    image.save(buffer, format=kind, icc_profile=profile, **_SAVE_OPTIONS.get(kind, {}))
    return buffer.getvalue()


def _check_sides(kind: str, width: int, height: int) -> None:
    limit = _MAX_SIDES.get(kind)
    if limit and max(width, height) > limit:
        raise InputError(
            f"sides of {kind} images must be at most {limit:,} pixels; got {width:,} x "
            f"{height:,}; write a .png file"
        )


def _kind(path: os.PathLike | str) -> str:
    return FORMATS.get(os.path.splitext(os.fspath(path))[1].lower(), "PNG")


def check_size(path: os.PathLike | str, height: int, width: int) -> None:
    """Raises InputError if a file of this name cannot hold an image of this size."""
    _check_sides(_kind(path), width, height)


def is_lossy(path: os.PathLike | str) -> bool:
    """Whether pixels change when they are saved to a file of this name."""
    return _kind(path) == "JPEG"


def save_image(
    path: os.PathLike | str, image: Image.Image | np.ndarray, profile: bytes | None = None
) -> None:
    """Writes an image file, which a reader sees complete or not at all.

    Args:
      path: local, or gs://. Its ending decides the format, see FORMATS; PNG without one of these.
      image, profile: as `encode_image` takes them.

    Raises:
      InputError: the image is too large for the format.
      OSError: it cannot be written.
    """
    write_atomically(path, encode_image(image, _kind(path), profile))


def save_numbered(
    directory: os.PathLike | str, images: np.ndarray, stems: Sequence[str]
) -> list[str]:
    """Writes each image to a PNG file of its own, numbered among those of the same stem.

    If one cannot be written, none stays.

    Args:
      directory: local, new or empty.
      images: (B, h, w, 3), uint8 or floating-point in [0, 1].
      stems: B beginnings of names, such as "3_cat".

    Returns:
      The names: 3_cat_00.png, 3_cat_01.png, ...

    Raises:
      OSError: a file cannot be written.
    """
    digits = max(2, len(str(max(collections.Counter(stems).values()) - 1)))
    names, counts = [], collections.Counter[str]()
    for stem in stems:
        names.append(f"{stem}_{counts[stem]:0{digits}d}.png")
        counts[stem] += 1
    os.makedirs(directory, exist_ok=True)
    try:
        for name, image in zip(names, images, strict=True):
            save_image(os.path.join(directory, name), image)
    except BaseException:
        for name in names:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(directory, name))
        raise
    return names


@dataclasses.dataclass(frozen=True)
class GridLayout:
    """Where the images and texts of a grid stand; all lengths in pixels.

    Args:
      count: of images.
      side: (h, w) of each.
      columns: images per row.
      labels: one per row, at its left. Long ones are cut in the middle.
      titles: written over groups of columns of equal size, which stand a little apart.
      substitutes: one per row, written in place of a label of a script that the font lacks, such as
        the class id.
    """

    count: int
    side: tuple[int, int]
    columns: int
    labels: Sequence[str] = ()
    titles: Sequence[str] = ()
    substitutes: Sequence[str] = ()

    @property
    def factor(self) -> int:
        """By which the images are enlarged."""
        return max(1, -(-_MIN_SIDE // self.side[0]))

    @property
    def shown(self) -> tuple[int, int]:
        """(height, width) of an image in the grid."""
        return self.side[0] * self.factor, self.side[1] * self.factor

    @functools.cached_property
    def font(self) -> Any:
        return label_text.load_font(max(10, min(self.shown[0] // 3, 16)))

    @functools.cached_property
    def row_texts(self) -> list[str]:
        """The labels as they are written."""
        widest = max(_MAX_LABEL_SIZES * self.font.size, 2 * self.shown[1])
        others = self.substitutes or [None] * len(self.labels)
        return [
            label_text.fit(label_text.printable(text, self.font, other), self.font, widest)
            for text, other in zip(self.labels, others, strict=True)
        ]

    @functools.cached_property
    def column_texts(self) -> list[str]:
        """The titles as they are written."""
        return [label_text.printable(text, self.font) for text in self.titles]

    @functools.cached_property
    def left(self) -> int:
        """Where the first column begins."""
        widths = map(self.font.getlength, self.row_texts)
        return round(max(widths)) + 4 * _GAP if self.labels else _GAP

    @property
    def top(self) -> int:
        """Where the first row begins."""
        return round(self.font.size * 1.4) + _GAP if self.titles else _GAP

    @functools.cached_property
    def _title_width(self) -> int:
        return round(max(map(self.font.getlength, self.column_texts), default=0)) + 2 * _GAP

    def x_of(self, column: int) -> int:
        """Groups of columns stand apart, and are at least as wide as their titles."""
        width, group_size = self.shown[1] + _GAP, self.columns // max(len(self.titles), 1)
        group = max(group_size * width + 2 * _GAP * (len(self.titles) > 1), self._title_width)
        return self.left + column // group_size * group + column % group_size * width

    def y_of(self, row: int) -> int:
        return self.top + row * (self.shown[0] + _GAP)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the whole grid."""
        right = self.x_of(self.columns - 1) + self.shown[1] + _GAP
        right = max(right, self.left + len(self.titles) * self._title_width)
        return right, self.y_of(-(-self.count // self.columns))

    def check_file(self, path: os.PathLike | str) -> None:
        """Raises InputError if a file of this name cannot hold so large an image."""
        _check_sides(_kind(path), *self.size)


def make_grid(
    images: np.ndarray,
    columns: int,
    labels: Sequence[str] = (),
    titles: Sequence[str] = (),
    substitutes: Sequence[str] = (),
) -> Image.Image:
    """Arranges images (B, h, w, 3), uint8 or floating-point in [0, 1], in a grid, row by row.

    Args:
      columns, labels, titles, substitutes: see GridLayout.

    Returns:
      A PIL image.
    """
    layout = GridLayout(len(images), images.shape[1:3], columns, labels, titles, substitutes)
    return draw_grid(layout, images)


def draw_grid(layout: GridLayout, images: np.ndarray) -> Image.Image:
    """As make_grid, with a layout that was made before."""
    canvas = Image.new("RGB", layout.size, "white")
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(to_uint8(images)):
        shown = Image.fromarray(image.repeat(layout.factor, axis=0).repeat(layout.factor, axis=1))
        canvas.paste(shown, (layout.x_of(i % layout.columns), layout.y_of(i // layout.columns)))
    for row, text in enumerate(layout.row_texts):
        place = (layout.left - 2 * _GAP, layout.y_of(row) + layout.shown[0] // 2)
        draw.text(place, text, "black", layout.font, anchor="rm")
    for i, text in enumerate(layout.column_texts):
        column = i * (layout.columns // len(layout.titles))
        place = (layout.x_of(column), layout.top - 2 * _GAP)
        draw.text(place, text, "black", layout.font, anchor="ls")
    return canvas


def resize_image(image: np.ndarray, side: int) -> np.ndarray:
    """(h, w, 3) float in [0, 1] -> (side, side, 3), by Lanczos, each channel in full precision."""
    return resize_to(image, side, side).clip(0, 1)


def resize_to(
    values: np.ndarray,
    height: int,
    width: int,
    method: Image.Resampling = Image.Resampling.LANCZOS,
) -> np.ndarray:
    """(h, w, C) float of any range -> (height, width, C) float32, each channel by itself."""
    channels = [
        Image.fromarray(values[..., c].astype(np.float32)).resize((width, height), method)
        for c in range(values.shape[-1])
    ]
    return np.stack([np.asarray(c) for c in channels], -1)
