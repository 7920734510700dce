"""The sampler: a picture scale by scale, as one pure function that is jitted whole.

HMAR (arXiv 2506.04421, section 3.3) and VAR (arXiv 2404.02905, algorithm 2). The model comes in as a function from one
scale's input to its logits, so that nothing here knows a network.

Letters: B pictures, K scales with l_k tokens, L tokens, S side of the features, Z channels, V codebook entries.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hmar_jax.errors import InputError
from hmar_jax.models.tokenizer import Tokenizer
from hmar_jax.models.transformer import NextScaleTransformer
from hmar_jax.sampling import filters


@dataclasses.dataclass(frozen=True)
class Draw:
    """The static half of how tokens are drawn: what changes the program. Numbers are in `Strength`."""

    guided: bool = True  # False leaves the unconditional half out
    top_k: int = 0  # 0: off
    use_top_p: bool = False
    greedy: bool = False  # the likeliest token instead of a drawn one


@dataclasses.dataclass(frozen=True)
class Strength:
    """The numbers of a draw; changing them compiles nothing."""

    guidance: Any = 0.0
    top_p: Any = 1.0


jax.tree_util.register_dataclass(Strength, ("guidance", "top_p"), ())


def options(*, guidance=0.0, top_k=0, top_p=0.0, greedy=False, vocab_size: int) -> tuple[Draw, Strength]:
    """Checks what a user asked for.

    Args:
      guidance: 0 is none; any number above.
      top_k: 0 is off, otherwise 1 to V.
      top_p: 0 is off, otherwise up to 1.

    Raises:
      InputError: a value is out of its range.
    """
    if not _is_number(guidance) or not guidance >= 0:
        raise InputError(f"guidance={guidance}: a number of 0 or more is wanted")
    if not _is_number(top_p) or not 0 <= top_p <= 1:
        raise InputError(f"top_p={top_p}: a number from 0 to 1 is wanted (0 is off)")
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 0 <= top_k <= vocab_size:
        raise InputError(f"top_k={top_k}: a whole number from 0 to {vocab_size} is wanted (0 is off)")
    draw = Draw(guided=guidance > 0, top_k=top_k, use_top_p=0 < top_p < 1, greedy=greedy)
    return draw, Strength(guidance=float(guidance), top_p=float(top_p))


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and abs(value) != float("inf")


def sample(
    model: NextScaleTransformer, tokenizer: Tokenizer, params, keys: jax.Array, class_ids: jax.Array, draw: Draw,
    strength: Strength,
) -> tuple[jax.Array, jax.Array]:
    """Draws pictures.

    Args:
      params: {"tokenizer": …, "transformer": …}.
      keys: (B,) random keys, one a picture: a picture does not depend on what else is in the batch.
      class_ids: (B,) int32; the null class draws without a class.

    Returns:
      pictures (B, h, w, 3) float32 in [0, 1] and tokens (B, L) int32.
    """
    quantize = lambda *args, method: tokenizer.apply({"params": params["tokenizer"]}, *args, method=method)
    scales = model.config.scale_list
    batch = class_ids.shape[0]
    both_ids = class_ids
    if draw.guided:
        both_ids = jnp.concatenate([class_ids, jnp.full_like(class_ids, model.config.null_class)])

    f_hat = jnp.zeros((batch, scales.side, scales.side, tokenizer.config.z_channels))
    tokens, past = [], None
    for k in range(scales.num_scales):
        codes = quantize(f_hat, k, method="area")  # (B, l_k, Z)
        if draw.guided:
            codes = jnp.concatenate([codes, codes])
        logits, past = model.scale_logits(params["transformer"], k, both_ids, codes, past)
        if draw.guided:
            logits = filters.guide(logits[:batch], logits[batch:], strength.guidance * scales.ratio(k))
        tokens.append(draw_tokens(logits, _fold_all(keys, k), draw, strength))
        f_hat += quantize(quantize(tokens[-1], method="look_up"), k, method="residual")
    images = (quantize(f_hat, method="paint").clip(-1, 1) + 1) / 2
    return images, jnp.concatenate(tokens, 1)


def draw_tokens(logits, keys, draw: Draw, strength: Strength) -> jax.Array:
    """logits (B, l, V), keys (B,) -> tokens (B, l) int32."""
    if draw.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = filters.top_k(logits, draw.top_k)
    if draw.use_top_p:
        logits = filters.top_p(logits, strength.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def picture_keys(rng: jax.Array, count: int) -> jax.Array:
    """(count,) keys, split from rng by index: picture i has the same key for any count above i."""
    return _fold_all(jnp.repeat(rng[None], count, 0), jnp.arange(count))


def _fold_all(keys, data):
    """Folds data, a scalar or (B,), into (B,) keys."""
    return jax.vmap(jax.random.fold_in, (0, None if jnp.ndim(data) == 0 else 0))(keys, data)
