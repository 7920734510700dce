"""What kernels that JAX cannot look into need around them: derivatives, batching, and marks under `shard_map`."""

import functools

import jax
import jax.numpy as jnp


def differentiable(run_forward, run_backward):
    """A function of (q, k, v, call), differentiable by q, k and v.

    Args:
      run_forward: a function of call that gives (q, k, v) -> (out, lse).
      run_backward: a function of call that gives (q, k, v, out, lse, d_out) -> (dq, dk, dv).
        call is hashable: all that is static.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
    def attend(q, k, v, call):
        return run_forward(call)(q, k, v)[0]

    def forward(q, k, v, call):
        out, lse = run_forward(call)(q, k, v)
        return out, (q, k, v, out, lse)

    def backward(call, residuals, d_out):
        return run_backward(call)(*residuals, d_out)

    attend.defvjp(forward, backward)
    return attend


def batched(function):
    """`function` of (B, ...) arrays, so that `jax.vmap` folds its axis into B: calls of kernels have no batching rule."""
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
    """x, marked under `shard_map` as different on each device along the mesh axes where q is."""
    q_axes, x_axes = (jax.typeof(y).manual_axis_type.varying for y in (q, x))
    axes = tuple(q_axes - x_axes)
    return jax.lax.pcast(x, axes, to="varying") if axes else x
