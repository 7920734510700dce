"""The Triton kernels compiled to PTX through JAX and its transformations, without a GPU.

Nothing runs. Requires that jax_triton can be imported, which requires JAX's CUDA plugin, but no
GPU.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import triton, triton_launches, triton_tuning

try:
    import jax_triton  # noqa: F401
except ImportError as error:
    pytest.skip(
        f"jax_triton cannot be imported: {str(error).splitlines()[0]}", allow_module_level=True
    )


def squares(*sides):
    return tuple(side * side for side in sides)


LISTS = {
    680: squares(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    2240: squares(1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    9451: squares(1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
GPUS = {80: "A100", 90: "H100"}  # by compute capability


def make_problem(sizes, pattern, gpu, dtype, dim):
    tuning = triton_tuning.tuning_for(GPUS[gpu], sum(sizes), dim, dtype, pattern)
    return triton_launches.Problem(sizes, pattern, dim**-0.5, tuning)


def forward_backward(attend, q, k, v, d_out):
    out, vjp = jax.vjp(attend, q, k, v)
    return out, *vjp(d_out)


def lower(function, *arrays):
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def check(sizes, pattern, gpu=90, dtype="float16", dim=64):
    """Lowers forward and backward, and expects one call per launch."""
    problem = make_problem(sizes, pattern, gpu, dtype, dim)
    config = triton.CallConfig(problem, compute_capability=gpu)
    attend = functools.partial(triton.attend, config=config)
    shape = (2, sum(sizes), 4, dim)
    text = lower(
        functools.partial(forward_backward, attend), *[jax.ShapeDtypeStruct(shape, dtype)] * 4
    )
    forward = triton_launches.forward_launches(problem, shape, dtype)
    backward = triton_launches.backward_launches(problem, shape, dtype)
    assert text.count("@triton_kernel_call") == len(forward) + len(backward)


@pytest.mark.parametrize("pattern", ["diagonal", "causal"])
@pytest.mark.parametrize("length", LISTS)
@pytest.mark.parametrize("gpu", GPUS)
def test_published_lists(gpu, length, pattern):
    check(LISTS[length], pattern, gpu)


@pytest.mark.parametrize(
    "dtype, dim", [("bfloat16", 64), ("float32", 64), ("float16", 128), ("float16", 32)]
)
def test_dtypes_and_head_dims(dtype, dim):
    check((3, 70, 300), "diagonal", dtype=dtype, dim=dim)


def test_transformations():
    problem = make_problem((1, 4, 40), "causal", 90, "float16", 64)
    config = triton.CallConfig(problem, compute_capability=90)
    attend = functools.partial(triton.attend, config=config)
    x = jnp.zeros((2, 3, 45, 4, 64), jnp.float16)
    mesh = jax.make_mesh((1, 1), ("batch", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.P("batch", None, "heads", None)

    def loss(q, k):
        body = jax.checkpoint(lambda q, _: (jax.vmap(attend, (0, None, 0))(q, k, q), None))
        return jax.lax.scan(body, q, length=2)[0].sum()

    lower(jax.grad(loss, (0, 1)), x, x[0])
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    lower(functools.partial(forward_backward, mapped), *[x[0]] * 4)
