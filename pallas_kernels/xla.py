"""Block attention in plain JAX, for every platform: one dense attention per group of blocks.

The groups come from `tiles.group_blocks`. The backward pass is written by hand. Like
FlashAttention (arXiv 2205.14135), it saves one number per query, the logsumexp of its scores, and
recomputes the probabilities from it; automatic differentiation would save (B, H, l, m) arrays.
Groups with few keys save their probabilities instead: these are small, and the backward pass is
faster for it.

Letters in shapes: B batch, L all tokens, H heads, D head dim; l queries and m keys of one group.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import tiles

# A group saves its probabilities for the backward pass if it has at most this many keys per head
# channel: they are then no larger than its q, k, v and output together. Measured on a CPU
# (benchmarks/attention_cpu.py), forward + backward, against recomputing in every group: 20 % faster
# for the 256-pixel list and for lists of 30 tokens.
_MAX_SAVED_KEYS_PER_CHANNEL = 4


def unsupported_reason(_q):
    """Returns None: this module supports every platform, shape and dtype that the API accepts."""
    return None


def attention(q, k, v, block_sizes, pattern, scale):
    """Block attention; see `pallas_kernels.api.block_attention`, which validates the arguments."""
    return attend_groups(q, k, v, tiles.group_blocks(block_sizes, pattern), pattern, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def attend_groups(q, k, v, groups, pattern, scale):
    """`attention` over a given grouping.

    Args:
      q, k, v: (B, L, H, D) each.
      groups: `tiles.Group`s in order that cover all tokens.
      pattern: "diagonal" or "causal".
      scale: factor of the scores.

    Returns:
      (B, L, H, D), dtype of q.
    """
    return _forward(q, k, v, groups, pattern, scale)[0]


def _forward(q, k, v, groups, pattern, scale):
    outputs, saved = [], []
    for group in groups:
        q_g = _slice_tokens(q, group.start, group.stop)  # (B, H, l, D)
        k_g, v_g = (_slice_tokens(x, group.key_start, group.stop) for x in (k, v))  # (B, H, m, D)
        scores = _scores(q_g, k_g, group, pattern, scale)  # (B, H, l, m)
        row_max = scores.max(axis=-1, keepdims=True)  # (B, H, l, 1)
        weights = jnp.exp(scores - row_max)  # (B, H, l, m)
        row_sum = weights.sum(axis=-1, keepdims=True)  # (B, H, l, 1)
        if _saves_probabilities(group, q):
            probabilities = _as_operand(weights / row_sum, q.dtype)
            outputs.append(_dot("BHlm,BHmD->BHlD", probabilities, v_g))
            saved.append(probabilities)
        else:
            outputs.append(_dot("BHlm,BHmD->BHlD", _as_operand(weights, q.dtype), v_g) / row_sum)
            saved.append(row_max + jnp.log(row_sum))  # logsumexp of the scores
    return _concatenate_groups(outputs, q.dtype), (q, k, v, saved)


def _backward(groups, pattern, scale, residuals, d_out):
    q, k, v, saved = residuals
    d_q, d_k, d_v = [], [], []
    for group, saved_g in zip(groups, saved, strict=True):
        q_g, d_out_g = (_slice_tokens(x, group.start, group.stop) for x in (q, d_out))
        k_g, v_g = (_slice_tokens(x, group.key_start, group.stop) for x in (k, v))
        if _saves_probabilities(group, q):
            probabilities = saved_g  # (B, H, l, m)
        else:
            probabilities = jnp.exp(_scores(q_g, k_g, group, pattern, scale) - saved_g)
        d_v.append(_dot("BHlm,BHlD->BHmD", _as_operand(probabilities, q.dtype), d_out_g))
        d_probabilities = _dot("BHlD,BHmD->BHlm", d_out_g, v_g)  # (B, H, l, m)
        delta = (probabilities * d_probabilities).sum(axis=-1, keepdims=True)  # (B, H, l, 1)
        d_scores = _as_operand(probabilities * (d_probabilities - delta) * scale, q.dtype)
        d_q.append(_dot("BHlm,BHmD->BHlD", d_scores, k_g))
        d_k.append(_dot("BHlm,BHlD->BHmD", d_scores, q_g))
    return (
        _concatenate_groups(d_q, q.dtype),
        _concatenate_groups(_sum_over_groups(d_k, groups), q.dtype),
        _concatenate_groups(_sum_over_groups(d_v, groups), q.dtype),
    )


attend_groups.defvjp(_forward, _backward)


def _saves_probabilities(group, q):
    return group.num_keys <= _MAX_SAVED_KEYS_PER_CHANNEL * q.shape[-1]


def _slice_tokens(x, start, stop):
    """(B, L, H, D) -> (B, H, stop - start, D), the axis order of a batched matmul."""
    return x[:, start:stop].swapaxes(1, 2)


def _concatenate_groups(parts, dtype):
    """Inverse of `_slice_tokens` over all groups: list of (B, H, l, D) -> (B, L, H, D)."""
    return jnp.concatenate([part.swapaxes(1, 2) for part in parts], axis=1).astype(dtype)


def _scores(q_g, k_g, group, pattern, scale):
    """(B, H, l, D), (B, H, m, D) -> (B, H, l, m) scaled scores, -inf where masked."""
    scores = _dot("BHlD,BHmD->BHlm", q_g, k_g) * scale
    if not group.needs_mask:
        return scores
    return jnp.where(tiles.group_mask(group, pattern), scores, -jnp.inf)


def _sum_over_groups(parts, groups):
    """Sums the key gradients of all groups that share a key.

    Args:
      parts: one (B, H, m, D) per group, for its keys [key_start, stop).
      groups: the groups, in order.

    Returns:
      One (B, H, l, D) per group, for the tokens [start, stop).
    """
    sums = []
    # Sum of the later groups for the keys before their start: no keys if diagonal, else [0, start).
    later = None
    for group, part in zip(reversed(groups), reversed(parts), strict=True):
        if later is not None and later.shape[2]:
            part = part + later
        num_earlier = group.start - group.key_start
        sums.append(part[:, :, num_earlier:])
        later = part[:, :, :num_earlier]
    return sums[::-1]


def _as_operand(x, dtype):
    """Rounds an intermediate to bfloat16 for the next matmul if the inputs are bfloat16.

    Never to float16: small probabilities and their gradients would leave its range.
    """
    return x.astype(jnp.bfloat16) if dtype == jnp.bfloat16 else x


def _dot(spec, a, b):
    """An einsum that sums in float32 (float64 for float64) and does not round its operands."""
    operand = jnp.promote_types(a.dtype, b.dtype)
    # For float32 operands, the default precision is TF32 on recent GPUs and bfloat16 on TPUs.
    # For 16-bit operands, it loses nothing.
    precision = jax.lax.Precision.DEFAULT if operand.itemsize == 2 else jax.lax.Precision.HIGHEST
    return jnp.einsum(
        spec,
        a,
        b,
        precision=precision,
        preferred_element_type=jnp.promote_types(operand, jnp.float32),
    )
