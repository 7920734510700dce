"""Block attention on Hopper, forward and backward, as what one warpgroup does with an item (mosaic_gpu_program.py).

FlashAttention 2 and 3 (arXiv 2307.08691, 2407.08608) over lists of tiles. Scores are in base 2: log2_scale is
scale * log2(e), and the logsumexp is a log2 too. No atomics: the same inputs give the same bits.

Each kernel is a function of the Program, the arrays in global memory by name, the item, how many of its rows are this
warpgroup's, the own buffer, and the number of steps before it. Between `pass_turn` after the first products of a step
and the second turn, the matrix units are the other warpgroup's.
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_gpu_plan import NO_BOUND, ROWS
from pallas_kernels.mosaic_gpu_program import along_columns, along_rows, whole_steps

# A maximum over no keys yet. Finite, so that its difference with itself is no NaN.
_NO_SCORE = -3e38
# float16: |scaled d_scores| is at most twice this, under float16's largest, 65504.
HALF_RANGE = 16384.0


def _loop(step, phases, carry):
    """step(masked, columns, j, carry) for the steps of (masked, columns, begin, end), one phase after the other."""
    for masked, columns, begin, end in phases:
        carry = lax.fori_loop(begin, end, functools.partial(step, masked, columns), carry)
    return carry


def forward(
    log2_scale, dtype, all_columns, narrower, program, refs, work, rows, buffer, steps_before
):
    """out and lse of a tile of queries.

    Own: q. Streams: (k,), (v,). Outputs: out; a number a row: lse.
    """
    plgpu, dim = program.plgpu, refs["out"].shape[-1]
    (q,) = (x.at[buffer, program.warpgroup] for x in program.own)
    (k,), (v,) = program.streams
    tile = work["tile"] + program.warpgroup
    lo, hi = (program.load_rows(refs["bounds"].at[tile, side]) for side in (0, 1))

    def step(masked, columns, j, carry):
        acc, top, total = carry
        stage = program.stage(steps_before + j)
        plgpu.barrier_wait(program.ready[0].at[stage])

        def score(ref):
            plgpu.wgmma(ref, q, k.at[stage, pl.ds(0, columns)].transpose((1, 0)))
            program.pass_turn()
            return ref[...]

        scores = pl.run_scoped(score, plgpu.ACC((ROWS, columns), jnp.float32))
        plgpu.barrier_arrive(program.free[0].at[stage])
        if masked:
            seen = program.seen(lo, hi, work["other"] + j * all_columns, columns)
            scores = jnp.where(seen, scores * log2_scale, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(axis=1))
            weights = jnp.exp2(scores - along_rows(new_top, columns))
        else:
            # The product with the scale is fused into the subtraction; so the maximum is taken of unscaled scores.
            largest = scores.max(axis=1) if log2_scale >= 0 else scores.min(axis=1)
            new_top = jnp.maximum(top, largest * log2_scale)
            weights = jnp.exp2(scores * log2_scale - along_rows(new_top, columns))
        shrink = jnp.exp2(top - new_top)
        acc *= along_rows(shrink, dim)
        half = weights.astype(dtype)
        total = total * shrink + weights.sum(axis=1)
        # All of the softmax before the other warpgroup's.
        acc, total, new_top, half = lax.optimization_barrier((acc, total, new_top, half))
        program.give_turn()
        plgpu.barrier_wait(program.ready[1].at[stage])
        program.wait_turn()

        def weigh(ref):
            plgpu.wgmma(ref, half, v.at[stage, pl.ds(0, columns)])

        acc = pl.run_state(weigh)(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(program.free[1].at[stage])
        return acc, new_top, total

    no_score = plgpu.layout_cast(jnp.full((ROWS,), _NO_SCORE, jnp.float32), program.per_row)
    split, steps, last = work["split"], work["steps"], work["last"]
    ends = [(True, fewer, steps - jnp.where(last == fewer, 1, 0), steps) for fewer in narrower]
    phases = [(False, all_columns, 0, split), (True, all_columns, split, whole_steps(work)), *ends]
    acc, top, total = _loop(step, phases, (program.zeros(ROWS, dim), no_score, program.zeros(ROWS)))
    plgpu.barrier_arrive(program.own_free.at[buffer])
    out = (acc * along_rows(1.0 / total, dim)).astype(dtype)
    lse = top + jnp.log(total) * math.log2(math.e)
    program.wait_for_outputs()
    program.write(work, rows, [out], [refs["out"]], [lse], [refs["lse"]])


def _two_products(program, columns, first, second):
    """own other^T of two pairs (own (ROWS, D), other (columns, D)), and the turn passed on meanwhile: (ROWS, columns) each."""
    plgpu = program.plgpu

    def products(*refs):
        for ref, (own, other) in zip(refs, (first, second), strict=True):
            plgpu.wgmma(ref, own, other.transpose((1, 0)))
        program.pass_turn()
        return tuple(ref[...] for ref in refs)

    matrix = plgpu.ACC((ROWS, columns), jnp.float32)
    return pl.run_scoped(products, matrix, matrix)


def backward_queries(scale, dtype, columns, program, refs, work, rows, buffer, steps_before):
    """d_q of a tile of queries, delta = rowsum(out * d_out), and the largest |d_out| of each row.

    Own: q, d_out, out. One stream: (k, v). Also reads lse (B, H, tiles, ROWS) and, for float16, top_v (B, H), the
    largest |v|. Outputs: d_q; numbers a row: delta, top_d_out.
    """
    plgpu, dim = program.plgpu, refs["d_q"].shape[-1]
    log2_scale = scale * math.log2(math.e)
    q, d_out, out = (x.at[buffer, program.warpgroup] for x in program.own)
    ((k, v),) = program.streams
    tile = work["tile"] + program.warpgroup
    lo, hi = (program.load_rows(refs["bounds"].at[tile, side]) for side in (0, 1))
    lse = program.load_rows(refs["lse"].at[work["batch"], work["head"], tile])
    d_out_numbers = d_out[...].astype(jnp.float32)
    delta = (out[...].astype(jnp.float32) * d_out_numbers).sum(axis=1)
    top_d_out = jnp.abs(d_out_numbers).max(axis=1)
    # What d_scores are multiplied with before they become float16: small gradients stay normal, none overflows, since
    # |d_out . v| <= D max|d_out| max|v|.
    factor = None
    if dtype == jnp.float16:
        top_v = refs["top_v"][work["batch"], work["head"]]
        factor = HALF_RANGE / (dim * jnp.maximum(top_d_out * top_v, 1e-30))
    scaled_delta = delta if factor is None else delta * factor

    def step(masked, columns, j, d_q):
        stage = program.stage(steps_before + j)
        plgpu.barrier_wait(program.ready[0].at[stage])

        scores, d_weights = _two_products(program, columns, (q, k.at[stage]), (d_out, v.at[stage]))
        weights = jnp.exp2(scores * log2_scale - along_rows(lse, columns))
        if masked:
            seen = program.seen(lo, hi, work["other"] + j * columns, columns)
            weights = jnp.where(seen, weights, 0.0)
        if factor is not None:
            d_weights *= along_rows(factor, columns)
        d_scores = (weights * (d_weights - along_rows(scaled_delta, columns))).astype(dtype)
        d_q, d_scores = lax.optimization_barrier((d_q, d_scores))
        program.pass_turn()

        def update(ref):
            plgpu.wgmma(ref, d_scores, k.at[stage])

        d_q = pl.run_state(update)(plgpu.ACC.init(d_q))
        plgpu.barrier_arrive(program.free[0].at[stage])
        return d_q

    phases = ((False, columns, 0, work["split"]), (True, columns, work["split"], work["steps"]))
    d_q = _loop(step, phases, program.zeros(ROWS, dim))
    plgpu.barrier_arrive(program.own_free.at[buffer])
    d_q = d_q * scale if factor is None else d_q * along_rows(scale / factor, dim)
    program.wait_for_outputs()
    # Rows that are no query are rows of others: what they hold here must not count.
    is_query = hi < NO_BOUND
    row_results = [jnp.where(is_query, x, 0.0) for x in (delta, top_d_out)]
    program.write(
        work,
        rows,
        [d_q.astype(dtype)],
        [refs["d_q"]],
        row_results,
        [refs["delta"], refs["top_d_out"]],
    )


def backward_keys(scale, dtype, columns, program, refs, work, rows, buffer, steps_before):
    """d_k and d_v of a tile of keys.

    Own: k, v. One stream: (q, d_out, lse, delta), lse and delta (B, H, steps, columns), an lse of inf where there is no
    query. For float16 delta is multiplied by factor (B, H), which d_scores are to be multiplied with. Outputs: d_k, d_v.
    """
    plgpu, dim = program.plgpu, refs["d_k"].shape[-1]
    log2_scale = scale * math.log2(math.e)
    k, v = (x.at[buffer, program.warpgroup] for x in program.own)
    ((q, d_out, lse_smem, delta_smem),) = program.streams
    tile = work["tile"] + program.warpgroup
    lo, hi = (program.load_rows(refs["bounds"].at[tile, side]) for side in (0, 1))
    factor = refs["factor"][work["batch"], work["head"]] if dtype == jnp.float16 else None

    def step(masked, columns, j, carry):
        d_k, d_v = carry
        stage = program.stage(steps_before + j)
        plgpu.barrier_wait(program.ready[0].at[stage])

        scores, d_weights = _two_products(program, columns, (k, q.at[stage]), (v, d_out.at[stage]))
        lse = plgpu.load(lse_smem.at[stage], layout=program.per_column)
        weights = jnp.exp2(scores * log2_scale - along_columns(lse))
        if masked:
            seen = program.seen(lo, hi, work["other"] + j * columns, columns)
            weights = jnp.where(seen, weights, 0.0)
        if factor is not None:
            d_weights *= factor
        delta = plgpu.load(delta_smem.at[stage], layout=program.per_column)
        d_scores = (weights * (d_weights - along_columns(delta))).astype(dtype)
        weights = weights.astype(dtype)
        d_k, d_v, d_scores, weights = lax.optimization_barrier((d_k, d_v, d_scores, weights))
        program.pass_turn()

        def update(refs):
            d_k_ref, d_v_ref = refs
            plgpu.wgmma(d_v_ref, weights, d_out.at[stage])
            plgpu.wgmma(d_k_ref, d_scores, q.at[stage])

        d_k, d_v = pl.run_state(update)((plgpu.ACC.init(d_k), plgpu.ACC.init(d_v)))
        plgpu.barrier_arrive(program.free[0].at[stage])
        return d_k, d_v

    phases = ((True, columns, 0, work["split"]), (False, columns, work["split"], work["steps"]))
    d_k, d_v = _loop(step, phases, (program.zeros(ROWS, dim), program.zeros(ROWS, dim)))
    plgpu.barrier_arrive(program.own_free.at[buffer])
    d_k = d_k * (scale if factor is None else scale / factor)
    program.wait_for_outputs()
    program.write(work, rows, [d_k.astype(dtype), d_v.astype(dtype)], [refs["d_k"], refs["d_v"]])
