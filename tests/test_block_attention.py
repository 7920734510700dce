"""Block attention: every implementation against the dense definition, and JAX transformations.

The expected values are computed in float64.
"""

import functools
import os
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import api, block_attention, mosaic_tpu, tiles, xla
from pallas_kernels.reference import block_mask, dense_attention


def squares(*sides):
    return tuple(side * side for side in sides)


SIZES_256 = squares(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIZES_512 = squares(1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
SIZES_1024 = squares(1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
PATTERNS = ("diagonal", "causal")
# Maximum ||x - expected|| / ||expected||, for outputs and gradients.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2, "float64": 1e-12}
# Tested on a GPU only (`pytest -m gpu`), otherwise skipped.
GPU_IMPLEMENTATIONS = ("triton", "mosaic_gpu")
# mosaic_tpu in Pallas' interpret mode, which needs no TPU.
INTERPRETED = "mosaic_tpu_interpreted"
TPU_IMPLEMENTATIONS = ("mosaic_tpu", INTERPRETED)  # float32 and bfloat16


def attend_with(implementation):
    """Returns `block_attention` with one implementation."""
    if implementation == INTERPRETED:
        return interpreted_attention
    return functools.partial(block_attention, implementation=implementation)


def interpreted_attention(q, k, v, block_sizes, pattern="diagonal", scale=1.0):
    return mosaic_tpu.attention(q, k, v, block_sizes, pattern, scale, interpret=True)


def supported(implementation, dtype, dim):
    """Returns the nearest (dtype, dim) that the implementation supports."""
    if implementation in TPU_IMPLEMENTATIONS:
        return ("bfloat16" if dtype == "float16" else dtype), dim
    if implementation == "mosaic_gpu":
        return ("float16" if dtype == "float32" else dtype), 64
    return dtype, dim


def implementation_params():
    """One parameter per implementation. Those that cannot run here are skipped with the reason."""
    params = [pytest.param(INTERPRETED)]
    for name in api.IMPLEMENTATIONS:
        marks = [pytest.mark.gpu] if name in GPU_IMPLEMENTATIONS else []
        try:
            block_attention(
                *[jnp.zeros((1, 1, 1, 64), jnp.bfloat16)] * 3, (1,), implementation=name
            )
        except NotImplementedError as error:
            marks.append(pytest.mark.skip(reason=str(error)))
        params.append(pytest.param(name, marks=marks))
    return params


def with_each_implementation(values, interpreted):
    """All pairs (value, implementation).

    In interpret mode, the values that are not in `interpreted` are slow tests.
    """
    params = []
    for param in implementation_params():
        for value in values:
            slow = param.values == (INTERPRETED,) and value not in interpreted
            params.append(
                pytest.param(value, *param.values, marks=[*param.marks, *[pytest.mark.slow] * slow])
            )
    return params


every_implementation = pytest.mark.parametrize("implementation", implementation_params())
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def random_inputs(sizes, batch, heads, dim, dtype="float32", spread=1.0):
    """q, k, v and d_out, (B, L, H, D) each, of dtype."""
    rng = np.random.default_rng(zlib.crc32(repr((sizes, batch, heads, dim)).encode()))
    shape = (batch, sum(sizes), heads, dim)
    return [jnp.asarray(spread * rng.standard_normal(shape), dtype) for _ in range(4)]


# Most of the time of these tests is compilation; one run does not repay LLVM's slow passes.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def out_and_gradients(function, q, k, v, d_out):
    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(q, k, v, d_out):
        out, vjp = jax.vjp(function, q, k, v)
        return out, *vjp(d_out)

    return [np.asarray(x) for x in run(q, k, v, d_out)]


def relative_error(x, reference):
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    size = np.linalg.norm(reference)
    # If every block is one token, d_q and d_k are zero: then this is the absolute error.
    return np.linalg.norm(x - reference) / (size if size > 1e-9 else 1.0)


def expected_in_float64(sizes, pattern, scale, q, k, v, d_out=None):
    """The dense definition in numpy: out or, given d_out, [out, d_q, d_k, d_v]."""
    q, k, v = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v))
    p = np.where(block_mask(sizes, pattern), scale * (q @ k.swapaxes(2, 3)), -np.inf)
    p = np.exp(p - p.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    results = [p @ v]
    if d_out is not None:
        d_out = np.asarray(d_out, np.float64).swapaxes(1, 2)
        d_p = d_out @ v.swapaxes(2, 3)
        d_scores = scale * p * (d_p - (p * d_p).sum(-1, keepdims=True))
        results += [d_scores @ k, d_scores.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ d_out]
    results = [x.swapaxes(1, 2) for x in results]
    return results[0] if d_out is None else results


def compare(function, sizes, pattern, batch=2, heads=2, dim=16, dtype="float32"):
    options = dict(block_sizes=sizes, pattern=pattern, scale=dim**-0.5)
    arrays = random_inputs(sizes, batch, heads, dim, dtype)
    actual = out_and_gradients(functools.partial(function, **options), *arrays)
    expected = expected_in_float64(sizes, pattern, dim**-0.5, *arrays)
    for name, x, y in zip(("out", "d_q", "d_k", "d_v"), actual, expected, strict=True):
        assert x.dtype == jnp.dtype(dtype) and x.shape == y.shape
        error = relative_error(x, y)
        assert error < TOLERANCE[dtype], f"{name}: relative error {error:.1e}"


def check(sizes, pattern, implementation, dtype="float32", dim=16, **options):
    dtype, dim = supported(implementation, dtype, dim)
    compare(attend_with(implementation), sizes, pattern, dtype=dtype, dim=dim, **options)


def random_sizes(seed, length=60):
    """A random list of blocks: some lists have many small blocks, some a few large ones."""
    rng = np.random.default_rng(seed)
    cuts = rng.choice(np.arange(1, length), size=rng.integers(0, 8), replace=False)
    return tuple(np.diff([0, *sorted(cuts), length]).tolist())


# The definition and the groups of blocks.


@every_pattern
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference(dtype, pattern):
    compare(dense_attention, (7, 129, 3), pattern, dtype=dtype)


def test_small_masks():
    diagonal = [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1, 1],
    ]
    causal = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
    ]
    np.testing.assert_array_equal(block_mask((1, 2, 3), "diagonal"), np.array(diagonal, bool))
    np.testing.assert_array_equal(block_mask((1, 2, 3), "causal"), np.array(causal, bool))


