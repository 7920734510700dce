"""JAX transformations for kernels that JAX cannot look into: gradients, `vmap` and `shard_map`."""

import functools

import jax
import jax.numpy as jnp


def differentiable(run_forward, run_backward):
    """Combines a forward and a backward kernel into a differentiable function.

    Args:
      run_forward: maps a config to a function (q, k, v) -> (out, lse).
      run_backward: maps a config to a function (q, k, v, out, lse, d_out) -> (d_q, d_k, d_v).

    Returns:
      A function (q, k, v, config) -> out, differentiable in reverse mode by q, k and v. The config
      is hashable and holds everything that is static.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
    def attend(q, k, v, config):
        return run_forward(config)(q, k, v)[0]

    def forward(q, k, v, config):
        out, lse = run_forward(config)(q, k, v)
        return out, (q, k, v, out, lse)

    def backward(config, residuals, d_out):
        return run_backward(config)(*residuals, d_out)

    attend.defvjp(forward, backward)
    return attend


def batched(function):
    """Gives a function of (B, ...) arrays a batching rule: `jax.vmap` folds its axis into B.

    Calls of kernels have no batching rule of their own.

    Args:
      function: takes arrays (B, ...) and returns a tuple of arrays (B, ...).
    """
    batched = jax.custom_batching.custom_vmap(function)

    @batched.def_vmap
    def fold(axis_size, in_batched, *arrays):
        arrays = [
            x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, is_batched in zip(arrays, in_batched, strict=True)
        ]
        results = batched(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
        results = tuple(x.reshape(axis_size, -1, *x.shape[1:]) for x in results)
        return results, (True,) * len(results)

    return batched


def varying_like(q, x):
    """Marks x as varying over the mesh axes of `shard_map` over which q varies.

    Kernels return arrays without this mark, which the outputs of a mapped function must carry.
    """
    q_axes, x_axes = (jax.typeof(y).manual_axis_type.varying for y in (q, x))
    axes = tuple(q_axes - x_axes)
    return jax.lax.pcast(x, axes, to="varying") if axes else x
