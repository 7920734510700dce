"""The Mosaic GPU kernel without a GPU: what its work lists cover, and its lowering. Nothing is run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_gpu, mosaic_gpu_plan, triton, triton_plan
from pallas_kernels.mosaic_gpu_plan import EVERY_KEY, ITEM, ROWS, WARPGROUPS
from pallas_kernels.reference import block_mask
from tests.test_triton_plan import random_sizes


def items_of(plan):
    """Each program's items as dicts."""
    counted = zip(plan.items.tolist(), plan.counts.tolist(), strict=True)
    return [[dict(zip(ITEM, row, strict=True)) for row in rows[:count]] for rows, count in counted]


@pytest.mark.parametrize("pattern", ["diagonal", "causal"])
@pytest.mark.parametrize("seed", range(12))
def test_every_score_once(seed, pattern):
    sizes = random_sizes(seed, length=300)
    mask = block_mask(sizes, pattern)
    columns = (64, 256)[seed % 2]
    plan = mosaic_gpu_plan.plan(sizes, pattern, 2, 3, columns, 2, 7)
    counts = np.zeros((2, 3, 300, 300), int)
    for item in sum(items_of(plan), []):
        assert 0 < item["rows"] <= ROWS * WARPGROUPS
        for first in range(0, item["rows"], ROWS):
            rows = range(item["start"] + first, item["start"] + min(first + ROWS, item["rows"]))
            tile = item["tile"] + first // ROWS
            assert plan.place[rows].tolist() == [tile * ROWS + i for i in range(len(rows))]
            assert (plan.bounds[tile, 1, len(rows) :] == EVERY_KEY).all()
            for step in range(item["steps"]):
                key = item["first_key"] + step * columns
                keys = np.arange(key, key + columns)
                lo, hi = plan.bounds[tile, :, : len(rows), None]
                seen = (keys >= lo) & (keys < hi)
                if step < item["full"]:
                    assert seen.all()
                inside = keys < 300
                assert not seen[:, ~inside].any()
                counts[item["batch"], item["head"], rows.start : rows.stop, keys[inside]] += seen[:, inside].T
    np.testing.assert_array_equal(counts, np.broadcast_to(mask, counts.shape))


def test_programs_have_equal_work():
    sizes = tuple(side * side for side in (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64))
    for pattern in ("diagonal", "causal"):
        work = [
            sum(item["steps"] for item in own) for own in items_of(mosaic_gpu_plan.plan(sizes, pattern, 2, 16, 256, 8, 132))
        ]
        assert max(work) < 1.05 * np.mean(work)


def test_more_programs_than_items():
    plan = mosaic_gpu_plan.plan((1, 4), "diagonal", 1, 1, 256, 8, 132)
    assert plan.counts.sum() == 1 and plan.items.shape == (132, 1, len(ITEM))


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel needs jax 0.11 or newer")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("pattern", ["diagonal", "causal"])
def test_lowers(pattern, dtype):
    problem = triton_plan.Problem(
        (1, 4, 9, 70, 300), pattern, 0.125, triton_plan.tuning_for("H100", 384, 64, dtype, pattern)
    )
    call = mosaic_gpu.Call(triton.Call(problem, compute_capability=90))
    x = jax.ShapeDtypeStruct((2, 384, 4, 64), jnp.dtype(dtype))
    text = jax.jit(mosaic_gpu.run_forward(call)).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 1
