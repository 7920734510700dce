"""Masks over images, for editing: boxes, resizing, filling and compositing. Arithmetic on pixels.

Letters: B images, h w sides of an image in pixels.
"""

import dataclasses

import numpy as np

from hmar_jax.errors import InputError
from hmar_jax.settings import Settings, setting


@dataclasses.dataclass(frozen=True)
class CompositeConfig(Settings):
    """How new content and the old image are put together."""

    paste: bool = setting(
        True, "Return the pixels outside the mask unchanged, in place of the decoder's."
    )
    feather: float | None = setting(
        None,
        "With paste: pixels inside the mask's border over which new content blends into what is "
        "there. Default: 0 for an image of the model's size; otherwise the width of two pixels of "
        "the model.",
        at_least=0,
    )


def box_mask(box: tuple[int, int, int, int], height: int, width: int) -> np.ndarray:
    """A rectangle as a mask.

    Args:
      box: x0, y0, x1, y1 in pixels; x1 and y1 are the first outside.

    Returns:
      (height, width) bool, True inside.

    Raises:
      InputError: the box is empty, or not inside the image.
    """
    x0, y0, x1, y1 = box
    text = ",".join(map(str, box))
    if x0 >= x1 or y0 >= y1:
        raise InputError(f"box x0,y0,x1,y1 must have x0 < x1 and y0 < y1; got {text}")
    if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
        raise InputError(
            f"box must lie inside the image, {width} x {height} pixels (0,0,{width},{height}); "
            f"got {text}"
        )
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def resize_mask(mask: np.ndarray, side: int) -> np.ndarray:
    """(B, h, w) bool -> (B, side, side) bool: True where any part of a cell is in the mask."""
    for axis in (1, 2):
        n = mask.shape[axis]
        cells = [(i * n // side, -((-(i + 1) * n) // side)) for i in range(side)]
        mask = np.stack([mask.take(range(*cell), axis).any(axis) for cell in cells], axis)
    return mask


def fill_masked(images: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Images whose masked pixels have the mean colour of the rest; grey where there is no rest.

    So nothing of the masked content reaches the latents that are kept: cells at the border depend
    on their neighbours.

    Args:
      images: (B, h, w, 3) in [0, 1].
      mask: (B, h, w) bool.
    """
    rest = ~mask[..., None]
    count = rest.sum((1, 2), keepdims=True)
    mean = np.where(count, (images * rest).sum((1, 2), keepdims=True) / np.maximum(count, 1), 0.5)
    return np.where(rest, images, mean).astype(images.dtype)


def composite(
    images: np.ndarray, generated: np.ndarray, mask: np.ndarray, feather: float = 0
) -> np.ndarray:
    """Puts new content into images; pixels outside the mask come back bit for bit.

    Args:
      images, generated: (B, h, w, 3) float32.
      mask: (B, h, w) bool.
      feather: pixels, measured from the mask's border inwards, over which both are mixed.

    Returns:
      (B, h, w, 3) float32.
    """
    share = mask.astype(np.float32)
    if feather:
        from scipy import ndimage  # not needed for the options of the command line

        # The image's own border is no border of the mask: beyond it there is nothing to mix with.
        inside = [
            np.full(m.shape, np.inf) if m.all() else ndimage.distance_transform_edt(m) for m in mask
        ]
        share = np.minimum(np.stack(inside) / (feather + 1), 1).astype(np.float32)
    share = share[..., None]
    mixed = images + share * (generated - images)
    return np.where(share == 0, images, np.where(share == 1, generated, mixed))
