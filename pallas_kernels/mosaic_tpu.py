"""Block attention for TPUs, in Pallas: only the tile pairs that hold a score of the mask are visited.

FlashAttention's scheme (arXiv 2205.14135) over lists of tile pairs that are known at trace time (`tiles.tile_pairs`):
one kernel for the output and the logsumexp of every query, one for dq (for each query tile over its key tiles) and one
for dk and dv (for each key tile over its query tiles). Each sum is made by one core in the order of its list, so the
same inputs give the same bits. The lists reach the kernels as prefetched scalars, from which the tiles of the next step
are looked up; full pairs skip the mask, others compare key positions with the first and last key of each query.

Layout: (B, H, D, L), tokens in the lanes. For D = 64 it is how XLA itself lays out (B, L, H, D) arrays in memory, since
64 in the last place would leave half of the 128 lanes empty; so the transposition here is only a change of names. (Seen
in programs compiled for a layer of the transformer: kernels that take (B, L, H * D) have every operand and result
copied; these have none copied for D = 64, and q, k and v together, once, for D = 128.) Scores are held as (keys,
queries): then the maximum, sum and logsumexp of the queries are rows of lanes, softmax reduces over whole registers,
and of all matmuls only k^T q and v^T d_out transpose an operand, a small one. The end of the sequence is not padded:
the last tile reads past it, and what it finds there is replaced by zeros.

Nothing here has run on a TPU yet: values are tested in Pallas' interpret mode, and compilation with libtpu.

Letters: B batch, L all tokens, H heads, D head dim, S steps over the heads; m keys and l queries of one tile pair, h
heads of one step.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiles
from pallas_kernels.platform import platform

# Far below every score, yet finite: a query whose keys all lie in later tiles must not compute inf - inf. What it adds
# up meanwhile is multiplied by exp(_MASKED - score) = 0 once a real score comes.
_MASKED = -0.7 * float(np.finfo(np.float32).max)
# Bits of the flags of one visit: the first or last one of its sum, a pair of tiles that needs the mask.
_FIRST, _LAST, _PARTIAL = 1, 2, 4

# Tile lengths to choose from. Shorter ones would visit fewer masked scores, but lanes come by 128, and a matmul unit
# that has loaded 128 x 128 weights must stream about as many rows through them to be busy.
_TILE_LENGTHS = (128, 256, 512)
# Of one operand's tile. There are up to seven operands and results with two buffers each, two float32 sums, and scores
# of one head: with this limit they stay under the 16 MiB that a kernel may use by default.
_TILE_BYTES = 2**18
# What tile sizes are compared by: roughly a v5e at half its bfloat16 peak, its memory, and the start of one grid step.
# Counted with these numbers, not measured.
_FLOPS_PER_SECOND, _BYTES_PER_SECOND, _SECONDS_PER_STEP = 1e14, 8e11, 3e-7


@dataclasses.dataclass(frozen=True)
class TileSizes:
    """What one grid step works on."""

    queries: int
    keys: int
    heads: int  # a divisor of H
    shift: int = 0  # tokens of padding before the first, so that the edges of large blocks fall on edges of tiles


def why_not(q):
    """None if this runs here on arrays like q, otherwise the reason in words."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"TPUs compute in float32 and bfloat16; q is {q.dtype}"
    if platform() != "tpu":
        return f"it needs a TPU; this process runs on {platform()}"
    return None


def attention(q, k, v, block_sizes, pattern, scale, interpret=False):
    """Block attention; arguments are checked and explained in `pallas_kernels.api.block_attention`.

    Over a mesh of several devices, call it inside `jax.shard_map` over batch and heads: the compiler cannot split a
    kernel by itself.

    Args:
      interpret: runs the kernels' arithmetic in plain JAX, on any platform: for tests, very slow.
    """
    sizes = choose_tiles(block_sizes, pattern, *q.shape[2:], q.dtype.itemsize)
    q, k, v = (x.transpose(0, 2, 3, 1) for x in _same_axes(q, k, v))
    if sizes.shift:
        block_sizes = (sizes.shift, *block_sizes)
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (sizes.shift, 0))) for x in (q, k, v))
    out = _attend(q, k, v, block_sizes, pattern, scale, sizes, interpret)
    return out[..., sizes.shift :].transpose(0, 3, 1, 2)


