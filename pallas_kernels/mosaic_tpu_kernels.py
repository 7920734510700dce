"""The Pallas kernels of block attention for TPUs: one grid step computes one pair of tiles.

FlashAttention's forward and backward passes (arXiv 2205.14135) over a list of tile pairs; see
mosaic_tpu.py for the list, the grid and the array layout. Scores are held as (keys, queries).

The first arguments of each kernel are its config (`mosaic_tpu.KernelConfig`) and which kinds of
pairs there are: [False] if all are full, [True] if all are partial, or both. Then come the
prefetched scalars of all grid steps: query tiles, key tiles and flags, (steps,) int32 each; and the
bounds of `tiles.query_bounds` for the queries of this step, (2, l).

Letters in shapes: m keys and l queries of one pair, h heads of one step, D head dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

# Bits of the flags of a grid step: the first or last pair of its sum, and a pair that needs the
# mask or extends past the end.
FIRST, LAST, PARTIAL = 1, 2, 4

# Far below every score, yet finite: a query whose keys all lie in later tiles must not compute
# inf - inf. Its sums so far are multiplied by exp(_MASKED - score) = 0 when a real score comes.
_MASKED = -0.7 * float(np.finfo(np.float32).max)


def forward_kernel(
    config, kinds, q_tiles, k_tiles, flags, bounds,
    q, k, v,  # (h, D, l), (h, D, m), (h, D, m)
    out, lse,  # (h, D, l), (h, l): lse is the logsumexp of the scores of each query
    row_max, row_sum, acc,  # (h, l), (h, l), (h, D, l): running maximum, sum, out * row_sum
):  # fmt: skip
    """out and lse, for a query tile over its key tiles."""
    pair = _TilePair(config, q_tiles, k_tiles, flags, bounds)

    @pl.when(pair.has_flag(FIRST))
    def _():
        row_max[...] = jnp.full_like(row_max, _MASKED)
        row_sum[...] = jnp.zeros_like(row_sum)
        acc[...] = jnp.zeros_like(acc)

    def accumulate(partial):
        for head in range(config.tile_sizes.heads):
            row = slice(head, head + 1)
            scores = _dot("Dm,Dl->ml", k[head], q[head]) * config.scale
            if partial:
                scores = jnp.where(pair.mask(), scores, _MASKED)
            new_max = jnp.maximum(row_max[row], scores.max(axis=0, keepdims=True))  # (1, l)
            weights = jnp.exp(scores - new_max)  # (m, l)
            alpha = jnp.exp(row_max[row] - new_max)  # (1, l)
            row_max[row] = new_max
            row_sum[row] = alpha * row_sum[row] + weights.sum(axis=0, keepdims=True)
            v_head = pair.zero_keys_past_end(v[head], partial)
            acc[head] = alpha * acc[head] + _dot("Dm,ml->Dl", v_head, weights.astype(v.dtype))

    pair.run(kinds, accumulate)

    @pl.when(pair.has_flag(LAST))
    def _():
        lse[...] = row_max[...] + jnp.log(row_sum[...])
        for head in range(config.tile_sizes.heads):
            out[head] = (acc[head] / row_sum[head : head + 1]).astype(out.dtype)


def d_q_kernel(
    config, kinds, q_tiles, k_tiles, flags, bounds,
    q, out, d_out, k, v, lse,  # (h, D, l) three times, (h, D, m) twice, (h, l)
    d_q, delta,  # (h, D, l), (h, l): delta is out . d_out of each query
    d_q_acc,  # (h, D, l)
):  # fmt: skip
    """d_q and delta, for a query tile over its key tiles."""
    pair = _TilePair(config, q_tiles, k_tiles, flags, bounds)

    @pl.when(pair.has_flag(FIRST))
    def _():
        d_q_acc[...] = jnp.zeros_like(d_q_acc)
        for head in range(config.tile_sizes.heads):
            product = out[head].astype(jnp.float32) * d_out[head].astype(jnp.float32)
            product = pair.zero_queries_past_end(product, True)
            delta[head : head + 1] = product.sum(axis=0, keepdims=True)

    def accumulate(partial):
        for head in range(config.tile_sizes.heads):
            k_head, v_head = (pair.zero_keys_past_end(x[head], partial) for x in (k, v))
            _, d_scores = pair.recompute(
                q[head], k_head, v_head, d_out[head], lse, delta, head, partial
            )
            d_q_acc[head] += _dot("Dm,ml->Dl", k_head, d_scores)

    pair.run(kinds, accumulate)

    @pl.when(pair.has_flag(LAST))
    def _():
        d_q[...] = (d_q_acc[...] * config.scale).astype(d_q.dtype)


def d_kv_kernel(
    config, kinds, q_tiles, k_tiles, flags, bounds,
    q, d_out, k, v, lse, delta,  # (h, D, l) twice, (h, D, m) twice, (h, l) twice
    d_k, d_v,  # (h, D, m)
    d_k_acc, d_v_acc,  # (h, D, m)
):  # fmt: skip
    """d_k and d_v, for a key tile over its query tiles."""
    pair = _TilePair(config, q_tiles, k_tiles, flags, bounds)

    @pl.when(pair.has_flag(FIRST))
    def _():
        d_k_acc[...] = jnp.zeros_like(d_k_acc)
        d_v_acc[...] = jnp.zeros_like(d_v_acc)

    def accumulate(partial):
        for head in range(config.tile_sizes.heads):
            q_head, d_out_head = (pair.zero_queries_past_end(x[head], partial) for x in (q, d_out))
            probabilities, d_scores = pair.recompute(
                q_head, k[head], v[head], d_out_head, lse, delta, head, partial
            )
            d_k_acc[head] += _dot("Dl,ml->Dm", q_head, d_scores)
            d_v_acc[head] += _dot("Dl,ml->Dm", d_out_head, probabilities)

    pair.run(kinds, accumulate)

    @pl.when(pair.has_flag(LAST))
    def _():
        d_k[...] = (d_k_acc[...] * config.scale).astype(d_k.dtype)
        d_v[...] = d_v_acc[...].astype(d_v.dtype)


class _TilePair:
    """The pair of tiles of this grid step, inside a kernel."""

    def __init__(self, config, q_tiles, k_tiles, flags, bounds):
        n = pl.program_id(2)
        self.config = config
        self.flags = flags[n]
        self.q_start = q_tiles[n] * config.tile_sizes.queries
        self.k_start = k_tiles[n] * config.tile_sizes.keys
        self.bounds = bounds

    def has_flag(self, flag):
        """Whether a flag (FIRST, LAST or PARTIAL) of this grid step is set."""
        return self.flags & flag != 0

    def run(self, kinds, body):
        """Calls body(partial) for the kind of this pair."""
        for partial in kinds:
            pl.when(self.has_flag(PARTIAL) == partial)(functools.partial(body, partial))

    def mask(self):
        """(m, l) bool: whether the query sees the key. False past the end of either."""
        sizes = self.config.tile_sizes
        key = self.k_start + jax.lax.broadcasted_iota(jnp.int32, (sizes.keys, sizes.queries), 0)
        return (self.bounds[0:1] <= key) & (key < self.bounds[1:2])

    def zero_keys_past_end(self, x, partial):
        """(D, m): in partial pairs, zero past the end, where x is undefined and may be NaN."""
        return self._zero_past_end(x, self.k_start) if partial else x

    def zero_queries_past_end(self, x, partial):
        """(D, l): in partial pairs, zero past the end, where x is undefined and may be NaN."""
        return self._zero_past_end(x, self.q_start) if partial else x

    def _zero_past_end(self, x, start):
        if self.config.length % x.shape[1] == 0:
            return x
        token = start + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.where(token < self.config.length, x, jnp.zeros_like(x))

    def recompute(self, q, k, v, d_out, lse, delta, head, partial):
        """Recomputes the probabilities of a head, and their gradients.

        Args:
          q, d_out: (D, l), of the head.
          k, v: (D, m), of the head.
          lse, delta: (h, l) references.
          head: index of the head in the step.
          partial: whether the pair needs the mask.

        Returns:
          Probabilities, and the gradients of the scores without the scale: (m, l) each, in the
          dtype of q, as operands of the next matmul.
        """
        row = slice(head, head + 1)
        probabilities = jnp.exp(_dot("Dm,Dl->ml", k, q) * self.config.scale - lse[row])
        if partial:
            probabilities = jnp.where(self.mask(), probabilities, 0.0)
        d_probabilities = _dot("Dm,Dl->ml", v, d_out)
        d_scores = probabilities * (d_probabilities - delta[row])
        return probabilities.astype(q.dtype), d_scores.astype(q.dtype)


def _dot(spec, a, b):
    """An einsum that sums in float32 and does not round its operands.

    A TPU needs several passes of bfloat16 for float32 operands.
    """
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)
