"""The arithmetic of the Mosaic GPU kernels: what one warpgroup does with one item.

FlashAttention 2 and 3 (arXiv 2307.08691, 2407.08608) over lists of tiles, for Hopper GPUs. Scores
are in base 2: log2_scale is scale * log2(e), and lse is the base-2 logsumexp. delta is
rowsum(out * d_out), amax a largest absolute value. No kernel uses atomics: the same inputs give the
same bits.

Each kernel is a function that `mosaic_gpu_pipeline.run_kernel` calls. Its arguments, after the
constants, are the KernelContext, the arrays in global memory by name, the item, how many of its
rows are this warpgroup's, the resident buffer, and the number of steps before the item. Between the
two turns that a step passes, after its first products and after its softmax, the matrix units
belong to the other warpgroup.
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_gpu_pipeline import along_columns, along_rows, num_whole_steps
from pallas_kernels.mosaic_gpu_work_lists import NO_BOUND, ROWS

# The maximum over no keys. Finite, so that its difference with itself is not NaN.
_NO_SCORE = -3e38
# float16: |scaled d_scores| is at most twice this, below the largest finite float16, 65504.
FLOAT16_LIMIT = 16384.0


def _run_phases(step, phases, carry):
    """Runs the steps of all phases, one phase after the other.

    Args:
      step: a function (masked, columns, j, carry) -> carry.
      phases: (masked, columns, begin, end) each: steps begin <= j < end.
      carry: the first carry.

    Returns:
      The last carry.
    """
    for masked, columns, begin, end in phases:
        carry = lax.fori_loop(begin, end, functools.partial(step, masked, columns), carry)
    return carry


def forward(
    log2_scale,
    dtype,
    whole_columns,
    partial_columns,
    context,
    refs,
    item,
    num_rows,
    buffer,
    steps_before,
):
    """out and lse of a tile of queries.

    Resident: q. Streams: (k,), (v,). Outputs: out, and per row lse.
    """
    plgpu, dim = context.plgpu, refs["out"].shape[-1]
    (q,) = (x.at[buffer, context.warpgroup] for x in context.resident)
    (k,), (v,) = context.streams
    tile = item["tile"] + context.warpgroup
    lower, upper = (context.load_rows(refs["bounds"].at[tile, side]) for side in (0, 1))

    def step(masked, columns, j, carry):
        acc, row_max, row_sum = carry  # (ROWS, D), (ROWS,), (ROWS,)
        stage = context.stage(steps_before + j)
        plgpu.barrier_wait(context.ready[0].at[stage])

        def score(ref):
            plgpu.wgmma(ref, q, k.at[stage, pl.ds(0, columns)].transpose((1, 0)))
            context.pass_turn()
            return ref[...]

        scores = pl.run_scoped(score, plgpu.ACC((ROWS, columns), jnp.float32))
        plgpu.barrier_arrive(context.free[0].at[stage])
        if masked:
            first_key = item["streamed_start"] + j * whole_columns
            visible = context.visible(lower, upper, first_key, columns)
            scores = jnp.where(visible, scores * log2_scale, -jnp.inf)
            new_max = jnp.maximum(row_max, scores.max(axis=1))
            weights = jnp.exp2(scores - along_rows(new_max, columns))
        else:
            # The compiler fuses the product with the scale into the subtraction, so the maximum is
            # taken of unscaled scores.
            largest = scores.max(axis=1) if log2_scale >= 0 else scores.min(axis=1)
            new_max = jnp.maximum(row_max, largest * log2_scale)
            weights = jnp.exp2(scores * log2_scale - along_rows(new_max, columns))
        alpha = jnp.exp2(row_max - new_max)
        acc *= along_rows(alpha, dim)
        half_weights = weights.astype(dtype)
        row_sum = row_sum * alpha + weights.sum(axis=1)
        # All of this softmax runs before that of the other warpgroup.
        acc, row_sum, new_max, half_weights = lax.optimization_barrier(
            (acc, row_sum, new_max, half_weights)
        )
        context.give_turn()
        plgpu.barrier_wait(context.ready[1].at[stage])
        context.wait_turn()

        def accumulate(ref):
            plgpu.wgmma(ref, half_weights, v.at[stage, pl.ds(0, columns)])

        acc = pl.run_state(accumulate)(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(context.free[1].at[stage])
        return acc, new_max, row_sum

    no_score = plgpu.layout_cast(jnp.full((ROWS,), _NO_SCORE, jnp.float32), context.per_row)
    split, num_steps, last = item["split"], item["num_steps"], item["last_columns"]
    partial_phases = [
        (True, columns, num_steps - jnp.where(last == columns, 1, 0), num_steps)
        for columns in partial_columns
    ]
    phases = [
        (False, whole_columns, 0, split),
        (True, whole_columns, split, num_whole_steps(item)),
        *partial_phases,
    ]
    acc, row_max, row_sum = _run_phases(
        step, phases, (context.zeros(ROWS, dim), no_score, context.zeros(ROWS))
    )
    plgpu.barrier_arrive(context.resident_free.at[buffer])
    out = (acc * along_rows(1.0 / row_sum, dim)).astype(dtype)
    lse = row_max + jnp.log(row_sum) * math.log2(math.e)
    context.wait_for_outputs()
    context.write(item, num_rows, [out], [refs["out"]], [lse], [refs["lse"]])


def _two_products(context, columns, first, second):
    """Computes resident streamed^T of two pairs, and passes the turn meanwhile.

    Args:
      first, second: (resident (ROWS, D), streamed (columns, D)) each.

    Returns:
      Two (ROWS, columns) float32.
    """
    plgpu = context.plgpu

    def products(*refs):
        for ref, (resident, streamed) in zip(refs, (first, second), strict=True):
            plgpu.wgmma(ref, resident, streamed.transpose((1, 0)))
        context.pass_turn()
        return tuple(ref[...] for ref in refs)

    matrix = plgpu.ACC((ROWS, columns), jnp.float32)
    return pl.run_scoped(products, matrix, matrix)


def backward_queries(scale, dtype, columns, context, refs, item, num_rows, buffer, steps_before):
    """d_q, delta and, per row, d_out_amax of a tile of queries.

    Resident: q, d_out, out. One stream: (k, v). Also reads lse (B, H, tiles, ROWS) and, for
    float16, v_amax (B, H). Outputs: d_q, and per row delta and d_out_amax.
    """
    plgpu, dim = context.plgpu, refs["d_q"].shape[-1]
    log2_scale = scale * math.log2(math.e)
    q, d_out, out = (x.at[buffer, context.warpgroup] for x in context.resident)
    ((k, v),) = context.streams
    tile = item["tile"] + context.warpgroup
    lower, upper = (context.load_rows(refs["bounds"].at[tile, side]) for side in (0, 1))
    lse = context.load_rows(refs["lse"].at[item["batch"], item["head"], tile])
    d_out_wide = d_out[...].astype(jnp.float32)  # (ROWS, D)
    delta = (out[...].astype(jnp.float32) * d_out_wide).sum(axis=1)  # (ROWS,)
    d_out_amax = jnp.abs(d_out_wide).max(axis=1)  # (ROWS,)
    # The factor of d_scores before they are rounded to float16: small gradients stay normal
    # numbers and none overflows, since |d_out . v| <= D max|d_out| max|v|.
    d_scores_scale = None
    if dtype == jnp.float16:
        v_amax = refs["v_amax"][item["batch"], item["head"]]
        d_scores_scale = FLOAT16_LIMIT / (dim * jnp.maximum(d_out_amax * v_amax, 1e-30))
    scaled_delta = delta if d_scores_scale is None else delta * d_scores_scale

    def step(masked, columns, j, d_q):
        stage = context.stage(steps_before + j)
        plgpu.barrier_wait(context.ready[0].at[stage])

        scores, d_p = _two_products(context, columns, (q, k.at[stage]), (d_out, v.at[stage]))
        p = jnp.exp2(scores * log2_scale - along_rows(lse, columns))
        if masked:
            first_key = item["streamed_start"] + j * columns
            p = jnp.where(context.visible(lower, upper, first_key, columns), p, 0.0)
        if d_scores_scale is not None:
            d_p *= along_rows(d_scores_scale, columns)
        d_scores = (p * (d_p - along_rows(scaled_delta, columns))).astype(dtype)
        d_q, d_scores = lax.optimization_barrier((d_q, d_scores))
        context.pass_turn()

        def accumulate(ref):
            plgpu.wgmma(ref, d_scores, k.at[stage])

        d_q = pl.run_state(accumulate)(plgpu.ACC.init(d_q))
        plgpu.barrier_arrive(context.free[0].at[stage])
        return d_q

    split, num_steps = item["split"], item["num_steps"]
    phases = ((False, columns, 0, split), (True, columns, split, num_steps))
    d_q = _run_phases(step, phases, context.zeros(ROWS, dim))
    plgpu.barrier_arrive(context.resident_free.at[buffer])
    d_q = d_q * scale if d_scores_scale is None else d_q * along_rows(scale / d_scores_scale, dim)
    context.wait_for_outputs()
    # Rows past the end of the tile hold rows of another tile, which must not count here.
    is_query = upper < NO_BOUND
    row_results = [jnp.where(is_query, x, 0.0) for x in (delta, d_out_amax)]
    context.write(
        item,
        num_rows,
        [d_q.astype(dtype)],
        [refs["d_q"]],
        row_results,
        [refs["delta"], refs["d_out_amax"]],
    )


def backward_keys(scale, dtype, columns, context, refs, item, num_rows, buffer, steps_before):
    """d_k and d_v of a tile of keys.

    Resident: k, v. One stream: (q, d_out, lse, delta); lse and delta are (B, H, steps, columns),
    with an lse of inf where there is no query. For float16, also reads d_scores_scale (B, H), and
    delta is multiplied by it. Outputs: d_k, d_v.
    """
    plgpu, dim = context.plgpu, refs["d_k"].shape[-1]
    log2_scale = scale * math.log2(math.e)
    k, v = (x.at[buffer, context.warpgroup] for x in context.resident)
    ((q, d_out, lse_smem, delta_smem),) = context.streams
    tile = item["tile"] + context.warpgroup
    lower, upper = (context.load_rows(refs["bounds"].at[tile, side]) for side in (0, 1))
    d_scores_scale = None
    if dtype == jnp.float16:
        d_scores_scale = refs["d_scores_scale"][item["batch"], item["head"]]

    def step(masked, columns, j, carry):
        d_k, d_v = carry
        stage = context.stage(steps_before + j)
        plgpu.barrier_wait(context.ready[0].at[stage])

        scores, d_p = _two_products(context, columns, (k, q.at[stage]), (v, d_out.at[stage]))
        lse = plgpu.load(lse_smem.at[stage], layout=context.per_column)  # (columns,)
        p = jnp.exp2(scores * log2_scale - along_columns(lse))
        if masked:
            first_query = item["streamed_start"] + j * columns
            p = jnp.where(context.visible(lower, upper, first_query, columns), p, 0.0)
        if d_scores_scale is not None:
            d_p *= d_scores_scale
        delta = plgpu.load(delta_smem.at[stage], layout=context.per_column)  # (columns,)
        d_scores = (p * (d_p - along_columns(delta))).astype(dtype)
        p = p.astype(dtype)
        d_k, d_v, d_scores, p = lax.optimization_barrier((d_k, d_v, d_scores, p))
        context.pass_turn()

        def accumulate(refs):
            d_k_ref, d_v_ref = refs
            plgpu.wgmma(d_v_ref, p, d_out.at[stage])
            plgpu.wgmma(d_k_ref, d_scores, q.at[stage])

        d_k, d_v = pl.run_state(accumulate)((plgpu.ACC.init(d_k), plgpu.ACC.init(d_v)))
        plgpu.barrier_arrive(context.free[0].at[stage])
        return d_k, d_v

    split, num_steps = item["split"], item["num_steps"]
    phases = ((True, columns, 0, split), (False, columns, split, num_steps))
    d_k, d_v = _run_phases(step, phases, (context.zeros(ROWS, dim), context.zeros(ROWS, dim)))
    plgpu.barrier_arrive(context.resident_free.at[buffer])
    d_k = d_k * (scale if d_scores_scale is None else scale / d_scores_scale)
    context.wait_for_outputs()
    d_k, d_v = d_k.astype(dtype), d_v.astype(dtype)
    context.write(item, num_rows, [d_k, d_v], [refs["d_k"], refs["d_v"]])
