"""Editing without training: which tokens of an image are kept.

The paper (arXiv 2506.04421) shows editing and does not say how. This is MaskGIT's way (arXiv
2202.04200): sampling in which some tokens are known.

Letters: B images, h w sides of an image in pixels, K scales with s_k x s_k tokens, L tokens.
"""

import numpy as np
from scipy import ndimage

from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.io.masks import resize_mask

# Scales of at most so many tokens hold the layout of the whole image, and can be kept as a whole.
COARSE_TOKENS = 4


def kept_tokens(
    scales: ScaleList, mask: np.ndarray, *, dilation: int = 0, keep_coarse: bool = False
) -> np.ndarray:
    """Tokens whose whole cell lies outside the mask.

    Args:
      mask: (B, h, w) bool, True where new content goes.
      dilation: cells around the mask, at every scale, that are not kept either: what the tokenizer
        makes of a cell depends on its neighbours.
      keep_coarse: keep the scales of at most COARSE_TOKENS tokens whatever the mask.

    Returns:
      (B, L) bool, True where the token is kept.
    """
    kept = []
    for side, length in zip(scales.sides, scales.lengths):
        touched = resize_mask(mask, side)
        if dilation:
            reach = 2 * dilation + 1
            touched = ndimage.binary_dilation(touched, np.ones((1, reach, reach)))
        if keep_coarse and length <= COARSE_TOKENS:
            touched = np.zeros_like(touched)
        kept.append(~touched.reshape(len(mask), length))
    return np.concatenate(kept, 1)