@functools.lru_cache(maxsize=256)
def choose_tiles(block_sizes, pattern, heads, dim, itemsize):
    """The TileSizes for which forward and backward pass together should take the least time, by counting.

    `tests/test_mosaic_tpu.py` lists the choices for 16 heads of 64; a shift spares the 256 list 6 of 20 visits.
    """
    candidates = []
    for queries, keys in itertools.product(_TILE_LENGTHS, _TILE_LENGTHS):
        most = max(1, _TILE_BYTES // (max(queries, keys) * dim * itemsize))
        heads_of_step = max(n for n in range(1, most + 1) if heads % n == 0)
        # The padding is a block of its own, so that no query of another block sees it: not so if the pattern is causal.
        shifts = (
            range(0, min(queries, keys), 8)
            if pattern == "diagonal" and len(block_sizes) > 1
            else [0]
        )
        candidates += [TileSizes(queries, keys, heads_of_step, shift) for shift in shifts]
    return min(
        candidates, key=lambda sizes: _counted_seconds(sizes, block_sizes, pattern, dim, itemsize)
    )


def _counted_seconds(sizes, block_sizes, pattern, dim, itemsize):
    """Forward and backward pass of one head."""
    shifted = (sizes.shift, *block_sizes) if sizes.shift else block_sizes
    visits = tiles.tile_pairs(shifted, pattern, sizes.queries, sizes.keys)[0].sum()
    # Nine matmuls in three kernels, whose unit is 128 deep even if a head is not; float32 takes six passes.
    flops = (
        visits * sizes.queries * sizes.keys * 9 * 2 * max(dim, 128) * (6 if itemsize == 4 else 1)
    )
    # Two kernels copy k and v for each visit, one copies q and d_out; a shift reads and writes these four once more.
    tokens = visits * (4 * sizes.keys + 2 * sizes.queries) + (
        8 * sum(shifted) if sizes.shift else 0
    )
    copies = tokens * dim * itemsize
    # As a sum, though most copies go on during the matmuls: other chips have more FLOPs for each byte.
    return (
        flops / _FLOPS_PER_SECOND
        + copies / _BYTES_PER_SECOND
        + 3 * visits * _SECONDS_PER_STEP / sizes.heads
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6, 7))
def _attend(q, k, v, block_sizes, pattern, scale, sizes, interpret):
    """`attention` of (B, H, D, L) arrays."""
    return _forward(q, k, v, block_sizes, pattern, scale, sizes, interpret)[0]


def _forward(q, k, v, block_sizes, pattern, scale, sizes, interpret):
    plan = _Plan(*q.shape, q.dtype, block_sizes, pattern, scale, sizes, interpret)
    out, logsumexp = _run(
        plan,
        _forward_kernel,
        name="block_attention_forward",
        inputs={"queries": [q], "keys": [k, v]},
        outputs=("queries", "stats"),
        scratch=[plan.tile("stats")] * 2 + [plan.tile("queries")],
        matmuls=2,
    )
    return out, (q, k, v, out, logsumexp)


def _backward(block_sizes, pattern, scale, sizes, interpret, residuals, d_out):
    q, k, v, out, logsumexp = residuals
    plan = _Plan(*q.shape, q.dtype, block_sizes, pattern, scale, sizes, interpret)
    d_q, mean = _run(
        plan,
        _d_q_kernel,
        name="block_attention_d_q",
        inputs={"queries": [q, out, d_out], "keys": [k, v], "stats": [logsumexp]},
        outputs=("queries", "stats"),
        scratch=[plan.tile("queries")],
        matmuls=3,
    )
    d_k, d_v = _run(
        plan,
        _d_kv_kernel,
        name="block_attention_d_kv",
        inputs={"queries": [q, d_out], "keys": [k, v], "stats": [logsumexp, mean]},
        outputs=("keys", "keys"),
        scratch=[plan.tile("keys")] * 2,
        matmuls=4,
    )
    return d_q, d_k, d_v