def test_mask_of_a_group_after_other_blocks():
    group = tiles.Group(start=2, stop=5, key_start=0, block_sizes=(1, 2))
    expected = [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
    ]
    np.testing.assert_array_equal(tiles.group_mask(group, "causal"), np.array(expected, bool))


def test_reference_on_a_worked_example():
    # Two blocks. All scores are equal, so each output is the mean of the values its query sees.
    v = jnp.array([2.0, 4.0, 8.0]).reshape(1, 3, 1, 1)
    zero = jnp.zeros_like(v)
    np.testing.assert_allclose(
        dense_attention(zero, zero, v, (1, 2), "diagonal").ravel(), [2, 6, 6]
    )
    np.testing.assert_allclose(
        dense_attention(zero, zero, v, (1, 2), "causal").ravel(), [2, 14 / 3, 14 / 3], rtol=1e-6
    )


def test_groups_of_the_published_list():
    groups = tiles.group_blocks(SIZES_256, "diagonal")
    assert [group.block_sizes for group in groups] == [
        (1, 4, 9, 16),
        (25,),
        (36,),
        (64,),
        (100,),
        (169,),
        (256,),
    ]
    assert [group.needs_mask for group in groups] == [True] + [False] * 6


@every_pattern
@pytest.mark.parametrize("seed", range(20))
def test_groups_cover_the_mask_at_least_cost(seed, pattern):
    sizes = random_sizes(seed, length=60)[:8]
    for group_overhead in (0, 50, 400):
        groups = tiles.group_blocks(sizes, pattern, group_overhead)
        covered = np.zeros((sum(sizes), sum(sizes)), bool)
        for group in groups:
            covered[group.start : group.stop, group.key_start : group.stop] = tiles.group_mask(
                group, pattern
            )
            assert group.needs_mask == (not tiles.group_mask(group, pattern).all())
        np.testing.assert_array_equal(covered, block_mask(sizes, pattern))

        def cost(edges, group_overhead=group_overhead):
            num_queries = np.diff(edges)
            num_keys = num_queries if pattern == "diagonal" else edges[1:]
            return sum(num_queries * num_keys) + group_overhead * len(num_queries)

        # All ways to split the list, as bits.
        edges = np.cumsum((0, *sizes))
        inner = range(1, len(sizes))
        cuts = [
            [0, *(i for i in inner if bits >> i & 1), len(sizes)]
            for bits in range(0, 2 ** len(sizes), 2)
        ]
        assert cost(np.array([0, *(group.stop for group in groups)])) == min(
            cost(edges[cut]) for cut in cuts
        )


