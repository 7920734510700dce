"""Which tokens are masked while stage 2 trains.

HMAR (arXiv 2506.04421, section 3.3) after MaskGIT (arXiv 2202.04200, section 3.1): a ratio is
sampled, and that share of the positions of every scale is masked.

Letters: B images, L tokens, K scales with l_k tokens.
"""

import jax
import jax.numpy as jnp

from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.errors import InputError

RATIOS = ("uniform", "cosine")


def ranks(values) -> jax.Array:
    """The place of each value among the last axis, sorted ascending: (..., l) -> (..., l) int32."""
    return jnp.argsort(jnp.argsort(values, axis=-1), axis=-1)


def sample_mask_ratios(rng: jax.Array, count: int, kind: str) -> jax.Array:
    """(count,) float32 in (0, 1].

    Args:
      kind: "uniform", as published; "cosine": cos(pi/2 u), MaskGIT's, which is more often near 1.

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
    """ceil(ratio l_k) positions of each scale after the first, which has nothing to mask.

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
