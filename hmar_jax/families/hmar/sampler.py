"""The sampler: generates images scale by scale, as one pure function that is jitted as a whole.

HMAR (arXiv 2506.04421, section 3.3), VAR (arXiv 2404.02905, algorithm 2) and, within a scale,
MaskGIT (arXiv 2202.04200, section 3.2). Editing is the same loop with some tokens known. The
sampler uses the methods of CombinedModel (combined.py) and nothing else of a model.

Letters: B images, K scales, l_k tokens of scale k, L tokens of all scales, S side of the features,
Z channels of the code, V codebook entries, h w image sides.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hmar_jax.errors import InputError
from hmar_jax.families.hmar import editing, filters
from hmar_jax.families.hmar.combined import CombinedModel
from hmar_jax.families.hmar.masking import ranks
from hmar_jax.families.hmar.options import EditingConfig, SamplingConfig
from hmar_jax.families.hmar.schedules import (
    MaskingPlan,
    Schedule,
    masking_plan,
    resolve_schedule,
)
from hmar_jax.families.hmar.spec import HmarSpec
from hmar_jax.settings import kinds


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
    """A SamplingConfig as the argument of the compiled sampler: a pytree.

    Options of type float are traced, so another value compiles nothing. Static are the others, and
    which of the floats are enabled, that is, differ from their default. The schedule is neither: it
    becomes a MaskingPlan.
    """

    traced: dict[str, Any]
    enabled: frozenset[str]
    static: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, config: SamplingConfig) -> "SamplerOptions":
        """Splits a config into traced and static options."""
        traced, static, enabled = {}, [], set()
        for field in dataclasses.fields(SamplingConfig):
            value = getattr(config, field.name)
            if float in kinds(SamplingConfig, field):
                traced[field.name] = float(value)
                if value != field.default:
                    enabled.add(field.name)
            elif field.name != "schedule":
                static.append((field.name, value))
        if traced["top_p"] == 1:  # keeps all tokens
            enabled.discard("top_p")
        return cls(traced, frozenset(enabled), tuple(static))

    def __getitem__(self, name: str) -> Any:
        return self.traced[name] if name in self.traced else dict(self.static)[name]


jax.tree_util.register_dataclass(SamplerOptions, ("traced",), ("enabled", "static"))


class Known(NamedTuple):
    """Given tokens, for editing. The sampler never masks or changes them."""

    tokens: jax.Array  # (B, L) int32
    is_kept: jax.Array  # (B, L) bool, True where the token is given; others are ignored


class Pass(NamedTuple):
    """Record of one forward pass."""

    scale: int
    logits: jax.Array  # (B, l_k, V) after guidance, before temperature and filtering
    is_masked: jax.Array  # (B, l_k) bool, positions masked in the input; none in a next-scale pass
    tokens: jax.Array  # (B, l_k) int32, after the pass
    confidence: jax.Array  # (B, l_k) probability of each of these tokens in this pass


@dataclasses.dataclass
class Trace:
    """Record of a call of the sampler, for tests and visualizations."""

    passes: list[Pass] = dataclasses.field(default_factory=list)
    # K arrays (B, S, S, Z), the running sum after each scale
    f_hats: list[jax.Array] = dataclasses.field(default_factory=list)


class _ScaleState(NamedTuple):
    """The tokens of one scale, between two passes."""

    tokens: jax.Array  # (B, l_k) int32
    vectors: jax.Array  # (B, l_k, Z) codebook entries of the tokens, or mixtures of entries
    confidence: jax.Array  # (B, l_k) probability of each token
    is_masked: jax.Array  # (B, l_k) bool, not yet fixed


@dataclasses.dataclass(frozen=True)
class HmarSampler:
    """The compiled sampler of a model, see the protocol `Sampler` in families/base.py."""

    spec: HmarSpec

    @functools.cached_property
    def _sample(self):
        return jax.jit(functools.partial(sample, CombinedModel(self.spec)))

    @functools.cached_property
    def _edit(self):
        return jax.jit(functools.partial(sample_known, CombinedModel(self.spec)))

    def schedule(self, given: Any = None) -> Schedule:
        """The token counts that the schedule option stands for.

        Args:
          given: see resolve_schedule; None: "default" with stage 2, otherwise "none".

        Raises:
          InputError: it does not fit the scales, or requires stage 2, which the model does not
            have.
        """
        if given is None:
            given = "default" if self.spec.masked_depth else "none"
        schedule = resolve_schedule(self.spec.autoencoder.scale_list, given)
        if not self.spec.masked_depth and any(len(row) > 1 for row in schedule):
            raise InputError(
                f"schedule {given!r} has masked passes, which require stage 2; this model has "
                "none: use schedule=none",
                schedule="none",
            )
        return schedule

    def check(self, config: SamplingConfig) -> None:
        """Raises InputError where the options do not fit the model or each other."""
        if config.top_k > self.spec.transformer.vocab_size:
            raise InputError(
                f"top_k must be in [0, {self.spec.transformer.vocab_size}]; got {config.top_k}"
            )
        if config.greedy and config.smooth:
            raise InputError(
                "greedy and smooth exclude each other: greedy takes the likeliest entry, smooth "
                "mixes several"
            )
        self.schedule(config.schedule)

    def __call__(self, params, keys, class_ids, config: SamplingConfig, known: Known | None = None):
        plan = masking_plan(self.schedule(config.schedule))
        options = SamplerOptions.of(config)
        if known is None:
            return self._sample(params, keys, class_ids, options, plan)
        return self._edit(params, keys, class_ids, options, plan, known)

    def make_known(
        self, latents, mask: np.ndarray, config: EditingConfig, has_class: bool
    ) -> Known:
        """The tokens that editing keeps: those outside a mask.

        Args:
          latents: {"tokens": (B, L) int32}.
          mask: (B, h, w) bool, True where new content goes.
          has_class: without a class, the coarse scales are kept unless the config says otherwise.
        """
        is_kept = editing.kept_tokens(
            self.spec.autoencoder.scale_list,
            mask,
            dilation=config.dilation,
            keep_coarse=not has_class if config.keep_coarse is None else config.keep_coarse,
        )
        return Known(latents["tokens"], is_kept)


def sample(
    model: CombinedModel,
    params,
    keys: jax.Array,
    class_ids: jax.Array,
    options: SamplerOptions,
    plan: MaskingPlan,
    trace: Trace | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Samples images.

    Args:
      params: {"tokenizer", "transformer"} and, for masked passes, {"masked"}.
      keys: (B,) random keys. An image depends on its own key and class alone.
      class_ids: (B,) int32; the null class samples without a class.
      plan: how many tokens are masked in each pass of each scale.
      trace: a record to fill. The plan must then be concrete, not traced.

    Returns:
      Images (B, h, w, 3) float32 in [0, 1], and tokens (B, L) int32.
    """
    f_hat, tokens = sample_scales(model, params, keys, class_ids, options, plan, trace=trace)
    return model.decode_features(params, f_hat), tokens