# Outputs and gradients.


@every_pattern
@every_implementation
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sizes", [(1,), (7, 129, 3)], ids=str)
def test_short_lists(sizes, dtype, pattern, implementation):
    check(sizes, pattern, implementation, dtype=dtype)


@every_implementation
@pytest.mark.parametrize(
    "dtype, pattern",
    [
        ("float32", "diagonal"),
        ("float32", "causal"),
        ("bfloat16", "diagonal"),
        ("float16", "causal"),
    ],
)
def test_list_256(dtype, pattern, implementation):
    check(SIZES_256, pattern, implementation, batch=1, heads=2, dim=32, dtype=dtype)


@pytest.mark.parametrize(
    "pattern, implementation", with_each_implementation(PATTERNS, interpreted=())
)
def test_list_512(pattern, implementation):
    check(SIZES_512, pattern, implementation, batch=1, heads=1, dim=64)


@pytest.mark.parametrize(
    "seed, implementation", with_each_implementation(range(40), interpreted=(0, 6, 10, 13))
)
def test_random_lists(seed, implementation):
    dtype = ("float32", "float32", "bfloat16", "float16")[seed % 4]
    # With head dim 8, groups of up to 32 keys save their probabilities; longer ones recompute them.
    check(
        random_sizes(seed),
        PATTERNS[seed // 4 % 2],
        implementation,
        batch=1 + seed % 3,
        dim=8,
        dtype=dtype,
    )


@every_pattern
@every_implementation
@pytest.mark.slow
def test_list_1024_forward(pattern, implementation):
    dtype, dim = supported(implementation, "float32", 64)
    q, k, v, _ = random_inputs(SIZES_1024, batch=1, heads=1, dim=dim, dtype=dtype)
    options = dict(block_sizes=SIZES_1024, pattern=pattern, scale=0.125)
    out = jax.jit(functools.partial(attend_with(implementation), **options))(q, k, v)
    expected = expected_in_float64(SIZES_1024, pattern, 0.125, q, k, v)
    assert relative_error(out, expected) < TOLERANCE[dtype]


@every_pattern
def test_float64(pattern):
    with jax.enable_x64(True):
        check((3, 40, 1), pattern, "xla", dim=8, dtype="float64")


@every_pattern
@every_implementation
def test_large_scores_stay_finite(pattern, implementation):
    # Scores in the thousands: without the subtracted maximum, exp would overflow.
    dtype, dim = supported(implementation, "float32", 16)
    q, k, v, d_out = random_inputs(
        (1, 5, 30, 2), batch=1, heads=1, dim=dim, dtype=dtype, spread=20.0
    )
    options = dict(block_sizes=(1, 5, 30, 2), pattern=pattern)
    for x in out_and_gradients(
        functools.partial(attend_with(implementation), **options), q, k, v, d_out
    ):
        assert np.isfinite(x).all()


@pytest.mark.parametrize(
    "implementation",
    [p for p in implementation_params() if p.values[0] not in TPU_IMPLEMENTATIONS],
)
def test_float16_preserves_small_gradients(implementation):
    dtype, dim = supported(implementation, "float16", 16)
    # With d_out of 1e-4 over 200 keys, d_scores would underflow in float16.
    sizes = (1, 200)
    q, k, v, d_out = random_inputs(sizes, batch=1, heads=1, dim=dim, dtype=dtype)
    d_out = (d_out * 1e-4).astype(dtype)
    function = functools.partial(attend_with(implementation), block_sizes=sizes, scale=dim**-0.5)
    actual = out_and_gradients(function, q, k, v, d_out)
    expected = expected_in_float64(sizes, "diagonal", dim**-0.5, q, k, v, d_out)
    # 1e-2: the results themselves are small numbers, of which float16 has few digits.
    assert all(relative_error(x, y) < 1e-2 for x, y in zip(actual, expected, strict=True))


# Transformations.

SMALL = dict(block_sizes=(1, 4, 40), pattern="causal", scale=0.5)


def small_inputs(implementation, batch):
    """random_inputs for SMALL, and a tolerance for the same results computed in another way."""
    dtype, dim = supported(implementation, "float32", 8)
    return random_inputs(SMALL["block_sizes"], batch, 2, dim, dtype), 10 * TOLERANCE[dtype]


def assert_close(x, y, tolerance):
    assert relative_error(x, y) < tolerance


@every_implementation
def test_vmap(implementation):
    function = functools.partial(attend_with(implementation), **SMALL)
    arrays, tolerance = small_inputs(implementation, 6)
    expected = out_and_gradients(function, *arrays)
    mapped = out_and_gradients(jax.vmap(function), *(x.reshape(2, 3, *x.shape[1:]) for x in arrays))
    for x, y in zip(mapped, expected, strict=True):
        assert_close(x.reshape(y.shape), y, tolerance / 100)


@every_implementation
def test_vmap_with_shared_keys(implementation):
    function = functools.partial(attend_with(implementation), **SMALL)
    (q, k, v, _), tolerance = small_inputs(implementation, 2)

    def d_k(attend):
        def loss(k):
            return (
                jax.vmap(attend, in_axes=(0, None, None))(jnp.stack([q, 2 * q]), k, v)
                .astype(jnp.float32)
                .var()
            )

        return jax.jit(jax.grad(loss), compiler_options=QUICK_COMPILE)(k)

    assert_close(d_k(function), d_k(functools.partial(dense_attention, **SMALL)), tolerance)


@every_implementation
def test_remat_and_scan(implementation):
    # As in a stack of layers: the body is rematerialized, and scan compiles it once.
    attend = functools.partial(attend_with(implementation), **SMALL)
    (q, k, v, _), tolerance = small_inputs(implementation, 1)

    def d_q(body):
        def loss(q):
            out = jax.lax.scan(lambda x, _: (body(x, k, v), None), q, length=3)[0]
            return (out.astype(jnp.float32) ** 2).sum()

        return jax.jit(jax.grad(loss), compiler_options=QUICK_COMPILE)(q)

    dense_attend = functools.partial(dense_attention, **SMALL)
    remat, plain, dense = (d_q(f) for f in (jax.checkpoint(attend), attend, dense_attend))
    assert_close(remat, plain, tolerance / 100)
    assert_close(plain, dense, tolerance)


def test_long_groups_save_no_scores_for_the_backward_pass():
    sizes, length = (400, 500), 900
    q, k, v, _ = random_inputs(sizes, batch=1, heads=1, dim=4)

    def vjp_function(q, k, v):
        return jax.vjp(lambda *x: xla.attention(*x, sizes, "diagonal", 1.0), q, k, v)[1]

    saved = jax.eval_shape(vjp_function, q, k, v)
    # q, k, v and one logsumexp per query, but nothing of 400 x 400.
    assert sum(x.size for x in jax.tree.leaves(saved)) == 3 * length * 4 + length


_SHARD_MAP = """
import functools, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from tests.test_block_attention import attend_with

options = dict(block_sizes=(1, 4, 40), pattern="{pattern}", scale=0.5)
mesh = jax.make_mesh({mesh}, ("batch", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
spec = P("batch", None, "heads", None)
rng = np.random.default_rng(0)
q, k, v, d_out = (rng.standard_normal((8, 45, 4, {dim})).astype("{dtype}") for _ in range(4))
attend = functools.partial(attend_with("{implementation}"), **options)


def run(function, *arrays):
    out, vjp = jax.vjp(function, *arrays[:3])
    return out, *vjp(arrays[3])


unsharded = jax.jit(functools.partial(run, attend))(q, k, v, d_out)
sharded = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (q, k, v, d_out)]
mapped = jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
by_shard_map = jax.jit(functools.partial(run, mapped))(*sharded)
by_compiler = jax.jit(functools.partial(run, attend))(*sharded)
for x, y, z in zip(unsharded, by_shard_map, by_compiler):
    assert len(y.sharding.device_set) == mesh.size
    np.testing.assert_allclose(y, x, rtol={rtol}, atol={rtol})
    np.testing.assert_allclose(z, x, rtol={rtol}, atol={rtol})
print("agrees")
"""


@pytest.mark.parametrize(
    "pattern, implementation", with_each_implementation(PATTERNS, interpreted=("causal",))
)
def test_shard_map_over_batch_and_heads(pattern, implementation):
    # In its own process: the number of fake devices is fixed when JAX starts.
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    mesh = (4, 2)
    if implementation in GPU_IMPLEMENTATIONS:
        # This process may hold most of the memory of the GPUs.
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        mesh = (jax.device_count(), 1)
    dtype, dim = supported(implementation, "float32", 8)
    case = dict(pattern=pattern, implementation=implementation, mesh=mesh, dtype=dtype, dim=dim)
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            _SHARD_MAP.format(**case, rtol=1e-5 if dtype == "float32" else 1e-3),
        ],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "agrees\n", result.stderr


