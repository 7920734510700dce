"""Cross-entropy over scales and its weightings.

HMAR (arXiv 2506.04421, section 3.2, "loss weighting"); the numbers are those of the published code.

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
    """(L,) float64: the weight of each position in the loss.

    Args:
      kind: "lognorm", HMAR's: a normal density over the reversed, standardised scale ratios,
        normalised over the scales and shared equally inside a scale. "equal": 1 / l_k, so every
        scale counts alike; sums to K, not 1. "plain": 1 / L, VAR's.

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
    """The weight of each position in the loss of masked prediction: 0 where nothing is masked.

    Args:
      kind: "unweighted": the mean over an image's masked positions, the published default.
        "lognorm", "equal": as position_weights, of the masked positions, normalised to sum to 1 for
        each image. "lognorm_published", "equal_published": as the published code has them, each
        position with the weight of the one l_0 places before it, and not normalised.
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
    """Per position: logits (..., V), targets (...) int -> (...) float32."""
    logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    if label_smoothing:  # without one-hot labels (..., V), which optax.smooth_labels needs
        mean_log_prob = logits.mean(-1) - jax.nn.logsumexp(logits, axis=-1)
        loss = (1 - label_smoothing) * loss - label_smoothing * mean_log_prob
    return loss
