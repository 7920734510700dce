"""The sampler: a picture scale by scale, as one pure function that is jitted whole.

HMAR (arXiv 2506.04421, section 3.3) and VAR (arXiv 2404.02905, algorithm 2). The model comes in as a function from one
scale's input to its logits, so that nothing here knows a network.

Letters: B pictures, K scales with l_k tokens, L tokens, S side of the features, Z channels, V codebook entries.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hmar_jax.errors import InputError
from hmar_jax.models.masked import MaskedTransformer
from hmar_jax.models.tokenizer import Tokenizer
from hmar_jax.models.transformer import NextScaleTransformer
from hmar_jax.sampling import filters
from hmar_jax.sampling.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class Draw:
    """The static half of how tokens are drawn: what changes the program. Numbers are in `Strength`."""

    guided: bool = True  # False leaves the unconditional half out
    masked_guided: bool = False  # the same for masked passes
    top_k: int = 0  # 0: off
    use_top_p: bool = False
    greedy: bool = False  # the likeliest token instead of a drawn one


@dataclasses.dataclass(frozen=True)
class Strength:
    """The numbers of a draw; changing them compiles nothing."""

    guidance: Any = 0.0
    masked_guidance: Any = 0.0
    top_p: Any = 1.0


jax.tree_util.register_dataclass(Strength, ("guidance", "masked_guidance", "top_p"), ())


def options(*, guidance=0.0, masked_guidance=0.0, top_k=0, top_p=0.0, greedy=False, vocab_size: int) -> tuple[Draw, Strength]:
    """Checks what a user asked for.

    Args:
      guidance, masked_guidance: 0 is none; any number above. Of next-scale and of masked passes.
      top_k: 0 is off, otherwise 1 to V.
      top_p: 0 is off, otherwise up to 1.

    Raises:
      InputError: a value is out of its range.
    """
    for name, value in (("guidance", guidance), ("masked_guidance", masked_guidance)):
        if not _is_number(value) or not value >= 0:
            raise InputError(f"{name}={value}: a number of 0 or more is wanted")
    if not _is_number(top_p) or not 0 <= top_p <= 1:
        raise InputError(f"top_p={top_p}: a number from 0 to 1 is wanted (0 is off)")
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 0 <= top_k <= vocab_size:
        raise InputError(f"top_k={top_k}: a whole number from 0 to {vocab_size} is wanted (0 is off)")
    draw = Draw(
        guided=guidance > 0, masked_guided=masked_guidance > 0, top_k=top_k, use_top_p=0 < top_p < 1, greedy=greedy)
    return draw, Strength(float(guidance), float(masked_guidance), float(top_p))


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and abs(value) != float("inf")


class Pass(NamedTuple):
    """What one forward pass saw and did; kept for tests and for showing how a picture comes about."""

    scale: int
    logits: jax.Array  # (B, l_k, V) guided, before filtering
    masked: jax.Array  # (B, l_k) bool, positions masked in the input (none in a next-scale pass)
    tokens: jax.Array  # (B, l_k) after the pass
    confidence: jax.Array  # (B, l_k) probability of each of these tokens under this pass


def sample(
    model: NextScaleTransformer, tokenizer: Tokenizer, params, keys: jax.Array, class_ids: jax.Array, draw: Draw,
    strength: Strength, masked: MaskedTransformer | None = None, schedule: Schedule | None = None,
    passes: list[Pass] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws pictures.

    Args:
      params: {"tokenizer": …, "transformer": …} and, with masked passes, {"masked": …}.
      keys: (B,) random keys, one a picture: a picture does not depend on what else is in the batch.
      class_ids: (B,) int32; the null class draws without a class.
      masked: stage 2, where the schedule has masked passes.
      schedule: counts of tokens fixed in each pass of each scale; None is one pass a scale.
      passes: a list that every pass is appended to.

    Returns:
      pictures (B, h, w, 3) float32 in [0, 1] and tokens (B, L) int32.
    """
    quantize = lambda *args, method: tokenizer.apply({"params": params["tokenizer"]}, *args, method=method)
    scales = model.config.scale_list
    batch = class_ids.shape[0]
    null_ids = jnp.full_like(class_ids, model.config.null_class)
    record = (passes if passes is not None else []).append

    f_hat = jnp.zeros((batch, scales.side, scales.side, tokenizer.config.z_channels))
    all_tokens, past = [], None
    for k in range(scales.num_scales):
        codes = quantize(f_hat, k, method="area")  # (B, l_k, Z)
        scale_keys = _fold_all(keys, k)
        if draw.guided:
            logits, past = model.scale_logits(
                params["transformer"], k, jnp.concatenate([class_ids, null_ids]), jnp.concatenate([codes, codes]), past)
            logits = filters.guide(logits[:batch], logits[batch:], strength.guidance * scales.ratio(k))
        else:
            logits, past = model.scale_logits(params["transformer"], k, class_ids, codes, past)
        tokens, confidence = draw_tokens(logits, _fold_all(scale_keys, 0), draw, strength)
        still = jnp.zeros(tokens.shape, bool)
        record(Pass(k, logits, still, tokens, confidence))

        counts = schedule[k] if schedule else (scales.lengths[k],)
        for j in range(1, len(counts)):
            # Fixed so far: all that is not masked. Of the others, the least confident stay masked.
            still = least_confident(confidence, still if j > 1 else ~still, sum(counts[j:]))
            own = quantize(quantize(quantize(tokens, method="look_up"), k, method="residual"), k, method="area")

            def predict(ids):
                return masked.scale_logits(params["transformer"], params["masked"], k, ids, codes, own, still)

            logits = predict(class_ids)
            if draw.masked_guided:
                logits = filters.guide(logits, predict(null_ids), strength.masked_guidance)
            drawn, _ = draw_tokens(logits, _fold_all(scale_keys, j), draw, strength)
            tokens = jnp.where(still, drawn, tokens)
            confidence = probability(logits, tokens, draw, strength)
            record(Pass(k, logits, still, tokens, confidence))
        all_tokens.append(tokens)
        f_hat += quantize(quantize(tokens, method="look_up"), k, method="residual")
    images = (quantize(f_hat, method="paint").clip(-1, 1) + 1) / 2
    return images, jnp.concatenate(all_tokens, 1)


