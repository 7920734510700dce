"""Editing without training: the tokens of an image that are kept.

The paper (arXiv 2506.04421) shows edited images without a description of the method. This follows
MaskGIT (arXiv 2202.04200): sampling in which some tokens are known.

Letters: B images, h w sides of an image in pixels, L tokens of all scales.
"""

import numpy as np
from scipy import ndimage

from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.io.masks import resize_mask

# Scales of at most this many tokens hold the layout of the whole image; keep_coarse keeps them.
COARSE_TOKENS = 4


def kept_tokens(
    scales: ScaleList, mask: np.ndarray, *, dilation: int = 0, keep_coarse: bool = False
) -> np.ndarray:
    """Selects the tokens whose whole cell lies outside the mask.

    Args:
      mask: (B, h, w) bool, True where new content goes.
      dilation: cells around the mask, at every scale, that are not kept either: the token of a cell
        depends on neighbouring cells.
      keep_coarse: keep all tokens of the scales of at most COARSE_TOKENS tokens.

    Returns:
      (B, L) bool, True where the token is kept.
    """
    kept = []
    for side, length in zip(scales.sides, scales.lengths):
        touched = resize_mask(mask, side)
        if dilation:
            reach = 2 * min(dilation, side) + 1  # further there are no cells
            touched = ndimage.binary_dilation(touched, np.ones((1, reach, reach)))
        if keep_coarse and length <= COARSE_TOKENS:
            touched = np.zeros_like(touched)
        kept.append(~touched.reshape(len(mask), length))
    return np.concatenate(kept, 1)
