"""Block attention on Hopper by kernels in Pallas' Mosaic GPU: forward, backward, and their batching.

The kernels are in mosaic_gpu_kernels.py, the loops around them in mosaic_gpu_program.py, and their work is listed in
mosaic_gpu_plan.py.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import (
    calls,
    mosaic_gpu_kernels,
    mosaic_gpu_plan,
    mosaic_gpu_program,
    triton_plan,
)
from pallas_kernels.mosaic_gpu_plan import ROWS
from pallas_kernels.mosaic_gpu_program import Layout, Stream
from pallas_kernels.platform import why_not_nvidia

_OLDEST_JAX = (0, 11)  # Pallas' interface to Mosaic GPU still changes
_DTYPES = ("float16", "bfloat16")
_DIM = 64
_TOGETHER = 8  # heads that go through the tiles side by side, at most; 1, 4 and 16 are as fast


@dataclasses.dataclass(frozen=True)
class Step:
    """How a kernel takes the other side."""

    columns: int  # rows at a time, a multiple of 64, at most 256
    stages: int  # of them in shared memory
    grain: int | None = (
        None  # forward: the last step has a multiple of so many columns; None: all of them
    )

    @property
    def narrower(self):
        """The columns that a last step may have, if it has fewer than the others."""
        return tuple(range(self.grain, self.columns, self.grain)) if self.grain else ()


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the kernels cut their work."""

    forward: Step = Step(128, 4, 64)
    queries: Step = Step(128, 2)
    keys: Step = Step(128, 2)


# (GPU, L, D, pattern), of half precision: cases in which these kernels were measured to be faster than Triton's by
# `benchmarks/attention.py`, with steps found by `benchmarks/tune_attention.py`. At 680 tokens the two are within 5 %.
TUNED = {
    ("H100", 2240, 64, "diagonal"): Tuning(),
    ("H100", 2240, 64, "causal"): Tuning(),
    ("H100", 9451, 64, "diagonal"): Tuning(forward=Step(256, 2)),
    ("H100", 9451, 64, "causal"): Tuning(forward=Step(256, 2)),
}


def tuning_for(gpu, length, dim, pattern):
    """The steps measured for this case, or ones that work everywhere."""
    return TUNED.get((gpu, length, dim, pattern), Tuning())


def why_not(q):
    """None if the kernels can run here on arrays like q, otherwise the reason in words."""
    reason = why_not_nvidia()
    if reason is not None:
        return reason
    if jax.__version_info__ < _OLDEST_JAX:
        return f"it needs jax {'.'.join(map(str, _OLDEST_JAX))} or newer, this is {jax.__version__}"
    if jax.local_devices()[0].compute_capability != "9.0":
        return f"it needs a Hopper GPU (compute capability 9.0), this is {jax.local_devices()[0].device_kind}"
    if q.dtype.name not in _DTYPES:
        return f"it takes {', '.join(_DTYPES)}; got {q.dtype}"
    if q.shape[-1] != _DIM:
        return f"it takes a head dim of {_DIM}; got {q.shape[-1]}"
    return None


def is_faster(q, pattern):
    """Whether it was measured to be faster than the other implementations on this GPU or its like, on arrays like q."""
    return _case(q, pattern) in TUNED


def _case(q, pattern):
    return triton_plan.gpu_name(jax.local_devices()[0].device_kind), q.shape[1], q.shape[3], pattern


def attention(q, k, v, block_sizes, pattern, scale):
    """Block attention; arguments are checked and explained in `pallas_kernels.api.block_attention`."""
    tuning = tuning_for(*_case(q, pattern))
    return attend(
        q, k, v, Call(block_sizes, pattern, scale, tuning, jax.local_devices()[0].core_count)
    )


@dataclasses.dataclass(frozen=True)
class Call:
    """All that is static about a call from JAX."""

    block_sizes: tuple[int, ...]
    pattern: str
    scale: float
    tuning: Tuning = Tuning()
    multiprocessors: int = 132

    def work(self, q, step):
        """Arguments of `mosaic_gpu_plan.query_plan` and `key_plan`."""
        batch, _, heads, _ = q.shape
        return (
            self.block_sizes,
            self.pattern,
            batch,
            heads,
            step.columns,
            _TOGETHER,
            self.multiprocessors,
        )


