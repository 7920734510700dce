"""The launches of the Triton kernels: what their tables visit, and where they skip the mask."""

import numpy as np
import pytest

from pallas_kernels import platform, tiles, triton_launches
from pallas_kernels.reference import block_mask
from pallas_kernels.triton_tuning import TileConfig, TuningConfig

TUNINGS = (
    TuningConfig(
        forward=(TileConfig(16, 16, 4, 1), TileConfig(32, 8, 4, 1)),
        backward_whole=(TileConfig(8, 16, 4, 1),),
        backward_keys=TileConfig(16, 8, 4, 1),
        backward_queries=TileConfig(8, 16, 4, 1),
        forward_heads_per_group=2,
        backward_heads_per_group=4,
    ),
    TuningConfig(
        forward=(TileConfig(8, 32, 4, 1),),
        backward_whole=(TileConfig(16, 16, 4, 1), TileConfig(32, 8, 4, 1)),
        backward_keys=TileConfig(32, 16, 4, 1),
        backward_queries=TileConfig(16, 8, 4, 1),
        forward_heads_per_group=4,
        backward_heads_per_group=2,
    ),
)


def random_sizes(seed, length=100):
    rng = np.random.default_rng(seed)
    cuts = rng.choice(np.arange(1, length), size=rng.integers(0, 12), replace=False)
    return tuple(np.diff([0, *sorted(cuts), length]).tolist())


def count_visits(launch, sizes, pattern, resident_axis):
    """(L, L) int: how often a launch adds up each score, as its kernel reads its table."""
    length = sum(sizes)
    mask = block_mask(sizes, pattern)
    counts = np.zeros((length, length), int)
    rows, columns = launch.constants["BLOCK_RESIDENT"], launch.constants.get("BLOCK_STREAMED")
    queries_resident = resident_axis == 0
    for start, stop, first, split, mask_stop, last, *_ in launch.table.tolist():
        assert 0 < stop - start <= rows
        resident = slice(start, stop)
        if launch.kernel == "backward_whole":
            counts[resident, resident] += mask[resident, resident]
            assert launch.constants["MASKED"] or mask[resident, resident].all()
            continue
        # One loop to the split and one from it on. Keys are loaded without a bounds check in the
        # first loop, queries in the second.
        loops = ((first, split, not queries_resident), (split, last, queries_resident))
        for begin, end, checked in loops:
            assert checked or (end - begin) % columns == 0
            for row in range(begin, end, columns):
                streamed = slice(row, min(row + columns, end))
                index = (resident, streamed) if queries_resident else (streamed, resident)
                unmasked = not split <= row < mask_stop if queries_resident else row >= split
                assert not unmasked or mask[index].all()
                counts[index] += mask[index]
    return counts


@pytest.mark.parametrize("pattern", ["diagonal", "causal"])
@pytest.mark.parametrize("tuning", TUNINGS, ids=("small", "large"))
@pytest.mark.parametrize("seed", range(12))
def test_every_score_is_visited_once(seed, tuning, pattern):
    sizes = random_sizes(seed)
    mask = block_mask(sizes, pattern)
    problem = triton_launches.Problem(sizes, pattern, 1.0, tuning)
    shape = (3, sum(sizes), 6, 64)
    forward = triton_launches.forward_launches(problem, shape, "float16")
    visits = sum(count_visits(launch, sizes, pattern, resident_axis=0) for launch in forward)
    np.testing.assert_array_equal(visits, mask)

    by_kernel = {}
    for launch in triton_launches.backward_launches(problem, shape, "float16"):
        by_kernel.setdefault(launch.kernel, []).append(launch)
        assert launch.grid == 3 * 6 * len(launch.table)

    def visits_of(kernel, resident_axis):
        launches = by_kernel.get(kernel, [])
        return sum(count_visits(launch, sizes, pattern, resident_axis) for launch in launches)

    whole = visits_of("backward_whole", resident_axis=0)
    for kernel, resident_axis in (("backward_keys", 1), ("backward_queries", 0)):
        np.testing.assert_array_equal(whole + visits_of(kernel, resident_axis), mask)


@pytest.mark.parametrize("pattern", ["diagonal", "causal"])
@pytest.mark.parametrize("seed", range(6))
def test_chunks_cover_what_the_programs_read(seed, pattern):
    sizes = random_sizes(seed, length=400)
    problem = triton_launches.Problem(sizes, pattern, 1.0, TUNINGS[0])
    launches = triton_launches.backward_launches(problem, (1, 400, 1, 64), "float16")
    chunks = [launch.table for launch in launches if launch.kernel == "prepare"][0]
    for launch in launches:
        if launch.kernel in ("backward_keys", "backward_queries"):
            for row in launch.table.tolist():
                start, stop, streamed_start, _, _, streamed_stop, first, chunk_stop, own = row
                covered = {i for chunk in chunks[first:chunk_stop] for i in range(*chunk[:2])}
                assert covered >= {*range(streamed_start, streamed_stop)}
                if launch.kernel == "backward_queries":
                    assert chunks[own, :2].tolist() == [start, stop]


def test_tiles_with_most_work_come_first():
    problem = triton_launches.Problem((4, 9, 16, 64), "causal", 1.0, TUNINGS[0])
    (launch, _) = triton_launches.forward_launches(problem, (1, 93, 1, 64), "float16")
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
    assert platform.gpu_name(kind) == name