_attend.defvjp(_forward, _backward)


# The calls.


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All that is static in the three kernels of one attention.

    Kinds of arrays: "queries" and "keys" are (B, H, D, L), cut along L into tiles of queries or keys; "stats", one
    float32 for each query, are (B, S, h, L up to whole tiles of queries).
    """

    batch: int
    heads: int
    dim: int
    length: int
    dtype: jnp.dtype
    block_sizes: tuple[int, ...]
    pattern: str
    scale: float
    sizes: TileSizes
    interpret: bool

    @property
    def steps(self):
        return self.heads // self.sizes.heads

    @property
    def padded_length(self):
        return pl.cdiv(self.length, self.sizes.queries) * self.sizes.queries

    def shape(self, kind):
        """The whole array's shape and dtype."""
        if kind == "stats":
            return (self.batch, self.steps, self.sizes.heads, self.padded_length), jnp.dtype(
                jnp.float32
            )
        return (self.batch, self.heads, self.dim, self.length), self.dtype

    def tile(self, kind):
        """Shape of the part that one step works on."""
        if kind == "stats":
            return self.sizes.heads, self.sizes.queries
        return (
            self.sizes.heads,
            self.dim,
            self.sizes.queries if kind == "queries" else self.sizes.keys,
        )

    def spec(self, kind):
        """Where in the array that tile is, for picture b, step s and visit n."""
        if kind == "stats":
            return pl.BlockSpec(
                (None, None, *self.tile(kind)), lambda b, s, n, q_tiles, *_: (b, s, 0, q_tiles[n])
            )
        if kind == "queries":
            return pl.BlockSpec(
                (None, *self.tile(kind)), lambda b, s, n, q_tiles, *_: (b, s, 0, q_tiles[n])
            )
        return pl.BlockSpec(
            (None, *self.tile(kind)), lambda b, s, n, q_tiles, k_tiles, _: (b, s, 0, k_tiles[n])
        )

    def visits(self, by_key):
        """The tile pairs in the order of the grid: query tiles, key tiles, flags; (number of visits,) int32 each."""
        visited, full = tiles.tile_pairs(
            self.block_sizes, self.pattern, self.sizes.queries, self.sizes.keys
        )
        own, other = np.nonzero(visited.T if by_key else visited)
        q_tiles, k_tiles = (other, own) if by_key else (own, other)
        new = np.diff(own, prepend=-1, append=-1) != 0
        flags = _FIRST * new[:-1] + _LAST * new[1:] + _PARTIAL * ~full[q_tiles, k_tiles]
        return [x.astype(np.int32) for x in (q_tiles, k_tiles, flags)]


def _run(plan, kernel, name, inputs, outputs, scratch, matmuls):
    """Calls a kernel over its visits.

    Args:
      inputs: {kind: arrays}; the kernel gets them in this order.
      outputs: kinds. "keys" has the visits ordered by key tile, otherwise they are ordered by query tile.
      scratch: shapes, of float32.
      matmuls: how many a visit does, of keys x queries x D for each head.

    Returns:
      The outputs, a list.
    """
    visits = plan.visits(by_key="keys" in outputs)
    kinds = [kind for kind, arrays in inputs.items() for _ in arrays]
    arrays = _same_axes(*itertools.chain(*inputs.values()))
    # A query past the end sees no key.
    bounds = np.pad(
        tiles.query_bounds(plan.block_sizes, plan.pattern),
        ((0, 0), (0, plan.padded_length - plan.length)),
    )
    axes = jax.typeof(arrays[0]).manual_axis_type
    return pl.pallas_call(
        functools.partial(kernel, plan, sorted({bool(flag & _PARTIAL) for flag in visits[2]})),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(plan.batch, plan.steps, len(visits[0])),
            in_specs=[
                pl.BlockSpec((2, plan.sizes.queries), lambda b, s, n, q_tiles, *_: (0, q_tiles[n])),
                *map(plan.spec, kinds),
            ],
            out_specs=[plan.spec(kind) for kind in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(*plan.shape(kind), manual_axis_type=axes) for kind in outputs
        ],
        # Different pictures and heads share nothing: chips with two cores split them.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(plan, visits, [*kinds, *outputs], matmuls),
        interpret=plan.interpret,
        name=name,
    )(*visits, bounds, *arrays)


