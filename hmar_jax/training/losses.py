"""Cross-entropy over scales and its weightings.

HMAR (arXiv 2506.04421, section 3.2, "loss weighting"); the numbers are those of the published code. Letters: B pictures, L
tokens, V codebook entries, K scales with l_k tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hmar_jax.errors import InputError
from hmar_jax.scales import ScaleList

WEIGHTINGS = ("lognorm", "equal", "plain")


def position_weights(scales: ScaleList, kind: str) -> np.ndarray:
    """(L,) float64: the weight of each position in the loss.

    Args:
      kind: "lognorm", HMAR's: a normal density over the reversed, standardised scale ratios, normalised over the scales
        and shared equally inside a scale. "equal": 1 / l_k, so every scale counts alike; sums to K, not 1. "plain": 1 / L,
        VAR's.

    Raises:
      InputError: unknown kind.
    """
    lengths = np.array(scales.lengths, np.float64)
    if kind == "plain":
        per_position = np.full(scales.num_scales, 1 / scales.length)
    elif kind == "equal":
        per_position = 1 / lengths
    elif kind == "lognorm":
        ratios = np.array(scales.sides) / scales.side
        deviation = ratios.std(ddof=1) if scales.num_scales > 1 else 1.0
        density = np.exp(-0.5 * ((ratios[::-1] - ratios.mean()) / deviation) ** 2)
        per_position = density / density.sum() / lengths
    else:
        raise InputError(f"loss_weights={kind!r}: known are {', '.join(WEIGHTINGS)}")
    return np.repeat(per_position, scales.lengths)


def cross_entropy(logits, targets, label_smoothing: float = 0.0):
    """Per position: logits (..., V), targets (...) int -> (...) float32."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    loss = -jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_probs.mean(-1)
    return loss


def per_scale(scales: ScaleList, values) -> jax.Array:
    """Means over pictures and the positions of each scale: (B, L) -> (K,)."""
    return jnp.stack([values[:, scales.slice(k)].mean() for k in range(scales.num_scales)])
