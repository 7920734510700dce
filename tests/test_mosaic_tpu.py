"""The TPU kernels, beyond what test_block_attention.py asks of every implementation: lists, tile sizes, refusals."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_attention, mosaic_tpu, tiles
from pallas_kernels.mosaic_tpu import TileSizes
from pallas_kernels.reference import block_mask
from tests.test_block_attention import (
    SIZES_256,
    SIZES_512,
    SIZES_1024,
    compare,
    every_pattern,
    interpreted,
    random_sizes,
)

# The work lists.


def mask_of_visits(sizes, pattern, q_rows, k_rows):
    """The dense mask put together from the tile pairs, and how often each score was visited; up to whole tiles."""
    visited, full = tiles.tile_pairs(sizes, pattern, q_rows, k_rows)
    shape = (visited.shape[0] * q_rows, visited.shape[1] * k_rows)
    mask, visits = np.zeros(shape, bool), np.zeros(shape, int)
    lower, upper = np.pad(tiles.query_bounds(sizes, pattern), ((0, 0), (0, shape[0] - sum(sizes))))
    keys = np.arange(shape[1])
    for q_tile, k_tile in zip(*np.nonzero(visited), strict=True):
        rows, columns = (slice(i * n, (i + 1) * n) for i, n in ((q_tile, q_rows), (k_tile, k_rows)))
        inside = (lower[rows, None] <= keys[columns]) & (keys[columns] < upper[rows, None])
        mask[rows, columns] = full[q_tile, k_tile] | inside
        visits[rows, columns] += 1
    return mask, visits


@every_pattern
@pytest.mark.parametrize("tile", [(8, 8), (16, 4), (4, 16), (7, 5), (64, 128)], ids=str)
def test_visits_cover_the_mask_exactly(tile, pattern):
    for seed in range(20):
        sizes = random_sizes(seed, length=90 + seed)
        mask, visits = mask_of_visits(sizes, pattern, *tile)
        expected = np.zeros_like(mask)
        expected[: sum(sizes), : sum(sizes)] = block_mask(sizes, pattern)
        np.testing.assert_array_equal(mask, expected)
        # No pair is visited twice, in vain, or under a mask that it does not need.
        by_tile = expected.reshape(mask.shape[0] // tile[0], tile[0], -1, tile[1]).swapaxes(1, 2)
        visited, full = tiles.tile_pairs(sizes, pattern, *tile)
        np.testing.assert_array_equal(visited, by_tile.any((2, 3)))
        np.testing.assert_array_equal(full, by_tile.all((2, 3)))
        assert visits.max() == 1


def test_small_work_list():
    # Blocks of 2, 6 and 4 tokens in tiles of 4: the first tile holds the edge between the first two blocks.
    visited, full = tiles.tile_pairs((2, 6, 4), "diagonal", 4, 4)
    np.testing.assert_array_equal(visited, [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(full, [[0, 0, 0], [0, 1, 0], [0, 0, 1]])
    visited, full = tiles.tile_pairs((2, 6, 4), "causal", 4, 4)
    np.testing.assert_array_equal(visited, [[1, 1, 0], [1, 1, 0], [1, 1, 1]])
    np.testing.assert_array_equal(full, [[0, 0, 0], [1, 1, 0], [1, 1, 1]])


@every_pattern
@pytest.mark.parametrize("by_key", [False, True])
def test_flags_open_and_close_every_sum_once(by_key, pattern):
    plan = mosaic_tpu._Plan(
        1, 2, 8, 680, jnp.float32, SIZES_256, pattern, 1.0, TileSizes(128, 256, 1), True
    )
    q_tiles, k_tiles, flags = plan.visits(by_key)
    own = k_tiles if by_key else q_tiles
    assert (np.diff(own) >= 0).all() and set(own) == set(range(own.max() + 1))
    for tile in set(own):
        of_tile = flags[own == tile]
        np.testing.assert_array_equal(
            of_tile & mosaic_tpu._FIRST != 0, np.arange(len(of_tile)) == 0
        )
        np.testing.assert_array_equal(
            of_tile & mosaic_tpu._LAST != 0, np.arange(len(of_tile)) == len(of_tile) - 1
        )


@pytest.mark.parametrize(
    "sizes, pattern, itemsize, expected, visits, cells_per_needed",
    [
        (SIZES_256, "diagonal", 2, TileSizes(128, 128, 16, shift=88), 14, 2.08),
        (SIZES_256, "causal", 2, TileSizes(256, 256, 8), 8, 1.83),
        (SIZES_512, "diagonal", 2, TileSizes(256, 256, 8, shift=64), 31, 1.33),
        (SIZES_512, "causal", 2, TileSizes(256, 256, 8), 60, 1.20),
        (SIZES_1024, "diagonal", 2, TileSizes(256, 256, 8), 445, 1.19),
        (SIZES_1024, "causal", 2, TileSizes(512, 512, 4), 247, 1.14),
        (SIZES_256, "diagonal", 4, TileSizes(128, 128, 8, shift=88), 14, 2.08),
        (SIZES_1024, "causal", 4, TileSizes(256, 256, 4), 907, 1.04),
    ],
)
def test_tile_sizes_for_16_heads_of_64(
    sizes, pattern, itemsize, expected, visits, cells_per_needed
):
    chosen = mosaic_tpu.choose_tiles(sizes, pattern, 16, 64, itemsize)
    assert chosen == expected
    shifted = (chosen.shift, *sizes) if chosen.shift else sizes
    assert tiles.tile_pairs(shifted, pattern, chosen.queries, chosen.keys)[0].sum() == visits
    needed = block_mask(sizes, pattern).sum()
    assert round(visits * chosen.queries * chosen.keys / needed, 2) == cells_per_needed


# Values.


@pytest.mark.parametrize(
    "pattern, sizes_of_tiles",
    [("causal", TileSizes(128, 256, 1)), ("diagonal", TileSizes(256, 128, 3))],
    ids=str,
)
def test_tiles_of_any_shape(pattern, sizes_of_tiles, monkeypatch):
    # Several tiles both ways, steps over the heads, and a last tile that reaches past the end, where interpret mode
    # reads nan. 24 channels are no power of two.
    monkeypatch.setattr(mosaic_tpu, "choose_tiles", lambda *_: sizes_of_tiles)
    compare(interpreted, (3, 200, 70, 150, 30), pattern, batch=2, heads=3, dim=24)


def test_shifted_tiles(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "choose_tiles", lambda *_: TileSizes(128, 128, 2, shift=56))
    compare(interpreted, (3, 69, 128, 20), "diagonal", batch=1, heads=2, dim=16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmuls_round_no_operand_and_sum_in_float32(dtype):
    # On a CPU every matmul of float32 is exact; a TPU rounds its operands to bfloat16 unless told otherwise.
    x = jnp.zeros((1, 20, 1, 16), dtype)
    attend = functools.partial(interpreted, block_sizes=(20,))
    program = str(jax.make_jaxpr(lambda *arrays: jax.vjp(attend, *arrays)[1](arrays[0]))(x, x, x))
    matmuls = re.findall(r"dot_general\[(.*?)\n *\]", program, re.DOTALL)
    assert len(matmuls) == 9  # no full pairs here
    for matmul in matmuls:
        assert "preferred_element_type=float32" in matmul
        assert dtype == "bfloat16" or matmul.count("Precision.HIGHEST") == 2


# Refusals.


def test_refuses_where_there_is_no_tpu():
    q = jnp.zeros((1, 4, 1, 8))
    if mosaic_tpu.why_not(q) is None:
        pytest.skip("this process has a TPU")
    with pytest.raises(
        NotImplementedError,
        match="'mosaic_tpu' cannot run here: it needs a TPU; this process runs on",
    ):
        block_attention(q, q, q, (4,), implementation="mosaic_tpu")


def test_refuses_float16():
    q = jnp.zeros((1, 4, 1, 8), "float16")
    with pytest.raises(
        NotImplementedError, match="TPUs compute in float32 and bfloat16; q is float16"
    ):
        block_attention(q, q, q, (4,), implementation="mosaic_tpu")
