"""Crops around masks, for editing images of any size at their own size. Geometry and pixels.

A model generates squares of one size. Around each masked region a square with context is cut out,
resized to the model's size, edited, resized back, and put into the image: the pixels outside the
mask are never touched.

Letters: B images, h w sides of an image in pixels, N crops, n regions.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from hmar_jax.io import masks
from hmar_jax.io.images import resize_image, resize_to
from hmar_jax.settings import Settings, setting

# A crop reaches this far beyond the box of its mask, relative to the box, wherever the image does:
# if need be, beyond the image on the other axis. Without context, new content would fit to nothing.
_LEAST_CONTEXT = 1.25
_SOFT = 2.0  # default of feather, in pixels of the model
_CELLS = 8  # masked pixels that are closer than a model's side / _CELLS belong to one region


@dataclasses.dataclass(frozen=True)
class CropConfig(Settings):
    """How images of another size than the model's are edited."""

    resize: bool = setting(
        False,
        "Resize the image to the model's size, and return it at that size. By default, the region "
        "around the mask is edited and the image keeps its size.",
    )
    context: float = setting(
        2.0,
        "Of an image that keeps its size: side of the square that the model sees, relative to the "
        "longer side of the masked region. It is at least the model's size, and at most the "
        "image's shorter side if the region fits into that.",
        at_least=1,
    )


class Window(NamedTuple):
    """A square of an image; pixels. It may reach beyond the image."""

    top: int
    left: int
    side: int

    def within(self, height: int, width: int) -> tuple[slice, slice]:
        """The rows and columns of the image that it covers."""
        return (
            slice(max(self.top, 0), min(self.top + self.side, height)),
            slice(max(self.left, 0), min(self.left + self.side, width)),
        )

    def slices_of(self, rows: slice, columns: slice) -> tuple[slice, slice]:
        """Rows and columns of the image, counted from the square's corner."""
        return (
            slice(rows.start - self.top, rows.stop - self.top),
            slice(columns.start - self.left, columns.stop - self.left),
        )


@dataclasses.dataclass(frozen=True)
class Crops:
    """The crops of some images, at the model's size.

    Attributes:
      images: (N, side, side, 3) float32; masked pixels, and those beyond the image, are filled.
      masks: (N, side, side) bool, True where new content goes.
      windows: N squares of the original images.
      owner: (N,) the image of each crop; in ascending order.
      number: (N,) which crop of its image it is.
      count: of the images.
    """

    images: np.ndarray
    masks: np.ndarray
    windows: Sequence[Window]
    owner: np.ndarray
    number: np.ndarray
    count: int


