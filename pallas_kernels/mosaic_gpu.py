"""Block attention on Hopper: a forward kernel in Pallas' Mosaic GPU, and the backward kernels of triton.py.

The kernel is FlashAttention 3's (arXiv 2407.08608) over a list of tiles: one warpgroup copies keys and values into
shared memory (TMA), two compute, each with 64 queries; while one has the matrix units (wgmma) the other takes its
softmax. Programs are persistent and their work is listed beforehand (mosaic_gpu_plan.py). No atomics: the same inputs
give the same bits.

It is faster than the Triton kernel where blocks are long (benchmarks/RESULTS.md), and there `block_attention` takes it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic_gpu_plan, triton, triton_plan
from pallas_kernels.mosaic_gpu_plan import EVERY_KEY, ITEM, ROWS, WARPGROUPS

_OLDEST_JAX = (0, 11)  # Pallas' interface to Mosaic GPU still changes
_DTYPES = ("float16", "bfloat16")
_DIM = 64
_STAGES = 2  # tiles of keys, and of values, in shared memory
_LOG2_E = math.log2(math.e)
# A maximum over no keys yet. Finite, so that its difference with itself is no NaN.
_NO_SCORE = -3e38


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the forward kernel cuts its work."""

    columns: int = 256  # keys of a step; a multiple of 8, at most 256
    together: int = 8  # heads that go through the tiles side by side, at most


# (GPU, L, D, pattern), of half precision: where `benchmarks/attention.py` measured it to be faster than Triton's.
FASTER = {
    ("H100", 9451, 64, "diagonal"): Tuning(),
    ("H100", 9451, 64, "causal"): Tuning(),
}


def why_not(q):
    """None if the kernels can run here on arrays like q, otherwise the reason in words."""
    reason = triton.why_not(q)
    if reason is not None:
        return reason
    if jax.__version_info__ < _OLDEST_JAX:
        return f"it needs jax {'.'.join(map(str, _OLDEST_JAX))} or newer, this is {jax.__version__}"
    if jax.devices()[0].compute_capability != "9.0":
        return f"it needs a Hopper GPU (compute capability 9.0), this is {jax.devices()[0].device_kind}"
    if q.dtype.name not in _DTYPES:
        return f"it takes {', '.join(_DTYPES)}; got {q.dtype}"
    if q.shape[-1] != _DIM:
        return f"it takes a head dim of {_DIM}; got {q.shape[-1]}"
    return None


def is_faster(q, pattern):
    """Whether it was measured to be faster than the other implementations here, on arrays like q."""
    gpu = triton_plan.gpu_name(jax.devices()[0].device_kind)
    return (gpu, q.shape[1], q.shape[3], pattern) in FASTER


def attention(q, k, v, block_sizes, pattern, scale):
    """Block attention; arguments are checked and explained in `pallas_kernels.api.block_attention`."""
    gpu = triton_plan.gpu_name(jax.devices()[0].device_kind)
    tuning = FASTER.get((gpu, q.shape[1], q.shape[3], pattern), Tuning())
    problem = triton_plan.Problem(
        block_sizes, pattern, scale, triton_plan.tuning_for(gpu, q.shape[1], q.shape[3], q.dtype.name, pattern)
    )
    return attend(q, k, v, Call(triton.Call(problem), tuning, jax.devices()[0].core_count))


@dataclasses.dataclass(frozen=True)
class Call:
    """All that is static about a call from JAX."""

    backward: triton.Call
    tuning: Tuning = Tuning()
    multiprocessors: int = 132


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(q, k, v, call):
    """`attention`, with tile sizes and GPU given."""
    return run_forward(call)(q, k, v)[0]


def _forward(q, k, v, call):
    out, lse = run_forward(call)(q, k, v)
    return out, (q, k, v, out, lse)


def _backward(call, residuals, d_out):
    return triton.run_backward(call.backward)(*residuals, d_out)


attend.defvjp(_forward, _backward)


