"""Block attention by Triton kernels on NVIDIA GPUs, called through jax_triton: forward, backward, and their batching.

The kernels are in triton_kernels.py, what they are launched with in triton_plan.py. Several launches, each with tile
sizes of its own, write disjoint rows of the same arrays: every launch takes what the one before made and gives it on.
"""

import dataclasses
import functools
import importlib
import importlib.util

import jax
import jax.numpy as jnp

from pallas_kernels import calls, tiles, triton_plan
from pallas_kernels.platform import why_not_nvidia

_DTYPES = ("float16", "bfloat16", "float32")
_LARGEST_DIM = 128


def why_not(q):
    """None if the kernels can run here on arrays like q, otherwise the reason in words."""
    reason = why_not_nvidia()
    if reason is not None:
        return reason
    missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: pip install 'hmar_jax[gpu]'"
    if q.dtype.name not in _DTYPES:
        return f"it takes {', '.join(_DTYPES)}; got {q.dtype}"
    if q.shape[-1] > _LARGEST_DIM:
        return f"it takes head dims up to {_LARGEST_DIM}; got {q.shape[-1]}"
    return None


def attention(q, k, v, block_sizes, pattern, scale):
    """Block attention; arguments are checked and explained in `pallas_kernels.api.block_attention`."""
    gpu = triton_plan.gpu_name(jax.local_devices()[0].device_kind)
    tuning = triton_plan.tuning_for(gpu, q.shape[1], q.shape[3], q.dtype.name, pattern)
    return attend(q, k, v, Call(triton_plan.Problem(block_sizes, pattern, scale, tuning)))


@dataclasses.dataclass(frozen=True)
class Call:
    """All that is static about a call from JAX."""

    problem: triton_plan.Problem
    compute_capability: int | None = (
        None  # None: that of the first GPU; 90 compiles for H100 where there is no GPU
    )


@functools.lru_cache(maxsize=256)
def run_forward(call):
    """(q, k, v), each (B, L, H, D) -> out (B, L, H, D), and lse (B, H, L) float32 in base 2."""

    @calls.batched
    def run(q, k, v):
        batch, length, heads, _ = q.shape
        bounds = _bounds(call, tiles.query_bounds)
        results = (
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        )
        for launch in triton_plan.forward_launches(call.problem, q.shape, q.dtype.name):
            results = _launch(call, launch, (q, k, v, bounds), results)
        return tuple(calls.varying_like(q, x) for x in results)

    return run


@functools.lru_cache(maxsize=256)
def run_backward(call):
    """(q, k, v, out, lse, d_out) -> (dq, dk, dv), each (B, L, H, D)."""

    @calls.batched
    def run(q, k, v, out, lse, d_out):
        batch, length, heads, _ = q.shape
        query_bounds, key_bounds = (
            _bounds(call, tiles.query_bounds),
            _bounds(call, tiles.key_bounds),
        )
        d_q, d_k, d_v = (jax.ShapeDtypeStruct(q.shape, q.dtype),) * 3
        delta = top_d_out = None
        top_v = lse  # for dtypes that do not read it
        for launch in triton_plan.backward_launches(call.problem, q.shape, q.dtype.name):
            if launch.kernel == "backward_whole":
                d_q, d_k, d_v = _launch(
                    call, launch, (q, k, v, d_out, lse, key_bounds), (d_q, d_k, d_v)
                )
            elif launch.kernel == "prepare":
                top_v = jax.ShapeDtypeStruct((batch, heads, len(launch.table)), jnp.float32)
                (top_v,) = _launch(call, launch, (v,), (top_v,), continued=0)
            elif launch.kernel == "backward_queries":
                delta = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
                top_d_out = jax.ShapeDtypeStruct((batch, heads, len(launch.table)), jnp.float32)
                inputs = (q, k, v, out, d_out, lse, top_v, query_bounds)
                d_q, delta, top_d_out = _launch(
                    call, launch, inputs, (d_q, delta, top_d_out), continued=1
                )
            else:
                inputs = (q, k, v, d_out, lse, delta, top_d_out, key_bounds)
                d_k, d_v = _launch(call, launch, inputs, (d_k, d_v))
        return tuple(calls.varying_like(q, x) for x in (d_q, d_k, d_v))

    return run


def _bounds(call, function):
    return jnp.asarray(function(call.problem.block_sizes, call.problem.pattern))


def _launch(call, launch, inputs, results, continued=None):
    """Launches one kernel.

    Args:
      inputs: arrays that it reads, without its table.
      results: what it writes: ShapeDtypeStructs for new arrays, or arrays in which it fills in further rows.
      continued: for how many of the results (None: all) the kernel takes an argument for an array made before (its
        `old_...`), which it need not read.

    Returns:
      A tuple of arrays. Of new ones, the rows that this launch does not write are undefined.
    """
    # Imported at the first call: both are slow to import, and missing on most machines without a GPU.
    import jax_triton

    kernels = importlib.import_module("pallas_kernels.triton_kernels")
    inputs = (*inputs, jnp.asarray(launch.table))
    new = [isinstance(x, jax.ShapeDtypeStruct) for x in results[:continued]]
    old = tuple(inputs[0] if is_new else x for x, is_new in zip(results, new))
    aliases = {len(inputs) + i: i for i, is_new in enumerate(new) if not is_new}
    made = jax_triton.triton_call(
        *inputs,
        *old,
        *launch.counts,
        kernel=getattr(kernels, launch.kernel),
        name=f"block_attention_{launch.kernel}",
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        grid=(launch.grid,),
        num_warps=launch.warps,
        num_stages=launch.stages,
        compute_capability=call.compute_capability,
        input_output_aliases=aliases,
        **launch.constants,
    )
    return tuple(made)


# (q, k, v, call) -> out: `attention`, with tile sizes and GPU given.
attend = calls.differentiable(run_forward, run_backward)
