"""The sampler: a image scale by scale, as one pure function that is jitted whole.

HMAR (arXiv 2506.04421, section 3.3), VAR (arXiv 2404.02905, algorithm 2) and, inside a scale, MaskGIT (arXiv 2202.04200,
section 3.2). Editing is the same loop with some tokens known. Of a model nothing is used but the methods of
models/combined.py.

Letters: B images, K scales with l_k tokens, L tokens, S side of the features, Z channels, V codebook entries.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hmar_jax.errors import InputError
from hmar_jax.families.hmar import filters
from hmar_jax.families.hmar.combined import CombinedModel
from hmar_jax.families.hmar.schedules import Plan


@dataclasses.dataclass(frozen=True)
class Draw:
    """The static half of how tokens are drawn: what changes the program. Numbers are in `Strength`."""

    guided: bool = True  # False leaves the unconditional half out
    masked_guided: bool = False  # the same for masked passes
    top_k: int = 0  # 0: off
    use_top_p: bool = False
    greedy: bool = False  # the likeliest token instead of a drawn one
    smooth: bool = False  # mixtures of codebook entries instead of single ones
    noisy_confidence: bool = False


@dataclasses.dataclass(frozen=True)
class Strength:
    """The numbers of a draw; changing them compiles nothing."""

    guidance: Any = 0.0
    masked_guidance: Any = 0.0
    top_p: Any = 1.0
    confidence_noise: Any = 0.0


jax.tree_util.register_dataclass(
    Strength, ("guidance", "masked_guidance", "top_p", "confidence_noise"), ()
)


def options(
    *,
    guidance=0.0,
    masked_guidance=0.0,
    top_k=0,
    top_p=0.0,
    greedy=False,
    smooth=False,
    confidence_noise=0.0,
    vocab_size: int,
) -> tuple[Draw, Strength]:
    """Checks what a user asked for.

    Args:
      guidance, masked_guidance: 0 is none; any number above. Of next-scale and of masked passes.
      top_k: 0 is off, otherwise 1 to V.
      top_p: 0 is off, otherwise up to 1.
      greedy: take the likeliest tokens.
      smooth: paint mixtures of codebook entries, see filters.smooth_weights.
      confidence_noise: how much chance there is in which tokens a masked pass fixes, 0 is none (MaskGIT's choice
        temperature). Tokens go by log probability + confidence_noise * share still masked * standard Gumbel noise.

    Raises:
      InputError: a value is out of its range, or greedy and smooth are both asked for.
    """
    numbers = (
        ("guidance", guidance),
        ("masked_guidance", masked_guidance),
        ("confidence_noise", confidence_noise),
    )
    for name, value in numbers:
        if not _is_number(value) or not value >= 0:
            raise InputError(f"{name}={value}: a number of 0 or more is wanted")
    if not _is_number(top_p) or not 0 <= top_p <= 1:
        raise InputError(f"top_p={top_p}: a number from 0 to 1 is wanted (0 is off)")
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 0 <= top_k <= vocab_size:
        raise InputError(
            f"top_k={top_k}: a whole number from 0 to {vocab_size} is wanted (0 is off)"
        )
    if greedy and smooth:
        raise InputError(
            "greedy and smooth are both on: greedy takes the likeliest entry, smooth mixes several; choose one"
        )
    draw = Draw(
        guided=guidance > 0,
        masked_guided=masked_guidance > 0,
        top_k=top_k,
        use_top_p=0 < top_p < 1,
        greedy=greedy,
        smooth=smooth,
        noisy_confidence=confidence_noise > 0,
    )
    return draw, Strength(
        float(guidance), float(masked_guidance), float(top_p), float(confidence_noise)
    )


def _is_number(value) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and value == value
        and abs(value) != float("inf")
    )


class Known(NamedTuple):
    """Tokens that are given, for editing: never masked, never changed."""

    tokens: jax.Array  # (B, L) int32
    keep: jax.Array  # (B, L) bool, True where the token is given


class Pass(NamedTuple):
    """What one forward pass saw and did; kept for tests and for showing how a image comes about."""

    scale: int
    logits: jax.Array  # (B, l_k, V) guided, before filtering
    masked: jax.Array  # (B, l_k) bool, positions masked in the input (none in a next-scale pass)
    tokens: jax.Array  # (B, l_k) after the pass
    confidence: jax.Array  # (B, l_k) probability of each of these tokens under this pass


@dataclasses.dataclass
class Trace:
    """A record of a whole draw."""

    passes: list[Pass] = dataclasses.field(default_factory=list)
    f_hats: list[jax.Array] = dataclasses.field(
        default_factory=list
    )  # K times (B, S, S, Z), running sum after a scale


class _Drawn(NamedTuple):
    """The tokens of one scale while it is being drawn."""

    tokens: jax.Array  # (B, l_k) int32
    vectors: jax.Array  # (B, l_k, Z) what the tokens stand for: their entries, or mixtures
    confidence: jax.Array  # (B, l_k)
    open: jax.Array  # (B, l_k) bool, not yet fixed


def sample(
    model: CombinedModel,
    params,
    keys: jax.Array,
    class_ids: jax.Array,
    draw: Draw,
    strength: Strength,
    plan: Plan,
    trace: Trace | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws images.

    Args:
      params: {"tokenizer": …, "transformer": …} and, with masked passes, {"masked": …}.
      keys: (B,) random keys, one a image: a image does not depend on what else is in the batch.
      class_ids: (B,) int32; the null class draws without a class.
      plan: how many tokens are fixed in each pass of each scale.
      trace: a record to be filled; the plan must then be known while tracing.

    Returns:
      images (B, h, w, 3) float32 in [0, 1] and tokens (B, L) int32.
    """
    f_hat, tokens = sample_scales(model, params, keys, class_ids, draw, strength, plan, trace=trace)
    return model.paint(params, f_hat), tokens