def draw_tokens(logits, keys, draw: Draw, strength: Strength) -> tuple[jax.Array, jax.Array]:
    """logits (B, l, V), keys (B,) -> tokens (B, l) int32 and the probability of each after filtering, (B, l)."""
    kept = _filtered(logits, draw, strength)
    if draw.greedy:
        tokens = jnp.argmax(kept, axis=-1).astype(jnp.int32)
    else:
        tokens = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
    return tokens, _probability(kept, tokens)


def probability(logits, tokens, draw: Draw, strength: Strength) -> jax.Array:
    """Of tokens (B, l) under logits (B, l, V) after filtering."""
    return _probability(_filtered(logits, draw, strength), tokens)


def _filtered(logits, draw: Draw, strength: Strength):
    logits = filters.top_k(logits, draw.top_k)
    return filters.top_p(logits, strength.top_p) if draw.use_top_p else logits


def _probability(logits, tokens):
    return jnp.take_along_axis(jax.nn.softmax(logits), tokens[..., None], -1)[..., 0]


def least_confident(confidence, among, count: int) -> jax.Array:
    """The `count` positions of the lowest confidence among some: confidence (B, l), among (B, l) bool -> (B, l) bool."""
    rank = jnp.argsort(jnp.argsort(jnp.where(among, confidence, jnp.inf), axis=-1), axis=-1)
    return (rank < count) & among


def picture_keys(rng: jax.Array, count: int) -> jax.Array:
    """(count,) keys, split from rng by index: picture i has the same key for any count above i."""
    return _fold_all(jnp.repeat(rng[None], count, 0), jnp.arange(count))


def _fold_all(keys, data):
    """Folds data, a scalar or (B,), into (B,) keys."""
    return jax.vmap(jax.random.fold_in, (0, None if jnp.ndim(data) == 0 else 0))(keys, data)