@functools.lru_cache(maxsize=256)
def run_forward(call):
    """(q, k, v), each (B, L, H, D) -> out (B, L, H, D), and lse (B, H, L) float32 in base 2."""

    @triton.batched
    def run(q, k, v):
        # Imported at the first call: slow, and of no use to other devices.
        from jax.experimental.pallas import mosaic_gpu as plgpu

        batch, length, heads, dim = q.shape
        problem, tuning = call.backward.problem, call.tuning
        plan = mosaic_gpu_plan.plan(
            problem.block_sizes,
            problem.pattern,
            batch,
            heads,
            tuning.columns,
            tuning.together,
            call.multiprocessors,
        )
        num_tiles = len(plan.bounds)
        kernel = plgpu.kernel(
            functools.partial(_allocate, plgpu, tuning.columns, dim, q.dtype, problem.scale * _LOG2_E),
            out_type=[
                jax.ShapeDtypeStruct(q.shape, q.dtype),
                jax.ShapeDtypeStruct((batch, heads, num_tiles, ROWS), jnp.float32),
            ],
            grid=(call.multiprocessors,),
            grid_names=("program",),
            num_threads=WARPGROUPS + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
            ),
        )
        out, lse = kernel(q, k, v, *(jnp.asarray(x) for x in (plan.bounds, plan.items, plan.counts)))
        lse = lse.reshape(batch, heads, num_tiles * ROWS)[:, :, plan.place]
        return tuple(triton.varying_like(q, x) for x in (out, lse))

    return run


def _allocate(plgpu, columns, dim, dtype, log2_scale, *refs):
    """The kernel's entry: shared memory and barriers.

    wgmma wants matrices in tiles of (8, 64), and copies of such tiles start at multiples of 8 rows; blocks start
    anywhere. With rows of 64 numbers (128 bytes) a tile is just 8 consecutive rows, and the swizzle goes by addresses;
    so the same memory has two views: in tiles for the products, flat for copies that start and end at any row.
    """
    swizzle = plgpu.SwizzleTransform(128)

    def two_views(shape):
        return plgpu.RefUnion(
            plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), swizzle)),
            plgpu.SMEM(shape, dtype, transforms=(swizzle,)),
        )

    queries, keys = (WARPGROUPS, ROWS, dim), (_STAGES, columns, dim)
    pl.run_scoped(
        functools.partial(_kernel, plgpu, columns, dim, dtype, log2_scale, refs),
        two_views((2, *queries)),
        two_views(keys),
        two_views(keys),
        two_views(queries),
        plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=2),
        plgpu.Barrier(num_barriers=_STAGES),
        plgpu.Barrier(num_barriers=_STAGES),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=2),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=_STAGES),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=_STAGES),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
        collective_axes="warpgroup",
    )