@functools.lru_cache(maxsize=256)
def run_forward(call):
    """(q, k, v), each (B, L, H, D) -> out (B, L, H, D), and lse (B, H, L) float32 in base 2."""

    @calls.batched
    def run(q, k, v):
        step = call.tuning.forward
        plan = mosaic_gpu_plan.query_plan(*call.work(q, step), step.grain)
        log2_scale = call.scale * math.log2(math.e)
        results = mosaic_gpu_program.call(
            Layout(
                q.dtype,
                q.shape[3],
                step.columns,
                step.stages,
                1,
                (Stream(1), Stream(1)),
                1,
                1,
                step.narrower,
            ),
            functools.partial(
                mosaic_gpu_kernels.forward, log2_scale, q.dtype, step.columns, step.narrower
            ),
            plan,
            call.multiprocessors,
            dict(q=q, k=k, v=v, own=("q",), streams=(("k",), ("v",))),
            dict(out=_like(q), lse=_row_results(q, plan)),
        )
        return tuple(
            calls.varying_like(q, x) for x in (results["out"], _from_tiles(results["lse"], plan))
        )

    return run


@functools.lru_cache(maxsize=256)
def run_backward(call):
    """(q, k, v, out, lse, d_out) -> (dq, dk, dv), each (B, L, H, D)."""

    @calls.batched
    def run(q, k, v, out, lse, d_out):
        ranged = q.dtype == jnp.float16
        step = call.tuning.queries
        plan = mosaic_gpu_plan.query_plan(*call.work(q, step))
        operands = dict(q=q, d_out=d_out, out=out, k=k, v=v, lse=_at(lse, plan.own_rows, jnp.inf))
        if ranged:
            top_v = jnp.abs(v).max(axis=(1, 3)).astype(jnp.float32)
            operands["top_v"] = top_v
        results = mosaic_gpu_program.call(
            Layout(q.dtype, q.shape[3], step.columns, step.stages, 3, (Stream(2),), 1, 2),
            functools.partial(
                mosaic_gpu_kernels.backward_queries, call.scale, q.dtype, step.columns
            ),
            plan,
            call.multiprocessors,
            dict(**operands, own=("q", "d_out", "out"), streams=(("k", "v"),)),
            dict(d_q=_like(q), delta=_row_results(q, plan), top_d_out=_row_results(q, plan)),
        )
        delta = _from_tiles(results["delta"], plan)
        step = call.tuning.keys
        plan = mosaic_gpu_plan.key_plan(*call.work(q, step))
        operands = dict(q=q, d_out=d_out, k=k, v=v)
        if ranged:
            largest = q.shape[3] * jnp.maximum(results["top_d_out"].max(axis=(2, 3)) * top_v, 1e-30)
            operands["factor"] = mosaic_gpu_kernels.HALF_RANGE / largest  # (B, H)
            delta *= operands["factor"][:, :, None]
        operands |= dict(
            lse=_at(lse, plan.other_rows, jnp.inf), delta=_at(delta, plan.other_rows, 0.0)
        )
        d_q = results["d_q"]
        results = mosaic_gpu_program.call(
            Layout(q.dtype, q.shape[3], step.columns, step.stages, 2, (Stream(2, 2),), 2, 0),
            functools.partial(mosaic_gpu_kernels.backward_keys, call.scale, q.dtype, step.columns),
            plan,
            call.multiprocessors,
            dict(**operands, own=("k", "v"), streams=(("q", "d_out", "lse", "delta"),)),
            dict(d_k=_like(q), d_v=_like(q)),
        )
        return tuple(calls.varying_like(q, x) for x in (d_q, results["d_k"], results["d_v"]))

    return run


# (q, k, v, call) -> out: `attention`, with tile sizes and GPU given.
attend = calls.differentiable(run_forward, run_backward)


def _like(q):
    return jax.ShapeDtypeStruct(q.shape, q.dtype)


def _row_results(q, plan):
    batch, _, heads, _ = q.shape
    return jax.ShapeDtypeStruct((batch, heads, len(plan.own_rows), ROWS), jnp.float32)


def _from_tiles(x, plan):
    """(B, H, tiles, ROWS) -> (B, H, L)"""
    rows = plan.own_rows.ravel()
    place = np.flatnonzero(rows >= 0)
    place = place[np.argsort(rows[place])]
    return x.reshape(*x.shape[:2], -1)[:, :, place]


def _at(x, rows, fill):
    """(B, H, L) -> (B, H, *rows.shape), fill where rows is -1."""
    return jnp.where(rows >= 0, x[:, :, np.maximum(rows, 0)], fill)
