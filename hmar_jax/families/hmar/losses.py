"""Cross-entropy over scales, and weights of positions in the loss.

HMAR (arXiv 2506.04421, section 3.2, "loss weighting"), with the constants of the published code.

Letters: B images, L tokens, V codebook entries, K scales with l_k tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.errors import InputError

WEIGHTINGS = ("lognorm", "equal", "plain")
_SHIFTED = "_published"
MASKED_WEIGHTINGS = ("unweighted", "lognorm", "equal", "lognorm" + _SHIFTED, "equal" + _SHIFTED)


def position_weights(scales: ScaleList, kind: str) -> np.ndarray:
    """The weight of each position in the loss.

    Args:
      kind: "lognorm", HMAR's: a normal density of the scale ratios, standardized and in reverse
        order, normalized over the scales and divided equally inside a scale. "equal": 1 / l_k, so
        that every scale counts alike; sums to K, not 1. "plain", VAR's: 1 / L.

    Returns:
      (L,) float64.

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
        raise InputError(f"loss_weights must be one of {', '.join(WEIGHTINGS)}; got {kind!r}")
    return np.repeat(per_position, scales.lengths)


def masked_weights(scales: ScaleList, kind: str, is_masked) -> jax.Array:
    """The weight of each position in the loss of masked prediction: 0 where it is not masked.

    Args:
      kind: "unweighted", the published default: the mean over an image's masked positions.
        "lognorm", "equal": position_weights of the masked positions, normalized to sum to 1 for
        each image. "lognorm_published", "equal_published": as in the published code, where each
        position has the weight of the one l_0 places before it, without normalization.
      is_masked: (B, L - l_0) bool, positions after the first scale, which is never masked.

    Returns:
      (B, L - l_0) float32.

    Raises:
      InputError: unknown kind.
    """
    if kind not in MASKED_WEIGHTINGS:
        raise InputError(
            f"loss_weights of masked prediction must be one of {', '.join(MASKED_WEIGHTINGS)}; "
            f"got {kind!r}"
        )
    first = scales.lengths[0]
    weights = is_masked.astype(jnp.float32)
    if kind.endswith(_SHIFTED):
        of_all = position_weights(scales, kind.removesuffix(_SHIFTED)).astype(np.float32)
        return weights * of_all[: scales.length - first]
    if kind != "unweighted":
        weights = weights * position_weights(scales, kind)[first:].astype(np.float32)
    return weights / weights.sum(-1, keepdims=True)


def cross_entropy(logits, targets, label_smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of each position.

    Args:
      logits: (..., V).
      targets: (...) int.
      label_smoothing: probability that is spread evenly over the codebook.

    Returns:
      (...) float32.
    """
    logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    if label_smoothing:  # unlike optax.smooth_labels, without one-hot labels (..., V)
        mean_log_prob = logits.mean(-1) - jax.nn.logsumexp(logits, axis=-1)
        loss = (1 - label_smoothing) * loss - label_smoothing * mean_log_prob
    return loss