def _kernel(
    plgpu, columns, dim, dtype, log2_scale, refs,
    q_views, k_views, v_views, out_views, lse_smem,
    q_ready, k_ready, v_ready, q_free, k_free, v_free, turn,
):  # fmt: skip
    """One program. `..._ready`: a copy has arrived; `..._free`: both computing warpgroups have read it."""
    q_ref, k_ref, v_ref, bounds_ref, items_ref, counts_ref, out_ref, lse_ref = refs
    (q_smem, q_flat), (k_smem, k_flat), (v_smem, v_flat), (out_smem, out_flat) = q_views, k_views, v_views, out_views
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    matrix, row = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)

    def item(n):
        return {name: items_ref[program, n, column] for column, name in enumerate(ITEM)}

    def buffer(count, number):
        return lax.rem(number, jnp.int32(count))

    def along_rows(x, width):
        return lax.broadcast_in_dim(x, (ROWS, width), [0])

    def take_turns():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def step(work, masked, q, lo, hi, steps_before, j, carry):
        """One tile of keys: the running output, maximum and sum of each query, updated."""
        acc, top, total = carry
        slot = buffer(_STAGES, steps_before + j)
        plgpu.barrier_wait(k_ready.at[slot])

        def score(ref):
            plgpu.wgmma(ref, q, k_smem.at[slot].transpose((1, 0)))
            take_turns()
            return ref[...]

        scores = pl.run_scoped(score, plgpu.ACC((ROWS, columns), jnp.float32))
        plgpu.barrier_arrive(k_free.at[slot])
        if masked:
            keys = plgpu.broadcasted_iota(jnp.int32, (ROWS, columns), 1, layout=matrix)
            keys += work["first_key"] + j * columns
            seen = (keys >= along_rows(lo, columns)) & (keys < along_rows(hi, columns))
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
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(v_ready.at[slot])
        plgpu.barrier_wait(turn)

        def weigh(ref):
            plgpu.wgmma(ref, half, v_smem.at[slot])

        acc = pl.run_state(weigh)(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(v_free.at[slot])
        return acc, new_top, total

    def attend_rows(work, rows, q_slot, steps_before):
        """The item's queries of this warpgroup, `rows` of them."""
        tile = work["tile"] + warpgroup
        lo, hi = (plgpu.load(bounds_ref.at[tile, side], layout=row, optimized=False) for side in (0, 1))
        carry = (
            plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), matrix),
            plgpu.layout_cast(jnp.full((ROWS,), _NO_SCORE, jnp.float32), row),
            plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row),
        )
        for masked, begin, end in ((False, 0, work["full"]), (True, work["full"], work["steps"])):
            body = functools.partial(step, work, masked, q_smem.at[q_slot, warpgroup], lo, hi, steps_before)
            carry = lax.fori_loop(begin, end, body, carry)
        acc, top, total = carry
        plgpu.barrier_arrive(q_free.at[q_slot])
        acc *= along_rows(1.0 / total, dim)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the item before left to copy
        lse = top + jnp.log(total) * _LOG2_E
        lse_smem[warpgroup] = jnp.where(hi == EVERY_KEY, 0.0, lse)  # rows that are no query have seen other blocks
        first = work["start"] + ROWS * warpgroup

        out_smem[warpgroup] = acc.astype(dtype)
        plgpu.commit_smem()
        size = ROWS
        while size:  # copies of fixed sizes, the binary digits of `rows`

            @pl.when((rows & size) != 0)
            def _(size=size):
                at = rows & ~(2 * size - 1)
                target = out_ref.at[work["batch"], pl.ds(first + at, size), work["head"]]
                plgpu.copy_smem_to_gmem(out_flat.at[warpgroup, pl.ds(at, size)], target, commit_group=False)

            size //= 2

        plgpu.copy_smem_to_gmem(
            lse_smem.at[warpgroup], lse_ref.at[work["batch"], work["head"], tile], commit_group=False
        )
        plgpu.commit_smem_to_gmem_group()

    def let_pass(work, q_slot, steps_before):
        """An item that has no queries for this warpgroup: only the others wait for it."""
        plgpu.barrier_arrive(q_free.at[q_slot])

        @pl.loop(0, work["steps"])
        def _(j):
            slot = buffer(_STAGES, steps_before + j)
            plgpu.barrier_wait(k_ready.at[slot])
            take_turns()
            plgpu.barrier_arrive(k_free.at[slot])
            plgpu.barrier_wait(v_ready.at[slot])
            take_turns()
            plgpu.barrier_arrive(v_free.at[slot])

    @pl.when(warpgroup < WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        pl.when(warpgroup == 1)(take_turns)

        @pl.loop(0, counts_ref[program], init_carry=jnp.int32(0))
        def _(n, steps_before):
            work, q_slot = item(n), buffer(2, n)
            rows = jnp.minimum(work["rows"] - ROWS * warpgroup, ROWS)
            plgpu.barrier_wait(q_ready.at[q_slot])
            pl.when(rows > 0)(lambda: attend_rows(work, rows, q_slot, steps_before))
            pl.when(rows <= 0)(lambda: let_pass(work, q_slot, steps_before))
            return steps_before + work["steps"]

        pl.when(warpgroup == 0)(take_turns)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == WARPGROUPS)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, counts_ref[program], init_carry=jnp.int32(0))
        def _(n, steps_before):
            work, q_slot = item(n), buffer(2, n)
            pl.when(n >= 2)(lambda: plgpu.barrier_wait(q_free.at[q_slot]))
            for index in range(WARPGROUPS):
                source = q_ref.at[work["batch"], pl.ds(work["start"] + ROWS * index, ROWS), work["head"]]
                plgpu.copy_gmem_to_smem(source, q_flat.at[q_slot, index], q_ready.at[q_slot])

            @pl.loop(0, work["steps"])
            def _(j):
                slot = buffer(_STAGES, steps_before + j)
                used = steps_before + j >= _STAGES
                at = (work["batch"], pl.ds(work["first_key"] + j * columns, columns), work["head"])
                for ref, flat, ready, free in ((k_ref, k_flat, k_ready, k_free), (v_ref, v_flat, v_ready, v_free)):
                    pl.when(used)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                    plgpu.copy_gmem_to_smem(ref.at[at], flat.at[slot], ready.at[slot])

            return steps_before + work["steps"]
