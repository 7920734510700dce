"""Random masks for the training of stage 2.

HMAR (arXiv 2506.04421, section 3.3) follows MaskGIT (arXiv 2202.04200, section 3.1): sample a mask
ratio, then mask that share of the positions of every scale.

Letters: B images, L tokens, scale k has l_k tokens.
"""

import jax
import jax.numpy as jnp

from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.errors import InputError

RATIOS = ("uniform", "cosine")


def ranks(values) -> jax.Array:
    """Ranks along the last axis: (..., l) -> (..., l) int32, 0 for the smallest value.

    Of equal values, the first has the lower rank.
    """
    return jnp.argsort(jnp.argsort(values, axis=-1), axis=-1)


def sample_mask_ratios(rng: jax.Array, count: int, kind: str) -> jax.Array:
    """Samples mask ratios.

    Args:
      kind: "uniform", as published, or "cosine", MaskGIT's: cos(pi/2 u), more often near 1.

    Returns:
      (count,) float32 in (0, 1].

    Raises:
      InputError: unknown kind.
    """
    u = jax.random.uniform(rng, (count,))  # in [0, 1)
    if kind == "uniform":
        return 1 - u
    if kind == "cosine":
        return jnp.cos(jnp.pi / 2 * u)
    raise InputError(f"mask_ratios must be one of {', '.join(RATIOS)}; got {kind!r}")


def sample_masks(rng: jax.Array, scales: ScaleList, ratios) -> jax.Array:
    """Masks ceil(ratio l_k) random positions of each scale after the first, which is never masked.

    Args:
      ratios: (B,) in (0, 1].

    Returns:
      (B, L - l_0) bool, True where masked.
    """
    masks = []
    for k in range(1, scales.num_scales):
        length = scales.lengths[k]
        noise = jax.random.uniform(jax.random.fold_in(rng, k), (ratios.shape[0], length))
        masks.append(ranks(noise) < jnp.ceil(ratios * length)[:, None])
    return jnp.concatenate(masks, 1)