def find_windows(mask: np.ndarray, side: int, context: float) -> list[Window]:
    """The squares to edit: one for each masked region, or for several that are close.

    Regions are edited together if the square of one would show a part of another. A square is
    centred on its region and shifted into the image. Its side is `context` times the region's
    longer side, at least `side`, and at most the image's shorter side: unless the region, with a
    little context, is longer. Then the square reaches beyond the image on the shorter axis.

    Args:
      mask: (h, w) bool, True where new content goes. None at all counts as the whole image.
      side: of the model's images.
      context: side of the square relative to the region's longer side, at least 1.

    Returns:
      Squares from top to bottom. Each masked pixel lies in exactly one of them.
    """
    boxes = _region_boxes(mask, max(1, side // _CELLS))
    squares = lambda boxes: _squares(boxes, mask.shape, side, context)
    found = squares(_merge(boxes, squares))
    return sorted(Window(*map(int, square)) for square in found)


def cut_out(images: np.ndarray, mask: np.ndarray, count: int, side: int, context: float) -> Crops:
    """Cuts the squares of `find_windows` out of images and resizes them to the model's size.

    What the mask covers is filled before resizing: nothing of it reaches the crops.

    Args:
      images: (B, h, w, 3) float32 in [0, 1]; B is `count`, or 1 for the same image each time.
      mask: (B, h, w) bool, likewise.
      count: of the results that will be made.
      side, context: see find_windows.
    """
    parts: list[tuple[Window, np.ndarray, np.ndarray]] = []
    crops, owner, number = [], [], []
    for i in range(count):
        if i < max(len(images), len(mask)):  # otherwise the crops of the one before
            image, selected = images[i % len(images)], mask[i % len(mask)]
            windows = find_windows(selected, side, context)
            parts = [(window, *_cut(image, selected, window, side)) for window in windows]
        crops += parts
        owner += [i] * len(parts)
        number += range(len(parts))
    windows, pixels, hidden = zip(*crops)
    return Crops(
        np.stack(pixels), np.stack(hidden), windows, np.array(owner), np.array(number), count
    )


def put_back(
    images: np.ndarray,
    mask: np.ndarray,
    crops: Crops,
    generated: np.ndarray,
    blending: masks.CompositeConfig,
) -> np.ndarray:
    """Puts edited crops into their images; pixels outside the mask come back bit for bit.

    With paste, new content blends into its surroundings inside the mask's border: not into the
    masked content, which is to disappear. By default over the width of two of the model's pixels.

    Args:
      images, mask: as given to cut_out.
      crops: what it returned.
      generated: (N, side, side, 3) float32 in [0, 1].
      blending: without paste, whole crops are replaced, as far as they lie inside the image.

    Returns:
      (count, h, w, 3) float32.
    """
    results = np.array(np.broadcast_to(images, (crops.count, *images.shape[1:])))
    for i, window, content in zip(crops.owner, crops.windows, generated):
        selected = mask[i % len(mask)]
        feather = blending.feather
        if feather is None:
            feather = max(1, _SOFT * window.side / len(content))
        if not blending.paste:
            selected, feather = np.ones_like(selected), 0
        _put(results[i], selected, window, resize_image(content, window.side), feather)
    return results


def _put(
    result: np.ndarray, mask: np.ndarray, window: Window, content: np.ndarray, feather: float
) -> None:
    """Writes content (side, side, 3) into the masked pixels of a square of `result` (h, w, 3)."""
    if feather:
        content = _fit_to_surroundings(result, mask, window, content, feather)
    rows, columns = window.within(*mask.shape)
    inside = mask[rows, columns]
    result[rows, columns][inside] = content[window.slices_of(rows, columns)][inside]


def _fit_to_surroundings(
    image: np.ndarray, mask: np.ndarray, window: Window, content: np.ndarray, feather: float
) -> np.ndarray:
    """Content (side, side, 3) that equals the surroundings at the border of the mask.

    What is missing there to the surroundings is added to it; further in, less.
    """
    # One more pixel on each side: a mask that fills the square ends there.
    wide = Window(window.top - 1, window.left - 1, window.side + 2)
    content = np.pad(content, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows, columns = wide.within(*mask.shape)
    place, inside = wide.slices_of(rows, columns), mask[rows, columns]
    if not inside.all():
        part = content[place]
        fitted = part + _continue_inwards(image[rows, columns] - part, inside)
        mixed = masks.composite(fitted[None], part[None], inside[None], feather)[0]
        content[place] = mixed.clip(0, 1)
    return content[1:-1, 1:-1]


def _region_boxes(mask: np.ndarray, cell: int) -> np.ndarray:
    """(n, 4) int: top, left, bottom, right of the regions of a mask.

    Args:
      cell: pixels; regions of neighbouring cells are one, so that a mask with noise has not
        thousands.
    """
    from scipy import ndimage  # not needed for the options of the command line

    if not mask.any():
        return np.array([[0, 0, *mask.shape]])
    height, width = mask.shape
    padded = np.pad(mask, ((0, -height % cell), (0, -width % cell)))
    rows, columns = padded.shape[0] // cell, padded.shape[1] // cell
    touched = padded.reshape(rows, cell, columns, cell).any((1, 3))
    labels, _ = ndimage.label(touched, np.ones((3, 3)))
    labels = labels.repeat(cell, 0).repeat(cell, 1)[:height, :width]
    found = ndimage.find_objects(np.where(mask, labels, 0))
    return np.array([[y.start, x.start, y.stop, x.stop] for y, x in found])


def _squares(boxes: np.ndarray, shape: tuple[int, ...], side: int, context: float) -> np.ndarray:
    """(n, 3) int: top, left and side of the square around each of the boxes (n, 4)."""
    image, size = np.array(shape), boxes[:, 2:] - boxes[:, :2]
    wanted = np.maximum(np.ceil(context * size.max(1)), side)
    least = np.minimum(np.ceil(min(context, _LEAST_CONTEXT) * size), image).max(1)
    length = np.maximum(np.minimum(wanted, image.min()), least).astype(int)[:, None]
    room = image - length
    start = ((boxes[:, :2] + boxes[:, 2:] - length) // 2).clip(0, room.clip(0))
    start = np.where(room < 0, room // 2, start)
    return np.concatenate([start, length], 1)


def _merge(boxes: np.ndarray, squares: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Joins boxes (n, 4) until the square of none contains a part of another."""
    separate = boxes[:0]
    while len(boxes):
        box, boxes = boxes[:1], boxes[1:]
        others = np.concatenate([separate, boxes])
        meets = _intersect(_box_of(squares(box)), others) | _intersect(
            _box_of(squares(others)), box
        )
        if meets.any():
            joined = np.concatenate([box, others[meets]])
            box = np.concatenate([joined[:, :2].min(0), joined[:, 2:].max(0)])[None]
            separate, boxes = (
                separate[~meets[: len(separate)]],
                np.concatenate([box, boxes[~meets[len(separate) :]]]),
            )
        else:
            separate = np.concatenate([separate, box])
    return separate


def _box_of(squares: np.ndarray) -> np.ndarray:
    return np.concatenate([squares[:, :2], squares[:, :2] + squares[:, 2:]], 1)


def _intersect(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which rows of boxes (n, 4), or (1, 4), share a pixel."""
    return ((a[:, :2] < b[:, 2:]) & (b[:, :2] < a[:, 2:])).all(1)


def _cut(
    image: np.ndarray, mask: np.ndarray, window: Window, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """The pixels (side, side, 3) and the mask (side, side) of a square; the mask covers what lies
    beyond the image, too."""
    rows, columns = window.within(*mask.shape)
    beyond = (
        (rows.start - window.top, window.top + window.side - rows.stop),
        (columns.start - window.left, window.left + window.side - columns.stop),
    )
    hidden = np.pad(mask[rows, columns], beyond, constant_values=True)
    pixels = np.pad(image[rows, columns], (*beyond, (0, 0)))
    filled = masks.fill_masked(pixels[None], hidden[None])[0]
    return resize_image(filled, side), masks.resize_mask(hidden[None], side)[0]


def _continue_inwards(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Fills the masked part of (h, w, C) smoothly from its surroundings.

    Pull-push (Gortler et al., The Lumigraph, 1996): averages of 2 x 2 known pixels, until nothing
    is unknown; from there back, each unknown pixel is interpolated between the coarser ones.

    Args:
      mask: (h, w) bool, True where values are unknown, but not everywhere.
    """
    if not mask.any():
        return values
    height, width = mask.shape
    even = ((0, height % 2), (0, width % 2))
    known = np.pad(~mask, even).astype(np.float32)[..., None]
    known = np.concatenate([np.pad(values, (*even, (0, 0))) * known, known], -1)
    sums = known.reshape(len(known) // 2, 2, known.shape[1] // 2, 2, -1).sum((1, 3))
    coarse = sums[..., :-1] / np.maximum(sums[..., -1:], 1)
    coarse = _continue_inwards(coarse, sums[..., -1] == 0)
    fine = resize_to(coarse, known.shape[0], known.shape[1], Image.Resampling.BILINEAR)
    return np.where(mask[..., None], fine[:height, :width], values)
