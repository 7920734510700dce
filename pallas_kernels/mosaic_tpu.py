"""Block attention for TPUs, in Pallas: only tile pairs that hold a score of the mask are computed.

FlashAttention (arXiv 2205.14135) over lists of tile pairs that are known at trace time
(`tiles.tile_pairs`), in three kernels (mosaic_tpu_kernels.py): out and the logsumexp of every
query; d_q, for each query tile over its key tiles; d_k and d_v, for each key tile over its query
tiles. One core adds up each sum in the order of its list, so the same inputs give the same bits.
The lists reach the kernels as prefetched scalars, from which the pipeline finds the tiles of the
next step. Full pairs skip the mask; others compare key positions with the bounds of each query.

Array layout: (B, H, D, L), tokens in the lanes. For D = 64, XLA itself lays out (B, L, H, D) arrays
like this in memory, since 64 in the last place would leave half of the 128 lanes empty; so the
transposition here only renames axes. (In programs compiled for a transformer layer, kernels that
take (B, L, H * D) have every operand and result copied. These have no copies for D = 64 and, for
D = 128, one copy of q, k and v together.) Scores are held as (keys, queries): then the maximum, the
sum and the logsumexp of the queries are rows of lanes, softmax reduces over whole registers, and of
all matmuls only k^T q and v^T d_out transpose an operand, a small one. The end of the sequence is
not padded: the last tile reads past it, and the kernels replace what they find there by zeros.

Not yet run on a TPU: values are tested in Pallas' interpret mode, and compilation with libtpu.

Letters in shapes: B batch, L all tokens, H heads, D head dim, S steps over the heads, h heads of
one step.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic_tpu_kernels as kernels
from pallas_kernels import tiles
from pallas_kernels.platform import current_platform

# Candidate tile lengths. Shorter tiles would compute fewer masked scores, but there are 128 lanes,
# and a matmul unit that has loaded 128 x 128 weights needs about as many rows to be busy.
_TILE_LENGTHS = (128, 256, 512)
# Bytes of one operand's tile. There are up to seven operands and results with two buffers each, two
# float32 sums, and the scores of one head: with this limit they stay under the 16 MiB that a kernel
# may use by default.
_MAX_TILE_BYTES = 2**18
# A cost model to compare tile sizes: roughly a v5e at half its bfloat16 peak, its memory bandwidth,
# and the start of one grid step. Estimates, not measurements.
_FLOPS_PER_SECOND, _BYTES_PER_SECOND, _SECONDS_PER_STEP = 1e14, 8e11, 3e-7


@dataclasses.dataclass(frozen=True)
class TileSizes:
    """What one grid step works on."""

    queries: int
    keys: int
    heads: int  # a divisor of H
    shift: int = 0  # padding tokens before the first, to align the edges of large blocks with tiles


def unsupported_reason(q) -> str | None:
    """Returns None if the kernels can run here on arrays like q, otherwise the reason in words."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"supports float32, bfloat16; got {q.dtype}"
    if current_platform() != "tpu":
        return f"requires a TPU; this process runs on {current_platform()}"
    return None


def attention(q, k, v, block_sizes, pattern, scale, interpret=False):
    """Block attention; see `pallas_kernels.api.block_attention`, which validates the arguments.

    On a mesh of several devices, call it inside `jax.shard_map` over batch and heads: the compiler
    cannot split a kernel by itself.

    Args:
      q, k, v: (B, L, H, D) each, float32 or bfloat16.
      block_sizes, pattern, scale: as in `block_attention`.
      interpret: runs the arithmetic of the kernels in plain JAX, on any platform. For tests; slow.

    Returns:
      (B, L, H, D), dtype of q.
    """
    sizes = choose_tile_sizes(block_sizes, pattern, *q.shape[2:], q.dtype.itemsize)
    q, k, v = (x.transpose(0, 2, 3, 1) for x in _match_varying_axes(q, k, v))  # (B, H, D, L)
    if sizes.shift:
        block_sizes = (sizes.shift, *block_sizes)
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (sizes.shift, 0))) for x in (q, k, v))
    out = _attend(q, k, v, block_sizes, pattern, scale, sizes, interpret)
    return out[..., sizes.shift :].transpose(0, 3, 1, 2)


