"""Editing without training: which tokens of a image stay, what the tokenizer sees of it, and how the parts are joined.

The paper shows editing (arXiv 2506.04421) and does not say how; this is MaskGIT's way (arXiv 2202.04200): sampling in which some
tokens are known. All of this is arithmetic on pixels, on the host.

Letters: B images, h w sides of a image in pixels, K scales with s_k x s_k tokens, L tokens.
"""

import numpy as np
from scipy import ndimage

from hmar_jax.autoencoders.scales import ScaleList, area_matrix
from hmar_jax.errors import InputError

COARSE_TOKENS = 4  # scales of at most so many tokens hold the layout of the whole image, and can be kept as a whole


def box_mask(box, height: int, width: int) -> np.ndarray:
    """A rectangle as a mask.

    Args:
      box: x0, y0, x1, y1 in pixels; x1 and y1 are the first that are outside.

    Returns:
      (height, width) bool, True inside.

    Raises:
      InputError: the box is empty, or not inside the image.
    """
    x0, y0, x1, y1 = box
    text = ",".join(map(str, box))
    if x0 >= x1 or y0 >= y1:
        raise InputError(f"box {text} is empty: x0,y0,x1,y1 with x0 < x1 and y0 < y1 is wanted")
    if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
        raise InputError(
            f"box {text} is not inside the image, which is {width} x {height} pixels: 0,0,{width},{height} is all of it"
        )
    hole = np.zeros((height, width), bool)
    hole[y0:y1, x0:x1] = True
    return hole


def resize_mask(hole: np.ndarray, side: int) -> np.ndarray:
    """(B, h, w) bool -> (B, side, side): True where any part of a pixel is in the hole."""
    rows, columns = (area_matrix(n, side) for n in hole.shape[1:])
    return np.einsum("th,bhw,uw->btu", rows, hole.astype(np.float32), columns) > 0


def kept_tokens(
    scales: ScaleList, hole: np.ndarray, *, ring: int = 0, keep_coarse: bool = False
) -> np.ndarray:
    """Which tokens of a image stay: those whose whole cell does.

    Args:
      hole: (B, h, w) bool, True where new content goes.
      ring: cells around the hole, at every scale, that are given up too: what the tokenizer makes of a cell depends on
        its neighbours.
      keep_coarse: keep the scales of at most COARSE_TOKENS tokens whatever the hole.

    Returns:
      (B, L) bool, True where the token is kept.
    """
    keep = []
    for side, length in zip(scales.sides, scales.lengths):
        touched = resize_mask(hole, side)
        if ring:
            touched = ndimage.binary_dilation(touched, np.ones((1, 2 * ring + 1, 2 * ring + 1)))
        if keep_coarse and length <= COARSE_TOKENS:
            touched = np.zeros_like(touched)
        keep.append(~touched.reshape(len(hole), length))
    return np.concatenate(keep, 1)


def hide(images: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Images (B, h, w, 3) in [0, 1] whose hole has the mean colour of the rest (grey where there is no rest).

    So nothing of what was there reaches the tokens that are kept: cells at the border leak into their neighbours.
    """
    rest = ~hole[..., None]
    count = rest.sum((1, 2), keepdims=True)
    mean = np.where(count, (images * rest).sum((1, 2), keepdims=True) / np.maximum(count, 1), 0.5)
    return np.where(rest, images, mean).astype(images.dtype)


def join(
    images: np.ndarray, generated: np.ndarray, hole: np.ndarray, feather: float = 0
) -> np.ndarray:
    """Puts the new content into the images: pixels outside the hole come back bit by bit.

    Args:
      images, generated: (B, h, w, 3) float32.
      hole: (B, h, w) bool.
      feather: pixels, measured from the hole's border inwards, over which one passes into the other.

    Returns:
      (B, h, w, 3) float32.
    """
    share = hole.astype(np.float32)
    if feather:
        # The image's own border is no border of the hole: beyond it there is nothing to pass into.
        inside = np.stack(
            [
                ndimage.distance_transform_edt(h) if not h.all() else np.full(h.shape, np.inf)
                for h in hole
            ]
        )
        share = np.minimum(inside / (feather + 1), 1).astype(np.float32)
    mixed = images + share[..., None] * (generated - images)
    return np.where(
        share[..., None] == 0, images, np.where(share[..., None] == 1, generated, mixed)
    )
