"""Operations on logits before sampling: guidance, top-k, top-p, and mixtures of tokens.

Letters: V codebook entries.
"""

import jax
import jax.numpy as jnp


def guide(conditional, unconditional, t):
    """Classifier-free guidance: (1 + t) conditional - t unconditional.

    Args:
      conditional, unconditional: logits (..., V).
      t: scalar guidance strength; 0: none.
    """
    return (1 + t) * conditional - t * unconditional


def top_k(logits, k: int):
    """Sets all but the k largest logits to -inf; ties with the k-th stay.

    Args:
      logits: (..., V).
      k: 0, or at least V: all stay.
    """
    if not 0 < k < logits.shape[-1]:
        return logits
    smallest = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < smallest, -jnp.inf, logits)


def top_p(logits, p):
    """Keeps the most likely entries, whose probabilities sum to p; sets the others to -inf.

    Sorted by ascending probability, an entry is removed where the cumulative probability up to and
    including it is at most 1 - p. The most likely entry always stays.

    Args:
      logits: (..., V).
      p: scalar in (0, 1]; 1: all stay.
    """
    order = jnp.argsort(logits, axis=-1)
    ascending = jnp.take_along_axis(logits, order, -1)
    removed = jnp.cumsum(jax.nn.softmax(ascending), axis=-1) <= 1 - p
    removed = removed.at[..., -1].set(False)
    kept = jnp.where(removed, -jnp.inf, ascending)
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), -1)


def smooth_weights(logits, noise, ratio: float):
    """Weights of a mixture of entries: many entries at the first scale, nearly one at the last.

    softmax(((1 + r) logits + noise) / tau), tau = max(0.27 (1 - 0.95 r), 0.005). This is the option
    more_smooth of VAR's published code, which arXiv 2404.02905 does not describe. The images are
    smoother, but not samples of the model: do not evaluate them.

    Args:
      logits: (..., V); the weight of -inf is 0.
      noise: (..., V) standard Gumbel.
      ratio: r = k / (K - 1), of scale k of K.

    Returns:
      (..., V), sums to 1.
    """
    tau = max(0.27 * (1 - 0.95 * ratio), 0.005)
    return jax.nn.softmax(((1 + ratio) * logits + noise) / tau)