@functools.lru_cache(maxsize=256)
def choose_tile_sizes(
    block_sizes: tuple[int, ...], pattern: str, heads: int, dim: int, itemsize: int
) -> TileSizes:
    """Chooses the tile sizes with the least estimated time of a forward and backward pass.

    `tests/test_mosaic_tpu.py` lists the choices for 16 heads of 64. A shift saves the 256-pixel
    list 6 of 20 tile pairs.

    Args:
      block_sizes: lengths of the consecutive blocks.
      pattern: "diagonal" or "causal".
      heads: H.
      dim: D.
      itemsize: bytes of one number.
    """
    candidates = []
    for queries, keys in itertools.product(_TILE_LENGTHS, _TILE_LENGTHS):
        most = max(1, _MAX_TILE_BYTES // (max(queries, keys) * dim * itemsize))
        heads_per_step = max(n for n in range(1, most + 1) if heads % n == 0)
        shifts = [0]
        # The padding is a block of its own, which no query of another block sees, if the pattern is
        # diagonal.
        if pattern == "diagonal" and len(block_sizes) > 1:
            shifts = range(0, min(queries, keys), 8)
        candidates += [TileSizes(queries, keys, heads_per_step, shift) for shift in shifts]
    return min(
        candidates, key=lambda sizes: _estimate_seconds(sizes, block_sizes, pattern, dim, itemsize)
    )


def _estimate_seconds(sizes, block_sizes, pattern, dim, itemsize):
    """The estimated time of a forward and backward pass of one head."""
    shifted = (sizes.shift, *block_sizes) if sizes.shift else block_sizes
    num_pairs = tiles.tile_pairs(shifted, pattern, sizes.queries, sizes.keys)[0].sum()
    # Nine matmuls in three kernels. The unit is 128 deep even if a head is not; float32 takes six
    # passes.
    passes = 6 if itemsize == 4 else 1
    flops = num_pairs * sizes.queries * sizes.keys * 9 * 2 * max(dim, 128) * passes
    # Two kernels copy k and v for each pair, one copies q and d_out; a shift reads and writes these
    # four once more.
    shift_tokens = 8 * sum(shifted) if sizes.shift else 0
    tokens = num_pairs * (4 * sizes.keys + 2 * sizes.queries) + shift_tokens
    copied_bytes = tokens * dim * itemsize
    # A sum, although most copies overlap with matmuls: other chips have more FLOPs per byte.
    return (
        flops / _FLOPS_PER_SECOND
        + copied_bytes / _BYTES_PER_SECOND
        + 3 * num_pairs * _SECONDS_PER_STEP / sizes.heads
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6, 7))
def _attend(q, k, v, block_sizes, pattern, scale, sizes, interpret):
    """`attention` of (B, H, D, L) arrays."""
    return _forward(q, k, v, block_sizes, pattern, scale, sizes, interpret)[0]


def _forward(q, k, v, block_sizes, pattern, scale, sizes, interpret):
    config = _make_config(q, block_sizes, pattern, scale, sizes, interpret)
    out, lse = _call_kernel(
        config,
        kernels.forward_kernel,
        name="block_attention_forward",
        inputs={"queries": [q], "keys": [k, v]},
        outputs=("queries", "stats"),
        scratch=[config.tile_shape("stats")] * 2 + [config.tile_shape("queries")],
        num_matmuls=2,
    )
    return out, (q, k, v, out, lse)


def _backward(block_sizes, pattern, scale, sizes, interpret, residuals, d_out):
    q, k, v, out, lse = residuals
    config = _make_config(q, block_sizes, pattern, scale, sizes, interpret)
    d_q, delta = _call_kernel(
        config,
        kernels.d_q_kernel,
        name="block_attention_d_q",
        inputs={"queries": [q, out, d_out], "keys": [k, v], "stats": [lse]},
        outputs=("queries", "stats"),
        scratch=[config.tile_shape("queries")],
        num_matmuls=3,
    )
    d_k, d_v = _call_kernel(
        config,
        kernels.d_kv_kernel,
        name="block_attention_d_kv",
        inputs={"queries": [q, d_out], "keys": [k, v], "stats": [lse, delta]},
        outputs=("keys", "keys"),
        scratch=[config.tile_shape("keys")] * 2,
        num_matmuls=4,
    )
    return d_q, d_k, d_v


