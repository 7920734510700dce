"""Block attention in plain JAX, for every platform: one dense attention for each group of blocks (see tiles.py).

The backward pass is written by hand: it keeps one number a query (the logsumexp of its scores) and recomputes the
probabilities from it, as FlashAttention does (arXiv 2205.14135), where autodiff would keep (B, H, l, m) arrays. Groups
with few keys keep their probabilities, which are small there, and are faster for it.

Letters: B batch, H heads, D head dim; l queries and m keys of one group.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import tiles

# A group's probabilities are kept for the backward pass while it has at most this many keys for each channel of a head:
# they are then no larger than its q, k, v and output together. Measured on CPU, forward + backward, against always
# recomputing (benchmarks/attention_cpu.py): a fifth faster for the 256-pixel list and for lists of 30 tokens.
_KEPT_KEYS_PER_CHANNEL = 4


def why_not(_q):
    """None: this one runs everywhere, on every shape and dtype that the API accepts."""
    return None


def attention(q, k, v, block_sizes, pattern, scale):
    """Block attention; arguments are checked and explained in `pallas_kernels.api.block_attention`."""
    return attend_groups(q, k, v, tiles.group_blocks(block_sizes, pattern), pattern, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def attend_groups(q, k, v, groups, pattern, scale):
    """`attention`, with the groups given: `tiles.Group`s in order that cover all tokens."""
    return _forward(q, k, v, groups, pattern, scale)[0]


def _forward(q, k, v, groups, pattern, scale):
    outputs, kept = [], []
    for group in groups:
        q_g = _rows(q, group.start, group.stop)  # (B, H, l, D)
        k_g, v_g = (_rows(x, group.key_start, group.stop) for x in (k, v))  # (B, H, m, D)
        scores = _scores(q_g, k_g, group, pattern, scale)  # (B, H, l, m)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        if _keeps_probabilities(group, q):
            probabilities = _as_operand(weights / total, q.dtype)
            outputs.append(_dot("BHlm,BHmD->BHlD", probabilities, v_g))
            kept.append(probabilities)
        else:
            outputs.append(_dot("BHlm,BHmD->BHlD", _as_operand(weights, q.dtype), v_g) / total)
            kept.append(top + jnp.log(total))
    return _join(outputs, q.dtype), (q, k, v, kept)


def _backward(groups, pattern, scale, residuals, d_out):
    q, k, v, kept = residuals
    d_q, d_k, d_v = [], [], []
    for group, kept_g in zip(groups, kept, strict=True):
        q_g, d_out_g = (_rows(x, group.start, group.stop) for x in (q, d_out))
        k_g, v_g = (_rows(x, group.key_start, group.stop) for x in (k, v))
        if _keeps_probabilities(group, q):
            probabilities = kept_g
        else:
            probabilities = jnp.exp(_scores(q_g, k_g, group, pattern, scale) - kept_g)
        d_v.append(_dot("BHlm,BHlD->BHmD", _as_operand(probabilities, q.dtype), d_out_g))
        d_probabilities = _dot("BHlD,BHmD->BHlm", d_out_g, v_g)
        mean = (probabilities * d_probabilities).sum(axis=-1, keepdims=True)
        d_scores = _as_operand(probabilities * (d_probabilities - mean) * scale, q.dtype)
        d_q.append(_dot("BHlm,BHmD->BHlD", d_scores, k_g))
        d_k.append(_dot("BHlm,BHlD->BHmD", d_scores, q_g))
    return (
        _join(d_q, q.dtype),
        _join(_sum_columns(d_k, groups), q.dtype),
        _join(_sum_columns(d_v, groups), q.dtype),
    )


attend_groups.defvjp(_forward, _backward)


def _keeps_probabilities(group, q):
    return group.num_keys <= _KEPT_KEYS_PER_CHANNEL * q.shape[-1]


def _rows(x, start, stop):
    """(B, L, H, D) -> (B, H, stop - start, D): batch axes first, as a batched matmul wants them."""
    return x[:, start:stop].swapaxes(1, 2)


def _join(parts, dtype):
    """Inverse of `_rows` over all groups: list of (B, H, l, D) -> (B, L, H, D)."""
    return jnp.concatenate([part.swapaxes(1, 2) for part in parts], axis=1).astype(dtype)


def _scores(q_g, k_g, group, pattern, scale):
    scores = _dot("BHlD,BHmD->BHlm", q_g, k_g) * scale
    return (
        jnp.where(tiles.group_mask(group, pattern), scores, -jnp.inf)
        if group.needs_mask
        else scores
    )


def _sum_columns(parts, groups):
    """Adds up what the groups say about the same keys.

    Args:
      parts: one (B, H, m, D) for each group, for its keys [key_start, stop).
      groups: the groups, in order.

    Returns:
      One (B, H, l, D) for each group, for the tokens [start, stop).
    """
    sums = []
    later = None  # what the later groups add to the keys before their own start: none if diagonal, [0, stop) if causal
    for group, part in zip(reversed(groups), reversed(parts), strict=True):
        if later is not None and later.shape[2]:
            part = part + later
        own = group.start - group.key_start
        sums.append(part[:, :, own:])
        later = part[:, :, :own]
    return sums[::-1]


def _as_operand(x, dtype):
    """Rounds an intermediate for the next matmul: to bfloat16 if the inputs are, as the fast matmul units want.

    Not to float16: small probabilities and their gradients would leave its range.
    """
    return x.astype(jnp.bfloat16) if dtype == jnp.bfloat16 else x


def _dot(spec, a, b):
    """An einsum that sums in float32 (float64 for float64) and does not round its operands."""
    operand = jnp.promote_types(a.dtype, b.dtype)
    # For float32 the default precision is TF32 on recent GPUs and bfloat16 on TPUs. Operands of 16 bits lose nothing.
    precision = jax.lax.Precision.DEFAULT if operand.itemsize == 2 else jax.lax.Precision.HIGHEST
    return jnp.einsum(
        spec,
        a,
        b,
        precision=precision,
        preferred_element_type=jnp.promote_types(operand, jnp.float32),
    )
