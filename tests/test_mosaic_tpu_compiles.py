"""Compiles the TPU kernels for TPU chips with libtpu, on a machine without a TPU.

Requires libtpu: `pip install "jax[tpu]"`.
"""

import functools
import math
import re

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import mosaic_tpu, tiles
from tests.test_block_attention import SIZES_256, SIZES_512, SIZES_1024, every_pattern

# The smallest host of each chip, by its name in libtpu. As usual, a v4 is one device of two cores.
CHIPS = {
    "v4": dict(topology_name="v4:2x2x1", chip_config_name="megacore"),
    "v5e": dict(topology_name="v5e:2x2"),
    "v5p": dict(topology_name="v5p:2x2x1"),
    "v6e": dict(topology_name="v6e:2x2"),
}
every_chip = pytest.mark.parametrize("chip", CHIPS)


@pytest.fixture(scope="module")
def chips():
    """chips("v5e") -> its devices, for compilation only."""
    pytest.importorskip("libtpu", reason='compiling for TPUs needs libtpu: pip install "jax[tpu]"')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another test process may be compiling too
        # Otherwise libtpu looks for the name and chip of the host on the network, and logs errors.
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        patch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        patch.setenv("TPU_LOG_DIR", "disabled")
        # The other tests disable optimizations to compile faster; users do not.
        disabled = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", False)
        yield lambda chip: topologies.get_topology_desc(platform="tpu", **CHIPS[chip]).devices
        jax.config.update("jax_disable_most_optimizations", disabled)


def compile_program(
    sharding,
    sizes,
    pattern,
    dtype="bfloat16",
    batch=2,
    heads=16,
    dim=64,
    transform=lambda function: function,
):
    """Compiles a forward and backward pass for the devices of the sharding."""
    attend = functools.partial(
        mosaic_tpu.attention, block_sizes=sizes, pattern=pattern, scale=dim**-0.5
    )

    def run(q, k, v, d_out):
        out, vjp = jax.vjp(transform(attend), q, k, v)
        return out, *vjp(d_out)

    x = jax.ShapeDtypeStruct((batch, sum(sizes), heads, dim), dtype, sharding=sharding)
    return jax.jit(run).trace(x, x, x, x).lower().compile()


def check(program, sizes, pattern, itemsize=2, batch=2, heads=16, dim=64):
    text = program.as_text()
    for name in ("block_attention_forward", "block_attention_d_q", "block_attention_d_kv"):
        assert name in text
    # The cost estimates of the kernels: 2, 3 and 4 matmuls over the scores of the visited pairs.
    chosen = mosaic_tpu.choose_tile_sizes(sizes, pattern, heads, dim, itemsize)
    shifted = (chosen.shift, *sizes) if chosen.shift else sizes
    num_pairs = tiles.tile_pairs(shifted, pattern, chosen.queries, chosen.keys)[0].sum()
    flops = 2 * 9 * batch * heads * dim * num_pairs * chosen.queries * chosen.keys
    assert program.cost_analysis()["flops"] == pytest.approx(flops, rel=1e-3)
    # For D = 64, XLA lays out tokens in the lanes, as the kernels do: nothing is transposed.
    if dim == 64:
        moved = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
        largest = max((math.prod(map(int, shape.split(","))) for shape in moved), default=0)
        assert largest < batch * heads * dim * sum(sizes)


@every_pattern
@every_chip
def test_list_256(chip, pattern, chips):
    # Each head of a step is a copy of the code of the kernel: 4 heads compile faster than 16.
    program = compile_program(SingleDeviceSharding(chips(chip)[0]), SIZES_256, pattern, heads=4)
    check(program, SIZES_256, pattern, heads=4)


@every_pattern
@every_chip
@pytest.mark.parametrize("sizes", [SIZES_256, SIZES_512, SIZES_1024], ids=["256", "512", "1024"])
@pytest.mark.slow
def test_16_heads(sizes, chip, pattern, chips):
    check(compile_program(SingleDeviceSharding(chips(chip)[0]), sizes, pattern), sizes, pattern)


@every_chip
@pytest.mark.parametrize("sizes", [SIZES_256, SIZES_512, SIZES_1024], ids=["256", "512", "1024"])
@pytest.mark.slow
def test_heads_of_128_and_float32(sizes, chip, chips):
    options = dict(heads=8, dim=128)
    one = SingleDeviceSharding(chips(chip)[0])
    check(compile_program(one, sizes, "diagonal", **options), sizes, "diagonal", **options)
    check(
        compile_program(one, sizes, "causal", dtype="float32", **options),
        sizes,
        "causal",
        itemsize=4,
        **options,
    )


@every_chip
@pytest.mark.parametrize(
    "sizes, heads, dim", [((1,), 1, 64), ((7, 129, 3), 3, 32), ((7, 129, 3), 5, 24)], ids=str
)
@pytest.mark.slow
def test_odd_shapes(sizes, heads, dim, chip, chips):
    one = SingleDeviceSharding(chips(chip)[0])
    for dtype in ("float32", "bfloat16"):
        compile_program(one, sizes, "causal", dtype=dtype, batch=1, heads=heads, dim=dim)


def test_shard_map_over_batch_and_heads(chips):
    mesh = Mesh(
        np.reshape(chips("v5e"), (2, 2)), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2
    )
    spec = P("batch", None, "heads", None)
    transform = functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    program = compile_program(
        NamedSharding(mesh, spec), SIZES_256, "diagonal", heads=4, transform=transform
    )
    assert not any(word in program.as_text() for word in ("all-gather", "all-reduce", "all-to-all"))


def test_vmap_of_remat_and_scan(chips):
    # As in a stack of layers, with one more axis.
    attend = functools.partial(
        mosaic_tpu.attention, block_sizes=SIZES_256, pattern="diagonal", scale=0.125
    )

    def loss(x):
        x, _ = jax.lax.scan(lambda x, _: (jax.checkpoint(attend)(x, x, x), None), x, length=2)
        return x.astype("float32").sum()

    x = jax.ShapeDtypeStruct(
        (2, 1, 680, 2, 64), "bfloat16", sharding=SingleDeviceSharding(chips("v5e")[0])
    )
    text = jax.jit(jax.vmap(jax.grad(loss))).trace(x).lower().compile().as_text()
    assert "block_attention_forward" in text and "block_attention_d_kv" in text
