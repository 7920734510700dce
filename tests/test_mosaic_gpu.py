"""The Mosaic GPU kernels without a GPU: what their work lists cover, and their lowering.

Nothing runs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_gpu
from pallas_kernels.mosaic_gpu_work_lists import (
    ITEM_FIELDS,
    NO_BOUND,
    ROWS,
    WARPGROUPS,
    key_work_list,
    query_work_list,
)
from pallas_kernels.reference import block_mask
from tests.test_triton_launches import random_sizes

LENGTH = 300


def items_by_program(work_list):
    """The items of each program, as dicts."""
    counted = zip(work_list.items.tolist(), work_list.counts.tolist(), strict=True)
    return [
        [dict(zip(ITEM_FIELDS, row, strict=True)) for row in rows[:count]]
        for rows, count in counted
    ]


def count_visits(work_list, columns, masked_last):
    """(2, 3, L, L) int: how often each score of resident and streamed rows gets a weight.

    Args:
      work_list: a WorkList for 2 images and 3 heads.
      columns: streamed rows of a step.
      masked_last: whether the masked steps come last (queries are resident) or first.
    """
    counts = np.zeros((2, 3, LENGTH, LENGTH), int)
    for item in sum(items_by_program(work_list), []):
        num_rows, num_steps = item["num_rows"], item["num_steps"]
        assert 0 < num_rows <= ROWS * WARPGROUPS and 0 <= item["split"] <= num_steps
        for first in range(0, num_rows, ROWS):
            rows = np.arange(item["start"] + first, item["start"] + min(first + ROWS, num_rows))
            tile = item["tile"] + first // ROWS
            missing = [-1] * (ROWS - len(rows))
            assert work_list.resident_rows[tile].tolist() == [*rows, *missing]
            lower, upper = work_list.bounds[tile, :, : len(rows), None]
            for step in range(num_steps):
                is_last = step == num_steps - 1
                width = item["last_columns"] or columns if is_last else columns
                streamed = item["streamed_start"] + step * columns + np.arange(width)
                visible = (streamed >= lower) & (streamed < upper)
                if len(work_list.streamed_rows):  # queries: -1 where there is none
                    listed = work_list.streamed_rows[item["first_step"] + step]
                    is_row = listed >= 0
                    assert (listed[is_row] == streamed[is_row]).all()
                else:
                    is_row = np.ones(width, bool)
                if (step < item["split"]) == masked_last:  # computed without a mask
                    assert visible[:, is_row].all()
                in_range = is_row & (streamed >= 0) & (streamed < LENGTH)
                assert not visible[:, is_row & ~in_range].any()
                index = item["batch"], item["head"], rows[:, None], streamed[in_range]
                counts[index] += visible[:, in_range]
    return counts


@pytest.mark.parametrize("pattern", ["diagonal", "causal"])
@pytest.mark.parametrize("seed", range(12))
def test_every_score_is_visited_once(seed, pattern):
    sizes = random_sizes(seed, LENGTH)
    mask = np.broadcast_to(block_mask(sizes, pattern), (2, 3, LENGTH, LENGTH))
    columns, granularity = ((64, None), (256, None), (128, 64), (256, 64))[seed % 4]
    work_list = query_work_list(sizes, pattern, 2, 3, columns, 2, 7, granularity)
    np.testing.assert_array_equal(count_visits(work_list, columns, masked_last=True), mask)
    work_list = key_work_list(sizes, pattern, 2, 3, columns, 2, 7)
    visits = count_visits(work_list, columns, masked_last=False)
    np.testing.assert_array_equal(visits, mask.swapaxes(2, 3))


@pytest.mark.parametrize("make_work_list", [query_work_list, key_work_list])
@pytest.mark.parametrize("pattern", ["diagonal", "causal"])
def test_programs_have_equal_work(make_work_list, pattern):
    sizes = tuple(side * side for side in (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64))
    work = [
        sum(item["num_steps"] * 128 - (128 - item["last_columns"]) % 128 for item in items)
        for items in items_by_program(make_work_list(sizes, pattern, 2, 16, 128, 8, 132))
    ]
    assert max(work) < 1.05 * np.mean(work)


def test_more_programs_than_items():
    work_list = query_work_list((1, 4), "diagonal", 1, 1, 256, 8, 132)
    assert work_list.counts.sum() == 1 and work_list.items.shape == (132, 1, len(ITEM_FIELDS))
    assert (work_list.bounds[0, 1, 5:] == NO_BOUND).all()


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels require jax 0.11 or newer")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("pattern", ["diagonal", "causal"])
def test_kernels_lower(pattern, dtype):
    forward = {
        "float16": mosaic_gpu.PipelineConfig(128, 4, 64),
        "bfloat16": mosaic_gpu.PipelineConfig(256, 2),
    }[dtype]
    tuning = mosaic_gpu.TuningConfig(forward=forward)
    config = mosaic_gpu.CallConfig((1, 4, 9, 70, 300), pattern, 0.125, tuning)

    def forward_backward(q, k, v, d_out):
        out, vjp = jax.vjp(lambda *x: mosaic_gpu.attend(*x, config), q, k, v)
        return out, *vjp(d_out)

    arrays = [jax.ShapeDtypeStruct((2, 384, 4, 64), jnp.dtype(dtype))] * 4
    lowered = jax.jit(forward_backward).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu") == 3