# Errors.


def call(
    shape=(2, 5, 1, 8), k_shape=None, dtype="float32", v_dtype=None, block_sizes=(1, 4), **options
):
    q, k, v = (
        jnp.zeros(shape, dtype),
        jnp.zeros(k_shape or shape, dtype),
        jnp.zeros(shape, v_dtype or dtype),
    )
    return block_attention(q, k, v, block_sizes, **options)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(block_sizes=(1, 9)), r"must sum to the length of q, 5; got \(1, 9\), sum 10"),
        (dict(block_sizes=(5, 0)), r"one or more positive ints; got \(5, 0\)"),
        (dict(block_sizes=(6, -1)), r"one or more positive ints; got \(6, -1\)"),
        (dict(block_sizes=()), r"one or more positive ints; got \(\)"),
        (dict(block_sizes=(2.5, 2.5)), r"sequence of ints; got \(2.5, 2.5\)"),
        (dict(block_sizes=5), "sequence of ints; got 5"),
        (dict(shape=(5, 1, 8)), r"\(batch, length, heads, head dim\); got \(5, 1, 8\)"),
        (dict(k_shape=(2, 5, 2, 8)), r"one shape; got \(2, 5, 1, 8\), \(2, 5, 2, 8\)"),
        (dict(dtype="int32"), "float32, bfloat16, float16, float64; got int32"),
        (dict(v_dtype="bfloat16"), "one dtype; got float32, float32 and bfloat16"),
        (dict(pattern="banded"), "diagonal, causal; got 'banded'"),
        (dict(scale=float("nan")), "finite Python number; got nan"),
        (dict(scale="1"), "finite Python number; got '1'"),
        (dict(implementation="cudnn"), "xla, triton, mosaic_gpu, mosaic_tpu; got 'cudnn'"),
    ],
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)


