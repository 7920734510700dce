"""Block attention by Triton kernels on NVIDIA GPUs, called through jax_triton.

This module is the JAX side: support checks, forward, backward and their batching. The kernels are
in triton_kernels.py, their launches are made in triton_launches.py, and their tile sizes are in
triton_tuning.py. Several launches, each with its own tile sizes, write disjoint rows of the same
arrays: each launch takes the arrays of the launch before it and returns them.

Letters in shapes: B batch, L all tokens, H heads, D head dim.
"""

import dataclasses
import functools
import importlib
import importlib.util

import jax
import jax.numpy as jnp

from pallas_kernels import platform, tiles, transforms, triton_launches, triton_tuning

_DTYPES = ("float16", "bfloat16", "float32")
_MAX_HEAD_DIM = 128


def unsupported_reason(q) -> str | None:
    """Returns None if the kernels can run here on arrays like q, otherwise the reason in words."""
    reason = platform.nvidia_unsupported_reason()
    if reason is not None:
        return reason
    missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    if missing:
        return f"requires {' and '.join(missing)}: pip install 'hmar_jax[gpu]'"
    if q.dtype.name not in _DTYPES:
        return f"supports {', '.join(_DTYPES)}; got {q.dtype}"
    if q.shape[-1] > _MAX_HEAD_DIM:
        return f"supports head dims up to {_MAX_HEAD_DIM}; got {q.shape[-1]}"
    return None


def attention(q, k, v, block_sizes, pattern, scale):
    """Block attention; see `pallas_kernels.api.block_attention`, which validates the arguments."""
    gpu = platform.gpu_name(jax.local_devices()[0].device_kind)
    tuning = triton_tuning.tuning_for(gpu, q.shape[1], q.shape[3], q.dtype.name, pattern)
    problem = triton_launches.Problem(block_sizes, pattern, scale, tuning)
    return attend(q, k, v, CallConfig(problem))


@dataclasses.dataclass(frozen=True)
class CallConfig:
    """Everything static about a call from JAX."""

    problem: triton_launches.Problem
    # None: that of the first GPU. 90 compiles for Hopper GPUs, also where there is no GPU.
    compute_capability: int | None = None


@functools.lru_cache(maxsize=256)
def run_forward(config: CallConfig):
    """Returns a function (q, k, v) -> (out, lse).

    q, k, v and out are (B, L, H, D); lse, the logsumexp of the scores in base 2, is (B, H, L)
    float32.
    """

    @transforms.batched
    def run(q, k, v):
        batch, length, heads, _ = q.shape
        bounds = _bounds(config, tiles.query_bounds)
        results = (
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        )
        for launch in triton_launches.forward_launches(config.problem, q.shape, q.dtype.name):
            results = _launch(config, launch, (q, k, v, bounds), results)
        return tuple(transforms.varying_like(q, x) for x in results)

    return run


@functools.lru_cache(maxsize=256)
def run_backward(config: CallConfig):
    """Returns a function (q, k, v, out, lse, d_out) -> (d_q, d_k, d_v), each (B, L, H, D)."""

    @transforms.batched
    def run(q, k, v, out, lse, d_out):
        batch, length, heads, _ = q.shape
        query_bounds, key_bounds = (
            _bounds(config, tiles.query_bounds),
            _bounds(config, tiles.key_bounds),
        )
        d_q, d_k, d_v = (jax.ShapeDtypeStruct(q.shape, q.dtype),) * 3
        delta = d_out_amax = None
        v_amax = lse  # a placeholder for the dtypes that do not read it
        for launch in triton_launches.backward_launches(config.problem, q.shape, q.dtype.name):
            if launch.kernel == "backward_whole":
                inputs = (q, k, v, d_out, lse, key_bounds)
                d_q, d_k, d_v = _launch(config, launch, inputs, (d_q, d_k, d_v))
            elif launch.kernel == "prepare":
                v_amax = jax.ShapeDtypeStruct((batch, heads, len(launch.table)), jnp.float32)
                (v_amax,) = _launch(config, launch, (v,), (v_amax,), num_aliased=0)
            elif launch.kernel == "backward_queries":
                delta = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
                d_out_amax = jax.ShapeDtypeStruct((batch, heads, len(launch.table)), jnp.float32)
                inputs = (q, k, v, out, d_out, lse, v_amax, query_bounds)
                d_q, delta, d_out_amax = _launch(
                    config, launch, inputs, (d_q, delta, d_out_amax), num_aliased=1
                )
            else:
                inputs = (q, k, v, d_out, lse, delta, d_out_amax, key_bounds)
                d_k, d_v = _launch(config, launch, inputs, (d_k, d_v))
        return tuple(transforms.varying_like(q, x) for x in (d_q, d_k, d_v))

    return run


def _bounds(config, function):
    return jnp.asarray(function(config.problem.block_sizes, config.problem.pattern))  # (2, L)


def _launch(config, launch, inputs, results, num_aliased=None):
    """Launches one kernel.

    Args:
      config: the `CallConfig`.
      launch: the `triton_launches.KernelLaunch`.
      inputs: the arrays that the kernel reads, without its table.
      results: what the kernel writes: ShapeDtypeStructs for new arrays, or arrays of which it
        writes further rows.
      num_aliased: for how many of the results (None: all) the kernel has an `aliased_...` argument,
        the array of an earlier launch, which it does not read.

    Returns:
      A tuple of arrays. In new ones, the rows that this launch does not write are undefined.
    """
    # Imported at the first call: both are slow to import, and missing on most machines without a
    # GPU.
    import jax_triton

    kernels = importlib.import_module("pallas_kernels.triton_kernels")
    inputs = (*inputs, jnp.asarray(launch.table))
    is_new = [isinstance(x, jax.ShapeDtypeStruct) for x in results[:num_aliased]]
    aliased = tuple(inputs[0] if new else x for x, new in zip(results, is_new))
    aliases = {len(inputs) + i: i for i, new in enumerate(is_new) if not new}
    outputs = jax_triton.triton_call(
        *inputs,
        *aliased,
        *launch.scalars,
        kernel=getattr(kernels, launch.kernel),
        name=f"block_attention_{launch.kernel}",
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        grid=(launch.grid,),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        compute_capability=config.compute_capability,
        input_output_aliases=aliases,
        **launch.constants,
    )
    return tuple(outputs)


# (q, k, v, config) -> out: `attention` with the tile sizes and the GPU given.
attend = transforms.differentiable(run_forward, run_backward)
