"""Cross-entropy over scales and its weightings.

HMAR (arXiv 2506.04421, section 3.2, "loss weighting"); the numbers are those of the published code. Letters: B images, L
tokens, V codebook entries, K scales with l_k tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.errors import InputError

WEIGHTINGS = ("lognorm", "equal", "plain")
_SHIFTED = "_published"
MASKED_WEIGHTINGS = ("unweighted", "lognorm", "equal", "lognorm" + _SHIFTED, "equal" + _SHIFTED)


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


def masked_weights(scales: ScaleList, kind: str, masked) -> jax.Array:
    """The weight of each position in the loss of masked prediction: 0 where nothing is masked.

    Args:
      kind: "unweighted": the mean over a image's masked positions, the published default. "lognorm", "equal": as
        position_weights, of the masked positions, normalised to sum to 1 for each image. "lognorm_published",
        "equal_published": as the published code has them, each position with the weight of the one l_0 places before it,
        and not normalised.
      masked: (B, L - l_0) bool, the positions after the first scale, which is never masked.

    Returns:
      (B, L - l_0) float32.

    Raises:
      InputError: unknown kind.
    """
    if kind not in MASKED_WEIGHTINGS:
        raise InputError(
            f"loss_weights={kind!r}: known for masked prediction are {', '.join(MASKED_WEIGHTINGS)}"
        )
    first = scales.lengths[0]
    weights = masked.astype(jnp.float32)
    if kind.endswith(_SHIFTED):
        return weights * position_weights(scales, kind.removesuffix(_SHIFTED))[
            : scales.length - first
        ].astype(np.float32)
    if kind != "unweighted":
        weights = weights * position_weights(scales, kind)[first:].astype(np.float32)
    return weights / weights.sum(-1, keepdims=True)


def cross_entropy(logits, targets, label_smoothing: float = 0.0):
    """Per position: logits (..., V), targets (...) int -> (...) float32."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    loss = -jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_probs.mean(-1)
    return loss
