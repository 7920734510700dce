"""The TPU kernels: their tile pairs, tile sizes and error messages.

test_block_attention.py tests their values together with those of the other implementations.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_attention, mosaic_tpu, mosaic_tpu_kernels, tiles
from pallas_kernels.mosaic_tpu import TileSizes
from pallas_kernels.reference import block_mask
from tests.test_block_attention import (
    SIZES_256,
    SIZES_512,
    SIZES_1024,
    compare,
    every_pattern,
    interpreted_attention,
    random_sizes,
)

# The tile pairs.


def assemble_mask(sizes, pattern, q_rows, k_rows):
    """Assembles the dense mask from the tile pairs.

    Returns:
      The mask, and how often each score is visited: (L, L) each, rounded up to whole tiles.
    """
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
def test_pairs_cover_the_mask_exactly(tile, pattern):
    for seed in range(20):
        sizes = random_sizes(seed, length=90 + seed)
        mask, visits = assemble_mask(sizes, pattern, *tile)
        expected = np.zeros_like(mask)
        expected[: sum(sizes), : sum(sizes)] = block_mask(sizes, pattern)
        np.testing.assert_array_equal(mask, expected)
        # No pair is visited twice, without need, or with a mask that it does not need.
        by_tile = expected.reshape(mask.shape[0] // tile[0], tile[0], -1, tile[1]).swapaxes(1, 2)
        visited, full = tiles.tile_pairs(sizes, pattern, *tile)
        np.testing.assert_array_equal(visited, by_tile.any((2, 3)))
        np.testing.assert_array_equal(full, by_tile.all((2, 3)))
        assert visits.max() == 1


def test_pairs_of_a_small_list():
    # Blocks of 2, 6 and 4 tokens in tiles of 4: the first tile holds parts of the first two blocks.
    visited, full = tiles.tile_pairs((2, 6, 4), "diagonal", 4, 4)
    np.testing.assert_array_equal(visited, [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(full, [[0, 0, 0], [0, 1, 0], [0, 0, 1]])
    visited, full = tiles.tile_pairs((2, 6, 4), "causal", 4, 4)
    np.testing.assert_array_equal(visited, [[1, 1, 0], [1, 1, 0], [1, 1, 1]])
    np.testing.assert_array_equal(full, [[0, 0, 0], [1, 1, 0], [1, 1, 1]])


@every_pattern
@pytest.mark.parametrize("by_key", [False, True])
def test_every_sum_has_one_first_and_one_last_pair(by_key, pattern):
    config = mosaic_tpu.KernelConfig(
        1, 2, 8, 680, jnp.float32, SIZES_256, pattern, 1.0, TileSizes(128, 256, 1), True
    )
    q_tiles, k_tiles, flags = config.list_pairs(by_key)
    outer = k_tiles if by_key else q_tiles
    assert (np.diff(outer) >= 0).all() and set(outer) == set(range(outer.max() + 1))
    for tile in set(outer):
        tile_flags = flags[outer == tile]
        index = np.arange(len(tile_flags))
        is_first = tile_flags & mosaic_tpu_kernels.FIRST != 0
        is_last = tile_flags & mosaic_tpu_kernels.LAST != 0
        np.testing.assert_array_equal(is_first, index == 0)
        np.testing.assert_array_equal(is_last, index == index[-1])


@pytest.mark.parametrize(
    "sizes, pattern, itemsize, expected, num_pairs, scores_per_needed",
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
    sizes, pattern, itemsize, expected, num_pairs, scores_per_needed
):
    chosen = mosaic_tpu.choose_tile_sizes(sizes, pattern, 16, 64, itemsize)
    assert chosen == expected
    shifted = (chosen.shift, *sizes) if chosen.shift else sizes
    assert tiles.tile_pairs(shifted, pattern, chosen.queries, chosen.keys)[0].sum() == num_pairs
    needed = block_mask(sizes, pattern).sum()
    assert round(num_pairs * chosen.queries * chosen.keys / needed, 2) == scores_per_needed


# Values.


@pytest.mark.parametrize(
    "pattern, tile_sizes",
    [("causal", TileSizes(128, 256, 1)), ("diagonal", TileSizes(256, 128, 3))],
    ids=str,
)
def test_tiles_of_any_shape(pattern, tile_sizes, monkeypatch):
    # Several tiles of queries and keys, steps over the heads, and a last tile that extends past the
    # end, where interpret mode reads NaN. 24 channels are not a power of two.
    monkeypatch.setattr(mosaic_tpu, "choose_tile_sizes", lambda *_: tile_sizes)
    compare(interpreted_attention, (3, 200, 70, 150, 30), pattern, batch=2, heads=3, dim=24)


def test_shifted_tiles(monkeypatch):
    monkeypatch.setattr(
        mosaic_tpu, "choose_tile_sizes", lambda *_: TileSizes(128, 128, 2, shift=56)
    )
    compare(interpreted_attention, (3, 69, 128, 20), "diagonal", batch=1, heads=2, dim=16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmuls_round_no_operand_and_sum_in_float32(dtype):
    # A CPU does not round float32 operands of a matmul; a TPU rounds them to bfloat16 by default.
    x = jnp.zeros((1, 20, 1, 16), dtype)
    attend = functools.partial(interpreted_attention, block_sizes=(20,))
    program = str(jax.make_jaxpr(lambda *arrays: jax.vjp(attend, *arrays)[1](arrays[0]))(x, x, x))
    matmuls = re.findall(r"dot_general\[(.*?)\n *\]", program, re.DOTALL)
    assert len(matmuls) == 9  # there are no full pairs
    for matmul in matmuls:
        assert "preferred_element_type=float32" in matmul
        assert dtype == "bfloat16" or matmul.count("Precision.HIGHEST") == 2


# Errors.


def test_raises_without_a_tpu():
    q = jnp.zeros((1, 4, 1, 8))
    if mosaic_tpu.unsupported_reason(q) is None:
        pytest.skip("this process has a TPU")
    with pytest.raises(
        NotImplementedError,
        match="'mosaic_tpu' cannot run here: requires a TPU; this process runs on",
    ):
        block_attention(q, q, q, (4,), implementation="mosaic_tpu")


def test_raises_for_float16():
    q = jnp.zeros((1, 4, 1, 8), "float16")
    with pytest.raises(NotImplementedError, match="supports float32, bfloat16; got float16"):
        block_attention(q, q, q, (4,), implementation="mosaic_tpu")