def _cost(plan, visits, kinds, matmuls):
    """What the visits compute, masked cells included, and copy: a tile that stays the same is not copied again."""
    q_tiles, k_tiles, _ = visits
    cells = plan.batch * plan.heads * len(q_tiles) * plan.sizes.queries * plan.sizes.keys
    copied = 0
    for kind in kinds:
        copies = 1 + np.count_nonzero(np.diff(k_tiles if kind == "keys" else q_tiles))
        copied += copies * np.prod(plan.tile(kind)) * plan.shape(kind)[1].itemsize
    return pl.CostEstimate(
        flops=2 * matmuls * cells * plan.dim,
        bytes_accessed=int(plan.batch * plan.steps * copied),
        transcendentals=cells,
    )


def _same_axes(*arrays):
    """Inside shard_map: marks all arrays as varying over every mesh axis that one of them varies over."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    missing = [tuple(frozenset().union(*varying) - own) for own in varying]
    return [
        jax.lax.pcast(x, more, to="varying") if more else x
        for x, more in zip(arrays, missing, strict=True)
    ]


# The kernels. Their first arguments are the plan and the kinds of visits that there are: [False] if only full pairs,
# [True] if only partial ones; then the visits, and the bounds of `tiles.query_bounds`, (2, l).


def _forward_kernel(
    plan, cases, q_tiles, k_tiles, flags, bounds,
    q, k, v,  # (h, D, l), (h, D, m), (h, D, m)
    out, logsumexp,  # (h, D, l), (h, l)
    top, total, out_sum,  # (h, l), (h, l): maximum and sum so far; (h, D, l): out before the division by total
):  # fmt: skip
    visit = _Visit(plan, q_tiles, k_tiles, flags, bounds)

    @pl.when(visit.is_(_FIRST))
    def _():
        top[...] = jnp.full_like(top, _MASKED)
        total[...] = jnp.zeros_like(total)
        out_sum[...] = jnp.zeros_like(out_sum)

    def add(partial):
        for head in range(plan.sizes.heads):
            row = slice(head, head + 1)
            scores = _dot("Dm,Dl->ml", k[head], q[head]) * plan.scale
            if partial:
                scores = jnp.where(visit.mask(), scores, _MASKED)
            new_top = jnp.maximum(top[row], scores.max(axis=0, keepdims=True))  # (1, l)
            weights = jnp.exp(scores - new_top)
            shrink = jnp.exp(top[row] - new_top)
            top[row] = new_top
            total[row] = shrink * total[row] + weights.sum(axis=0, keepdims=True)
            v_head = visit.keys_within(v[head], partial)
            out_sum[head] = shrink * out_sum[head] + _dot(
                "Dm,ml->Dl", v_head, weights.astype(v.dtype)
            )

    visit.run(cases, add)

    @pl.when(visit.is_(_LAST))
    def _():
        logsumexp[...] = top[...] + jnp.log(total[...])
        for head in range(plan.sizes.heads):
            out[head] = (out_sum[head] / total[head : head + 1]).astype(out.dtype)


def _d_q_kernel(
    plan, cases, q_tiles, k_tiles, flags, bounds,
    q, out, d_out, k, v, logsumexp,  # (h, D, l) three times, (h, D, m) twice, (h, l)
    d_q, mean,  # (h, D, l), (h, l): the mean of d_probabilities under the probabilities, which is out . d_out
    d_q_sum,  # (h, D, l)
):  # fmt: skip
    visit = _Visit(plan, q_tiles, k_tiles, flags, bounds)

    @pl.when(visit.is_(_FIRST))
    def _():
        d_q_sum[...] = jnp.zeros_like(d_q_sum)
        for head in range(plan.sizes.heads):
            product = out[head].astype(jnp.float32) * d_out[head].astype(jnp.float32)
            mean[head : head + 1] = visit.queries_within(product, True).sum(axis=0, keepdims=True)

    def add(partial):
        for head in range(plan.sizes.heads):
            k_head, v_head = (visit.keys_within(x[head], partial) for x in (k, v))
            _, d_scores = visit.recompute(
                q[head], k_head, v_head, d_out[head], logsumexp, mean, head, partial
            )
            d_q_sum[head] += _dot("Dm,ml->Dl", k_head, d_scores)

    visit.run(cases, add)

    @pl.when(visit.is_(_LAST))
    def _():
        d_q[...] = (d_q_sum[...] * plan.scale).astype(d_q.dtype)


def _d_kv_kernel(
    plan, cases, q_tiles, k_tiles, flags, bounds,
    q, d_out, k, v, logsumexp, mean,  # (h, D, l) twice, (h, D, m) twice, (h, l) twice
    d_k, d_v,  # (h, D, m)
    d_k_sum, d_v_sum,  # (h, D, m)
):  # fmt: skip
    visit = _Visit(plan, q_tiles, k_tiles, flags, bounds)

    @pl.when(visit.is_(_FIRST))
    def _():
        d_k_sum[...] = jnp.zeros_like(d_k_sum)
        d_v_sum[...] = jnp.zeros_like(d_v_sum)

    def add(partial):
        for head in range(plan.sizes.heads):
            q_head, d_out_head = (visit.queries_within(x[head], partial) for x in (q, d_out))
            probabilities, d_scores = visit.recompute(
                q_head, k[head], v[head], d_out_head, logsumexp, mean, head, partial
            )
            d_k_sum[head] += _dot("Dl,ml->Dm", q_head, d_scores)
            d_v_sum[head] += _dot("Dl,ml->Dm", d_out_head, probabilities)

    visit.run(cases, add)

    @pl.when(visit.is_(_LAST))
    def _():
        d_k[...] = (d_k_sum[...] * plan.scale).astype(d_k.dtype)
        d_v[...] = d_v_sum[...].astype(d_v.dtype)


class _Visit:
    """One tile pair, inside a kernel."""

    def __init__(self, plan, q_tiles, k_tiles, flags, bounds):
        n = pl.program_id(2)
        self.plan = plan
        self.flags = flags[n]
        self.q_start = q_tiles[n] * plan.sizes.queries
        self.k_start = k_tiles[n] * plan.sizes.keys
        self.bounds = bounds

    def is_(self, flag):
        return self.flags & flag != 0

    def run(self, cases, body):
        """body(partial), for the kind of this visit."""
        for partial in cases:
            pl.when(self.is_(_PARTIAL) == partial)(functools.partial(body, partial))

    def mask(self):
        """(m, l) bool: whether the query sees the key. False past the end of either."""
        key = self.k_start + jax.lax.broadcasted_iota(
            jnp.int32, (self.plan.sizes.keys, self.plan.sizes.queries), 0
        )
        return (self.bounds[0:1] <= key) & (key < self.bounds[1:2])

    def keys_within(self, x, partial):
        """(D, m), in partial pairs with zeros past the end, where anything may stand: 0 * nan would be nan."""
        return self._within(x, self.k_start) if partial else x

    def queries_within(self, x, partial):
        """(D, l), the same."""
        return self._within(x, self.q_start) if partial else x

    def _within(self, x, start):
        if self.plan.length % x.shape[1] == 0:
            return x
        token = start + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.where(token < self.plan.length, x, jnp.zeros_like(x))

    def recompute(self, q, k, v, d_out, logsumexp, mean, head, partial):
        """Probabilities, and d_scores without the scale; (m, l) each, as operands of the next matmul."""
        row = slice(head, head + 1)
        probabilities = jnp.exp(_dot("Dm,Dl->ml", k, q) * self.plan.scale - logsumexp[row])
        if partial:
            probabilities = jnp.where(self.mask(), probabilities, 0.0)
        d_probabilities = _dot("Dm,Dl->ml", v, d_out)
        d_scores = probabilities * (d_probabilities - mean[row])
        return probabilities.astype(q.dtype), d_scores.astype(q.dtype)


def _dot(spec, a, b):
    """An einsum that sums in float32 and does not round its operands: float32 takes several passes of bfloat16."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)
