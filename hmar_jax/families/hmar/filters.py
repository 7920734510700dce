"""From logits to what may be sampled: guidance, top-k, top-p, and mixtures of tokens.

Letters: B images, l tokens, V codebook entries.
"""

import jax
import jax.numpy as jnp


def guide(conditional, unconditional, t):
    """Classifier-free guidance: (1 + t) conditional - t unconditional; logits (..., V), t scalar."""
    return (1 + t) * conditional - t * unconditional


def top_k(logits, k: int):
    """Keeps the k largest logits of (..., V) and ties of the k-th; the others become -inf.

    k of 0, or of V and more, keeps all.
    """
    if not 0 < k < logits.shape[-1]:
        return logits
    smallest = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < smallest, -jnp.inf, logits)


def top_p(logits, p):
    """Keeps the likeliest entries of (..., V) that together reach probability p; the others become -inf.

    Sorted ascending, an entry is removed where the probability up to and including it is at most
    1 - p; the likeliest always stays. p is a scalar in (0, 1]; 1 keeps all.
    """
    order = jnp.argsort(logits, axis=-1)
    ascending = jnp.take_along_axis(logits, order, -1)
    removed = jnp.cumsum(jax.nn.softmax(ascending), axis=-1) <= 1 - p
    removed = removed.at[..., -1].set(False)
    kept = jnp.where(removed, -jnp.inf, ascending)
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), -1)


def smooth_weights(logits, noise, ratio: float):
    """The weights of a mixture of entries: nearly one at the last scale, many at the first.

    softmax(((1 + r) logits + noise) / tau), tau = max(0.27 (1 - 0.95 r), 0.005). This is VAR's
    "more_smooth" (its published code; arXiv 2404.02905 does not name it), for images to look at,
    not to measure.

    Args:
      logits: (..., V); entries of -inf get nothing.
      noise: (..., V) standard Gumbel.
      ratio: r = k / (K - 1).

    Returns:
      (..., V), sums to 1.
    """
    tau = max(0.27 * (1 - 0.95 * ratio), 0.005)
    return jax.nn.softmax(((1 + ratio) * logits + noise) / tau)