def sample_scales(
    model: CombinedModel,
    params,
    keys: jax.Array,
    class_ids: jax.Array,
    draw: Draw,
    strength: Strength,
    plan: Plan,
    known: Known | None = None,
    trace: Trace | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `sample`, without painting: features (B, S, S, Z) and tokens (B, L).

    Args:
      known: tokens that are given, for editing. The counts of the plan then are shares of each image's other tokens.
    """
    scales, batch = model.scales, class_ids.shape[0]
    f_hat = jnp.zeros((batch, scales.side, scales.side, model.z_channels))
    everything = jnp.ones((batch, scales.length), bool)
    free = everything if known is None else ~known.keep  # (B, L)
    all_tokens, past = [], None
    for k in range(scales.num_scales):
        part = scales.slice(k)
        codes = model.area(params, k, f_hat)  # (B, l_k, Z)
        scale_keys = _fold_all(keys, k)

        logits, past = _guided(
            lambda ids, codes: model.next_scale_logits(params, k, ids, codes, past),
            draw.guided,
            strength.guidance * scales.ratio(k),
            model.null_class,
            class_ids,
            codes,
        )
        drawn = _draw(model, params, k, logits, _fold_all(scale_keys, 0), draw, strength)._replace(
            open=free[:, part]
        )
        if known is not None:
            given = known.tokens[:, part]
            drawn = drawn._replace(
                tokens=jnp.where(drawn.open, drawn.tokens, given),
                vectors=jnp.where(
                    drawn.open[..., None], drawn.vectors, model.codebook(params)[given]
                ),
            )
        if trace is not None:
            trace.passes.append(
                Pass(k, logits, jnp.zeros(drawn.tokens.shape, bool), drawn.tokens, drawn.confidence)
            )

        if plan.refined[k]:

            def masked_pass(j, drawn):
                return _masked_pass(
                    model,
                    params,
                    k,
                    class_ids,
                    codes,
                    free[:, part],
                    jnp.asarray(plan.left[k])[j],
                    _fold_all(scale_keys, j),
                    draw,
                    strength,
                    drawn,
                )

            if trace is None:  # passes of one scale share one compiled body
                drawn = jax.lax.fori_loop(
                    1, plan.passes[k], lambda j, drawn: masked_pass(j, drawn)[0], drawn
                )
            else:
                for j in range(1, int(plan.passes[k])):
                    drawn, record = masked_pass(j, drawn)
                    trace.passes.append(record)
        all_tokens.append(drawn.tokens)
        f_hat += model.residual(params, k, drawn.vectors)
        if trace is not None:
            trace.f_hats.append(f_hat)
    return f_hat, jnp.concatenate(all_tokens, 1)


def _masked_pass(
    model, params, k, class_ids, codes, free, left, keys, draw, strength, drawn: _Drawn
) -> tuple[_Drawn, Pass]:
    """Fixes the most confident of the open tokens and predicts the others again, seeing all that are fixed.

    Args:
      codes: the image so far, (B, l_k, Z).
      free: (B, l_k) bool, what is not given.
      left: () int32, how many of l_k tokens stay open.
      keys: (B,) of this pass.
    """
    length = free.shape[1]
    count = left * free.sum(-1) // length  # (B,)
    confidence = drawn.confidence
    if draw.noisy_confidence:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (length,)))(_fold_all(keys, _NOISE))
        confidence = jnp.log(confidence) + strength.confidence_noise * (left / length) * noise
    masked = least_confident(confidence, drawn.open, count)
    own = model.area(params, k, model.residual(params, k, drawn.vectors))

    logits, _ = _guided(
        lambda *rows: (model.masked_logits(params, k, *rows), None),
        draw.masked_guided,
        strength.masked_guidance,
        model.null_class,
        class_ids,
        codes,
        own,
        masked,
    )
    new = _draw(model, params, k, logits, keys, draw, strength)
    tokens = jnp.where(masked, new.tokens, drawn.tokens)
    vectors = jnp.where(masked[..., None], new.vectors, drawn.vectors)
    confidence = _probability(_filtered(logits, draw, strength), tokens)
    return _Drawn(tokens, vectors, confidence, masked), Pass(k, logits, masked, tokens, confidence)


def _guided(predict, guided: bool, t, null_class: int, class_ids, *rows):
    """predict(ids, *rows), with classifier-free guidance where wanted: both halves in one batch.

    Args:
      predict: gives logits (B, l, V) and something more.
      t: strength of the guidance.
      rows: arrays of B rows.

    Returns:
      What predict returns, the logits guided.
    """
    if not guided:
        return predict(class_ids, *rows)
    batch = class_ids.shape[0]
    ids = jnp.concatenate([class_ids, jnp.full_like(class_ids, null_class)])
    logits, more = predict(ids, *(jnp.concatenate([x, x]) for x in rows))
    return filters.guide(logits[:batch], logits[batch:], t), more


_TOKEN, _NOISE = 0, 1  # which random numbers of a pass


def _draw(model, params, k: int, logits, keys, draw: Draw, strength: Strength) -> _Drawn:
    """Tokens from logits (B, l_k, V), with keys (B,) of the pass."""
    keys, codebook = _fold_all(keys, _TOKEN), model.codebook(params)
    if draw.smooth:
        kept = _filtered(logits, draw, strength)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, kept.shape[1:]))(keys)
        weights = filters.smooth_weights(kept, noise, model.scales.ratio(k))
        tokens = jnp.argmax(weights, axis=-1).astype(jnp.int32)
        vectors, confidence = (
            jnp.matmul(weights, codebook, precision=jax.lax.Precision.HIGHEST),
            _probability(kept, tokens),
        )
    else:
        tokens, confidence = sample_tokens(logits, keys, draw, strength)
        vectors = codebook[tokens]
    return _Drawn(tokens, vectors, confidence, jnp.ones(tokens.shape, bool))


def sample_tokens(logits, keys, draw: Draw, strength: Strength) -> tuple[jax.Array, jax.Array]:
    """logits (B, l, V), keys (B,) -> tokens (B, l) int32 and the probability of each after filtering, (B, l)."""
    kept = _filtered(logits, draw, strength)
    if draw.greedy:
        tokens = jnp.argmax(kept, axis=-1).astype(jnp.int32)
    else:
        tokens = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
    return tokens, _probability(kept, tokens)


def _filtered(logits, draw: Draw, strength: Strength):
    logits = filters.top_k(logits, draw.top_k)
    return filters.top_p(logits, strength.top_p) if draw.use_top_p else logits


def _probability(logits, tokens):
    return jnp.take_along_axis(jax.nn.softmax(logits), tokens[..., None], -1)[..., 0]


def least_confident(confidence, among, count) -> jax.Array:
    """The positions of the lowest confidence among some.

    Args:
      confidence: (B, l).
      among: (B, l) bool.
      count: how many, () or (B,) int.

    Returns:
      (B, l) bool.
    """
    rank = jnp.argsort(jnp.argsort(jnp.where(among, confidence, jnp.inf), axis=-1), axis=-1)
    return (rank < jnp.reshape(count, (-1, 1))) & among


def image_keys(rng: jax.Array, count: int) -> jax.Array:
    """(count,) keys, split from rng by index: image i has the same key for any count above i."""
    return _fold_all(jnp.repeat(rng[None], count, 0), jnp.arange(count))


def _fold_all(keys, data):
    """Folds data, a scalar or (B,), into (B,) keys."""
    return jax.vmap(jax.random.fold_in, (0, None if jnp.ndim(data) == 0 else 0))(keys, data)