def test_traced_scale_raises():
    with pytest.raises(ValueError, match="scale must be a finite Python number"):
        jax.jit(lambda scale: call(scale=scale))(1.0)


def test_implementation_that_cannot_run_here(monkeypatch):
    class Unsupported:
        @staticmethod
        def unsupported_reason(_q):
            return "requires a GPU; this process runs on cpu"

    monkeypatch.setattr(api, "_MODULES", {"triton": Unsupported, "xla": xla})
    with pytest.raises(NotImplementedError, match="'triton' cannot run here: requires a GPU"):
        call(implementation="triton")
    # None selects another implementation that can run.
    assert call().shape == (2, 5, 1, 8)


def test_default_selects_an_implementation_only_where_it_is_faster(monkeypatch):
    class FasterIfCausal:
        unsupported_reason = staticmethod(lambda q: None)
        attention = staticmethod(lambda q, k, v, block_sizes, pattern, scale: q + 1)
        is_faster = staticmethod(lambda q, pattern: pattern == "causal")

    monkeypatch.setattr(api, "_MODULES", {"mosaic_gpu": FasterIfCausal, "xla": xla})
    assert call(pattern="causal").max() == 1 and call(pattern="diagonal").max() == 0
    assert call(pattern="diagonal", implementation="mosaic_gpu").max() == 1


def test_accepts_lists_and_numpy():
    out = block_attention(
        *[np.ones((1, 5, 1, 4), np.float32)] * 3, [np.int64(1), 4], scale=np.float32(0.5)
    )
    assert isinstance(out, jax.Array) and out.shape == (1, 5, 1, 4)
