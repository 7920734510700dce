"""The tables of row ranges that the Triton kernels read: what they visit, and where they say that no mask is needed."""

import numpy as np
import pytest

from pallas_kernels import tiles, triton_plan
from pallas_kernels.reference import block_mask
from pallas_kernels.triton_plan import Tile, Tuning

TUNINGS = (
    Tuning(
        (Tile(16, 16, 4, 1), Tile(32, 8, 4, 1)),
        (Tile(8, 16, 4, 1),),
        Tile(16, 8, 4, 1),
        Tile(8, 16, 4, 1),
        2,
        4,
    ),
    Tuning(
        (Tile(8, 32, 4, 1),),
        (Tile(16, 16, 4, 1), Tile(32, 8, 4, 1)),
        Tile(32, 16, 4, 1),
        Tile(16, 8, 4, 1),
        4,
        2,
    ),
)


def random_sizes(seed, length=100):
    rng = np.random.default_rng(seed)
    cuts = rng.choice(np.arange(1, length), size=rng.integers(0, 12), replace=False)
    return tuple(np.diff([0, *sorted(cuts), length]).tolist())


def visited(launch, sizes, pattern, own_axis):
    """(L, L) int: how often the launch adds up each score, as its kernel reads its table."""
    length = sum(sizes)
    mask = block_mask(sizes, pattern)
    counts = np.zeros((length, length), int)
    rows, columns = launch.constants["BLOCK_OWN"], launch.constants.get("BLOCK_OTHER")
    for own_start, own_stop, start, middle, edge, stop, *_ in launch.table.tolist():
        assert 0 < own_stop - own_start <= rows
        own = slice(own_start, own_stop)
        if launch.kernel == "backward_whole":
            counts[own, own] += mask[own, own]
            assert launch.constants["MASKED"] or mask[own, own].all()
            continue
        # A loop to the middle and one from it on. Keys are loaded without a check in the first, queries in the second.
        for begin, end, checked in ((start, middle, own_axis == 1), (middle, stop, own_axis == 0)):
            assert checked or (end - begin) % columns == 0
            for first in range(begin, end, columns):
                other = slice(first, min(first + columns, end))
                index = (own, other) if own_axis == 0 else (other, own)
                free = not middle <= first < edge if own_axis == 0 else first >= middle
                assert not free or mask[index].all()
                counts[index] += mask[index]
    return counts


@pytest.mark.parametrize("pattern", ["diagonal", "causal"])
@pytest.mark.parametrize("tuning", TUNINGS, ids=("small", "large"))
@pytest.mark.parametrize("seed", range(12))
def test_every_score_once(seed, tuning, pattern):
    sizes = random_sizes(seed)
    mask = block_mask(sizes, pattern)
    problem = triton_plan.Problem(sizes, pattern, 1.0, tuning)
    shape = (3, sum(sizes), 6, 64)
    forward = triton_plan.forward_launches(problem, shape, "float16")
    np.testing.assert_array_equal(
        sum(visited(launch, sizes, pattern, 0) for launch in forward), mask
    )

    by_kernel = {}
    for launch in triton_plan.backward_launches(problem, shape, "float16"):
        by_kernel.setdefault(launch.kernel, []).append(launch)
        assert launch.grid == 3 * 6 * len(launch.table)
    whole = sum(
        visited(launch, sizes, pattern, 0) for launch in by_kernel.get("backward_whole", [])
    )
    for kernel, axis in (("backward_keys", 1), ("backward_queries", 0)):
        counts = sum(visited(launch, sizes, pattern, axis) for launch in by_kernel.get(kernel, []))
        np.testing.assert_array_equal(whole + counts, mask)


@pytest.mark.parametrize("pattern", ["diagonal", "causal"])
@pytest.mark.parametrize("seed", range(6))
def test_pieces_cover_what_the_programs_read(seed, pattern):
    sizes = random_sizes(seed, length=400)
    problem = triton_plan.Problem(sizes, pattern, 1.0, TUNINGS[0])
    launches = triton_plan.backward_launches(problem, (1, 400, 1, 64), "float16")
    pieces = [launch.table for launch in launches if launch.kernel == "prepare"][0]
    for launch in launches:
        if launch.kernel in ("backward_keys", "backward_queries"):
            for (
                own_start,
                own_stop,
                start,
                _,
                _,
                stop,
                first,
                last,
                own_piece,
            ) in launch.table.tolist():
                rows = {row for piece in pieces[first:last] for row in range(piece[0], piece[1])}
                assert rows >= {*range(start, stop)}
                if launch.kernel == "backward_queries":
                    assert pieces[own_piece, :2].tolist() == [own_start, own_stop]


def test_heavy_tiles_come_first():
    problem = triton_plan.Problem((4, 9, 16, 64), "causal", 1.0, TUNINGS[0])
    (launch, _) = triton_plan.forward_launches(problem, (1, 93, 1, 64), "float16")
    work = launch.table[:, 5] - launch.table[:, 2]
    assert (np.diff(work) <= 0).all()


def test_bounds():
    np.testing.assert_array_equal(tiles.query_bounds((1, 2), "diagonal"), [[0, 1, 1], [1, 3, 3]])
    np.testing.assert_array_equal(tiles.query_bounds((1, 2), "causal"), [[0, 0, 0], [1, 3, 3]])
    np.testing.assert_array_equal(tiles.key_bounds((1, 2), "diagonal"), [[0, 1, 1], [1, 3, 3]])
    np.testing.assert_array_equal(tiles.key_bounds((1, 2), "causal"), [[0, 1, 1], [3, 3, 3]])


@pytest.mark.parametrize(
    "kind, name",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H100"),
        ("NVIDIA GH200 480GB", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("cpu", "cpu"),
    ],
)
def test_gpu_names(kind, name):
    assert triton_plan.gpu_name(kind) == name
