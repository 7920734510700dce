"""The Mosaic GPU kernels without a GPU: what their work lists cover, and their lowering. Nothing is run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_gpu, mosaic_gpu_plan
from pallas_kernels.mosaic_gpu_plan import ITEM, NO_BOUND, ROWS, WARPGROUPS
from pallas_kernels.reference import block_mask
from tests.test_triton_plan import random_sizes

LENGTH = 300


def items_of(plan):
    """Each program's items as dicts."""
    counted = zip(plan.items.tolist(), plan.counts.tolist(), strict=True)
    return [[dict(zip(ITEM, row, strict=True)) for row in rows[:count]] for rows, count in counted]


def computed(plan, columns, masked_last):
    """(2, 3, L, L) int: how often each score of own and other rows has a weight, by picture and head."""
    counts = np.zeros((2, 3, LENGTH, LENGTH), int)
    for item in sum(items_of(plan), []):
        assert 0 < item["rows"] <= ROWS * WARPGROUPS and 0 <= item["split"] <= item["steps"]
        for first in range(0, item["rows"], ROWS):
            rows = np.arange(item["start"] + first, item["start"] + min(first + ROWS, item["rows"]))
            tile = item["tile"] + first // ROWS
            assert plan.own_rows[tile].tolist() == [*rows, *[-1] * (ROWS - len(rows))]
            lo, hi = plan.bounds[tile, :, : len(rows), None]
            for step in range(item["steps"]):
                width = item["last"] or columns if step == item["steps"] - 1 else columns
                others = item["other"] + step * columns + np.arange(width)
                weight = (others >= lo) & (others < hi)
                if len(plan.other_rows):  # rows that are no query are known by their numbers
                    listed = plan.other_rows[item["other_tile"] + step]
                    is_query = listed >= 0
                    assert (listed[is_query] == others[is_query]).all()
                else:
                    is_query = np.ones(width, bool)
                if (step < item["split"]) == masked_last:  # computed without a mask
                    assert weight[:, is_query].all()
                real = is_query & (others >= 0) & (others < LENGTH)
                assert not weight[:, is_query & ~real].any()
                counts[item["batch"], item["head"], rows[:, None], others[real]] += weight[:, real]
    return counts


@pytest.mark.parametrize("pattern", ["diagonal", "causal"])
@pytest.mark.parametrize("seed", range(12))
def test_every_score_once(seed, pattern):
    sizes = random_sizes(seed, LENGTH)
    mask = np.broadcast_to(block_mask(sizes, pattern), (2, 3, LENGTH, LENGTH))
    columns, grain = ((64, None), (256, None), (128, 64), (256, 64))[seed % 4]
    plan = mosaic_gpu_plan.query_plan(sizes, pattern, 2, 3, columns, 2, 7, grain)
    np.testing.assert_array_equal(computed(plan, columns, masked_last=True), mask)
    plan = mosaic_gpu_plan.key_plan(sizes, pattern, 2, 3, columns, 2, 7)
    np.testing.assert_array_equal(computed(plan, columns, masked_last=False), mask.swapaxes(2, 3))


@pytest.mark.parametrize("make", [mosaic_gpu_plan.query_plan, mosaic_gpu_plan.key_plan])
@pytest.mark.parametrize("pattern", ["diagonal", "causal"])
def test_programs_have_equal_work(make, pattern):
    sizes = tuple(side * side for side in (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64))
    work = [
        sum(item["steps"] * 128 - (128 - item["last"]) % 128 for item in own)
        for own in items_of(make(sizes, pattern, 2, 16, 128, 8, 132))
    ]
    assert max(work) < 1.05 * np.mean(work)


def test_more_programs_than_items():
    plan = mosaic_gpu_plan.query_plan((1, 4), "diagonal", 1, 1, 256, 8, 132)
    assert plan.counts.sum() == 1 and plan.items.shape == (132, 1, len(ITEM))
    assert (plan.bounds[0, 1, 5:] == NO_BOUND).all()


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need jax 0.11 or newer")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("pattern", ["diagonal", "causal"])
def test_lowers(pattern, dtype):
    forward = {"float16": mosaic_gpu.Step(128, 4, 64), "bfloat16": mosaic_gpu.Step(256, 2)}[dtype]
    call = mosaic_gpu.Call((1, 4, 9, 70, 300), pattern, 0.125, mosaic_gpu.Tuning(forward=forward))

    def forward_backward(q, k, v, d_out):
        out, vjp = jax.vjp(lambda *x: mosaic_gpu.attend(*x, call), q, k, v)
        return out, *vjp(d_out)

    arrays = [jax.ShapeDtypeStruct((2, 384, 4, 64), jnp.dtype(dtype))] * 4
    lowered = jax.jit(forward_backward).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu") == 3