def sample_known(
    model: CombinedModel,
    params,
    keys: jax.Array,
    class_ids: jax.Array,
    options: SamplerOptions,
    plan: MaskingPlan,
    known: Known,
) -> tuple[jax.Array, jax.Array]:
    """As `sample`, with some tokens given. If all are, the images are their reconstruction."""
    f_hat, tokens = sample_scales(model, params, keys, class_ids, options, plan, known=known)
    # Tokens are decoded by the same function as in a reconstruction, so that given tokens have
    # exactly the same result. Mixtures are not tokens.
    if options["smooth"]:
        return model.decode_features(params, f_hat), tokens
    return model.decode_tokens(params, tokens), tokens


def sample_scales(
    model: CombinedModel,
    params,
    keys: jax.Array,
    class_ids: jax.Array,
    options: SamplerOptions,
    plan: MaskingPlan,
    known: Known | None = None,
    trace: Trace | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `sample`, without the decoder: features (B, S, S, Z) and tokens (B, L).

    Args:
      known: given tokens. The plan's counts are then scaled to the number of the other tokens.
    """
    scales, batch = model.scales, class_ids.shape[0]
    f_hat = jnp.zeros((batch, scales.side, scales.side, model.z_channels))
    all_editable = jnp.ones((batch, scales.length), bool)
    editable = all_editable if known is None else ~known.is_kept  # (B, L)
    all_tokens, kv_cache = [], None
    for k in range(scales.num_scales):
        part = scales.slice(k)
        scale_inputs = model.downsample_to_scale(params, f_hat, k)  # (B, l_k, Z)
        scale_keys = _fold_all(keys, k)

        logits, kv_cache = _guided(
            lambda ids, x: model.next_scale_logits(params, ids, x, k, kv_cache),
            "guidance" in options.enabled,
            options["guidance"] * scales.ratio(k),
            model.null_class,
            class_ids,
            scale_inputs,
        )
        scaled = logits
        if "temperature" in options.enabled:
            scaled = logits / options["temperature"]
        state = _sample_state(model, params, scaled, _fold_all(scale_keys, 0), options, k)
        state = state._replace(is_masked=editable[:, part])
        if known is not None:
            state = _with_known(model, params, state, known.tokens[:, part])
        if trace is not None:
            none_masked = jnp.zeros(state.tokens.shape, bool)
            trace.passes.append(Pass(k, logits, none_masked, state.tokens, state.confidence))

        if plan.has_masked_passes[k]:
            masked_pass = functools.partial(
                _masked_pass,
                model,
                params,
                class_ids,
                scale_inputs,
                editable[:, part],
                jnp.asarray(plan.num_masked[k]),
                scale_keys,
                options,
                k,
            )
            if trace is None:  # the masked passes of a scale share one compiled loop body
                body = lambda j, state: masked_pass(j, state)[0]
                state = jax.lax.fori_loop(1, plan.num_passes[k], body, state)
            else:
                for j in range(1, int(plan.num_passes[k])):
                    state, record = masked_pass(j, state)
                    trace.passes.append(record)
        all_tokens.append(state.tokens)
        f_hat += model.scale_contribution(params, state.vectors, k)
        if trace is not None:
            trace.f_hats.append(f_hat)
    return f_hat, jnp.concatenate(all_tokens, 1)


def _with_known(model, params, state: _ScaleState, given) -> _ScaleState:
    """Replaces the tokens that are not masked by the given ones, (B, l_k)."""
    entries = model.codebook(params)[given]
    return state._replace(
        tokens=jnp.where(state.is_masked, state.tokens, given),
        vectors=jnp.where(state.is_masked[..., None], state.vectors, entries),
    )


def _masked_pass(
    model,
    params,
    class_ids,
    scale_inputs,
    editable,
    num_masked,
    scale_keys,
    options,
    k,
    j,
    state,
) -> tuple[_ScaleState, Pass]:
    """Masked pass j: fixes the most confident masked tokens, and predicts the others again.

    Args:
      scale_inputs: features of the earlier scales on the cells of scale k, (B, l_k, Z).
      editable: (B, l_k) bool, True where the token is not given.
      num_masked: (l_k,) int32, how many of l_k tokens are masked in each pass.
      scale_keys: (B,) random keys of this scale.
      j: number of the pass, at least 1.
      state: tokens after the previous pass.

    Returns:
      Tokens after this pass, and its record.
    """
    length = editable.shape[1]
    keys = _fold_all(scale_keys, j)
    count = num_masked[j] * editable.sum(-1) // length  # (B,)
    confidence = state.confidence
    if "choice_temperature" in options.enabled:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (length,)))(_fold_all(keys, _NOISE))
        temperature = options["choice_temperature"] * (num_masked[j] / length)
        confidence = jnp.log(confidence) + temperature * noise
    is_masked = least_confident(confidence, state.is_masked, count)
    contribution = model.scale_contribution(params, state.vectors, k)
    features = model.downsample_to_scale(params, contribution, k)

    logits, _ = _guided(
        lambda *rows: (model.masked_logits(params, *rows, k), None),
        "masked_guidance" in options.enabled,
        options["masked_guidance"],
        model.null_class,
        class_ids,
        scale_inputs,
        features,
        is_masked,
    )
    new = _sample_state(model, params, logits, keys, options, k)
    tokens = jnp.where(is_masked, new.tokens, state.tokens)
    vectors = jnp.where(is_masked[..., None], new.vectors, state.vectors)
    confidence = _probability(_filtered(logits, options), tokens)
    record = Pass(k, logits, is_masked, tokens, confidence)
    return _ScaleState(tokens, vectors, confidence, is_masked), record


def _guided(predict, is_guided: bool, strength, null_class: int, class_ids, *rows):
    """Calls predict(class_ids, *rows) with classifier-free guidance, if it is enabled.

    The conditional and the unconditional prediction are two halves of one batch.

    Args:
      predict: returns logits (B, l, V) and another tree of arrays.
      strength: of the guidance, a scalar.
      rows: arrays (B, ...).

    Returns:
      The guided logits, and the other tree (of both halves).
    """
    if not is_guided:
        return predict(class_ids, *rows)
    batch = class_ids.shape[0]
    ids = jnp.concatenate([class_ids, jnp.full_like(class_ids, null_class)])
    logits, more = predict(ids, *(jnp.concatenate([x, x]) for x in rows))
    return filters.guide(logits[:batch], logits[batch:], strength), more


_TOKEN, _NOISE = 0, 1  # purposes of a pass's random numbers, folded into its keys


def _sample_state(model, params, logits, keys, options: SamplerOptions, k: int) -> _ScaleState:
    """Samples a whole scale from logits (B, l_k, V), with keys (B,) of the pass."""
    keys, codebook = _fold_all(keys, _TOKEN), model.codebook(params)
    if options["smooth"]:
        kept = _filtered(logits, options)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, kept.shape[1:]))(keys)
        weights = filters.smooth_weights(kept, noise, model.scales.ratio(k))
        tokens = jnp.argmax(weights, axis=-1).astype(jnp.int32)
        vectors = jnp.matmul(weights, codebook, precision=jax.lax.Precision.HIGHEST)
        confidence = _probability(kept, tokens)
    else:
        tokens, confidence = sample_tokens(logits, keys, options)
        vectors = codebook[tokens]
    return _ScaleState(tokens, vectors, confidence, jnp.ones(tokens.shape, bool))


def sample_tokens(logits, keys, options: SamplerOptions) -> tuple[jax.Array, jax.Array]:
    """Samples tokens from the filtered logits.

    Args:
      logits: (B, l, V).
      keys: (B,) random keys.

    Returns:
      Tokens (B, l) int32, and the probability of each after filtering, (B, l).
    """
    kept = _filtered(logits, options)
    if options["greedy"]:
        tokens = jnp.argmax(kept, axis=-1).astype(jnp.int32)
    else:
        tokens = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
    return tokens, _probability(kept, tokens)


def _filtered(logits, options: SamplerOptions):
    logits = filters.top_k(logits, options["top_k"])
    return filters.top_p(logits, options["top_p"]) if "top_p" in options.enabled else logits


def _probability(logits, tokens):
    return jnp.take_along_axis(jax.nn.softmax(logits), tokens[..., None], -1)[..., 0]


def least_confident(confidence, among, count) -> jax.Array:
    """Selects the positions of lowest confidence among some.

    Args:
      confidence: (B, l).
      among: (B, l) bool, the positions to select from.
      count: number of positions to select, () or (B,) int.

    Returns:
      (B, l) bool.
    """
    rank = ranks(jnp.where(among, confidence, jnp.inf))
    return (rank < jnp.reshape(count, (-1, 1))) & among


def _fold_all(keys, data):
    """Folds data, a scalar or (B,) int, into keys (B,)."""
    return jax.vmap(jax.random.fold_in, (0, None if jnp.ndim(data) == 0 else 0))(keys, data)