_attend.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Everything static in the three kernels of one attention.

    Arrays are of three kinds. "queries" and "keys" are (B, H, D, L), split along L into tiles of
    queries or keys. "stats", one float32 per query, are (B, S, h, padded L).
    """

    batch: int
    heads: int
    dim: int
    length: int
    dtype: jnp.dtype
    block_sizes: tuple[int, ...]
    pattern: str
    scale: float
    tile_sizes: TileSizes
    interpret: bool

    @property
    def head_steps(self):
        """S, the number of grid steps over the heads."""
        return self.heads // self.tile_sizes.heads

    @property
    def padded_length(self):
        """L rounded up to whole tiles of queries."""
        return pl.cdiv(self.length, self.tile_sizes.queries) * self.tile_sizes.queries

    def array_type(self, kind):
        """(shape, dtype) of a whole array of a kind."""
        if kind == "stats":
            shape = (self.batch, self.head_steps, self.tile_sizes.heads, self.padded_length)
            return shape, jnp.dtype(jnp.float32)
        return (self.batch, self.heads, self.dim, self.length), self.dtype

    def tile_shape(self, kind):
        """Shape of the part of an array that one step works on."""
        sizes = self.tile_sizes
        if kind == "stats":
            return sizes.heads, sizes.queries
        return sizes.heads, self.dim, sizes.queries if kind == "queries" else sizes.keys

    def block_spec(self, kind):
        """Which part of an array that is, for batch index b, head step s and pair n."""
        shape = self.tile_shape(kind)
        if kind == "stats":
            return pl.BlockSpec(
                (None, None, *shape), lambda b, s, n, q_tiles, *_: (b, s, 0, q_tiles[n])
            )
        if kind == "queries":
            return pl.BlockSpec((None, *shape), lambda b, s, n, q_tiles, *_: (b, s, 0, q_tiles[n]))
        return pl.BlockSpec(
            (None, *shape), lambda b, s, n, q_tiles, k_tiles, _: (b, s, 0, k_tiles[n])
        )

    def list_pairs(self, by_key):
        """Lists the tile pairs in the order of the grid.

        Args:
          by_key: whether the pairs of a key tile are consecutive, else those of a query tile.

        Returns:
          Query tiles, key tiles and flags: (pairs,) int32 each.
        """
        visited, full = tiles.tile_pairs(
            self.block_sizes, self.pattern, self.tile_sizes.queries, self.tile_sizes.keys
        )
        outer, inner = np.nonzero(visited.T if by_key else visited)
        q_tiles, k_tiles = (inner, outer) if by_key else (outer, inner)
        is_new = np.diff(outer, prepend=-1, append=-1) != 0
        partial = ~full[q_tiles, k_tiles]
        flags = kernels.FIRST * is_new[:-1] + kernels.LAST * is_new[1:] + kernels.PARTIAL * partial
        return [x.astype(np.int32) for x in (q_tiles, k_tiles, flags)]


def _make_config(q, block_sizes, pattern, scale, tile_sizes, interpret):
    """The KernelConfig of arrays (B, H, D, L) like q."""
    batch, heads, dim, length = q.shape
    return KernelConfig(
        batch=batch,
        heads=heads,
        dim=dim,
        length=length,
        dtype=q.dtype,
        block_sizes=block_sizes,
        pattern=pattern,
        scale=scale,
        tile_sizes=tile_sizes,
        interpret=interpret,
    )


def _call_kernel(config, kernel, name, inputs, outputs, scratch, num_matmuls):
    """Calls a kernel over its tile pairs.

    Args:
      config: a `KernelConfig`.
      kernel: a function of mosaic_tpu_kernels.py.
      name: name of the kernel, in profiles.
      inputs: {kind: arrays}; the kernel gets them in this order.
      outputs: kinds of the results. With "keys" the pairs are ordered by key tile, otherwise by
        query tile.
      scratch: shapes of scratch buffers, of float32.
      num_matmuls: matmuls of a pair, of keys x queries x D for each head.

    Returns:
      The list of results.
    """
    pairs = config.list_pairs(by_key="keys" in outputs)
    kinds = [kind for kind, arrays in inputs.items() for _ in arrays]
    arrays = _match_varying_axes(*itertools.chain(*inputs.values()))
    # A query past the end sees no key.
    bounds = np.pad(
        tiles.query_bounds(config.block_sizes, config.pattern),
        ((0, 0), (0, config.padded_length - config.length)),
    )
    axes = jax.typeof(arrays[0]).manual_axis_type
    partial_kinds = sorted({bool(flag & kernels.PARTIAL) for flag in pairs[2]})
    return pl.pallas_call(
        functools.partial(kernel, config, partial_kinds),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(pairs),
            grid=(config.batch, config.head_steps, len(pairs[0])),
            in_specs=[
                pl.BlockSpec(
                    (2, config.tile_sizes.queries), lambda b, s, n, q_tiles, *_: (0, q_tiles[n])
                ),
                *map(config.block_spec, kinds),
            ],
            out_specs=[config.block_spec(kind) for kind in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(*config.array_type(kind), manual_axis_type=axes)
            for kind in outputs
        ],
        # Images and heads are independent: chips with two cores split them.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_estimate_cost(config, pairs, [*kinds, *outputs], num_matmuls),
        interpret=config.interpret,
        name=name,
    )(*pairs, bounds, *arrays)


def _estimate_cost(config, pairs, kinds, num_matmuls):
    """What the pairs compute, including masked scores, and copy.

    A tile that stays the same in the next step is not copied again.
    """
    q_tiles, k_tiles, _ = pairs
    sizes = config.tile_sizes
    num_scores = config.batch * config.heads * len(q_tiles) * sizes.queries * sizes.keys
    copied = 0
    for kind in kinds:
        copies = 1 + np.count_nonzero(np.diff(k_tiles if kind == "keys" else q_tiles))
        copied += copies * np.prod(config.tile_shape(kind)) * config.array_type(kind)[1].itemsize
    return pl.CostEstimate(
        flops=2 * num_matmuls * num_scores * config.dim,
        bytes_accessed=int(config.batch * config.head_steps * copied),
        transcendentals=num_scores,
    )


def _match_varying_axes(*arrays):
    """Inside shard_map: marks all arrays as varying over every mesh axis that one varies over."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    missing = [tuple(frozenset().union(*varying) - axes) for axes in varying]
    return [
        jax.lax.pcast(x, axes, to="varying") if axes else x
        for x, axes in zip(arrays, missing, strict=True)
    ]
