"""Static work lists: how consecutive blocks are grouped, so that each group is one dense attention.

Block sizes are known at trace time, so all of this is plain Python. A block alone computes no score that its mask
removes, but every group costs a fixed amount; so small blocks are computed together under a mask, large ones alone.
"""

import dataclasses
import functools

import numpy as np

from pallas_kernels.reference import block_mask

# What one more group costs, as the number of score cells (for one picture and head) that take the same time. Measured
# by `benchmarks/attention_cpu.py --groups`, forward + backward in float32 on two CPU cores. The optimum is flat: 500
# to 2000 are within noise of the best; 0 costs lists of 30 tokens a quarter, 4000 merges an 8x8 block with 21 tokens
# (30 % slower).
CELLS_PER_GROUP = 1000


@dataclasses.dataclass(frozen=True)
class Group:
    """Consecutive blocks computed together: queries [start, stop) against keys [key_start, stop)."""

    start: int  # first query
    stop: int  # one past the last query, and one past the last key
    key_start: int  # first key: start for the diagonal pattern, 0 for the causal one
    block_sizes: tuple[int, ...]  # the blocks of the group; their sum is stop - start

    @property
    def needs_mask(self):
        """Whether some score of the group is masked out: not for a block alone, whose queries see every key."""
        return len(self.block_sizes) > 1

    @property
    def num_keys(self):
        return self.stop - self.key_start


@functools.lru_cache(maxsize=256)
def group_blocks(
    block_sizes: tuple[int, ...], pattern: str, cells_per_group: int = CELLS_PER_GROUP
) -> tuple[Group, ...]:
    """Splits the blocks into the consecutive groups of least cost, the sum of queries x keys + cells_per_group.

    Exact, by dynamic programming over the end of the last group.
    """
    edges = np.cumsum((0, *block_sizes)).tolist()
    # best[j]: (least cost of the first j blocks, first block of the last group there).
    best = [(0, 0)]
    for last in range(1, len(edges)):
        candidates = []
        for first in reversed(range(last)):
            rows = edges[last] - edges[first]
            columns = rows if pattern == "diagonal" else edges[last]
            candidates.append((best[first][0] + rows * columns + cells_per_group, first))
            # A longer group that contains this one could be cut behind its first block. Once the cells that the cut
            # saves outweigh a group, they do so for every longer group too.
            cells_cut = block_sizes[first] * (rows - block_sizes[first]) * (2 if pattern == "diagonal" else 1)
            if cells_cut > cells_per_group:
                break
        best.append(min(candidates))
    groups = []
    last = len(block_sizes)
    while last:
        first = best[last][1]
        start, stop = edges[first], edges[last]
        key_start = start if pattern == "diagonal" else 0
        groups.append(Group(start, stop, key_start, tuple(block_sizes[first:last])))
        last = first
    return tuple(reversed(groups))


def group_mask(group: Group, pattern: str) -> np.ndarray:
    """(stop - start, stop - key_start) bool: the part of `block_mask` that the group computes."""
    own = block_mask(group.block_sizes, pattern)
    return np.pad(own, ((0, 0), (group.start - group.key_start, 0)), constant_values=True)


@functools.lru_cache(maxsize=256)
def tile_pairs(block_sizes: tuple[int, ...], pattern: str, q_rows: int, k_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs of tiles hold a score that the mask keeps, if queries and keys are cut into tiles of equal length.

    Tiles start at 0, q_rows, 2 q_rows, … and k_rows, 2 k_rows, …; the last ones may reach past the end.

    Returns:
      visited: (query tiles, key tiles) bool: the pair has a score to compute. Every tile has one in its row or column.
      full: the same shape: visited, and the mask keeps every score of the pair. A pair that reaches past the end is
        not full.
    """
    length = sum(block_sizes)
    block = np.repeat(np.arange(len(block_sizes)), block_sizes)

    def ends(rows):
        starts = np.arange(0, length, rows)
        return block[starts], block[np.minimum(starts + rows, length) - 1], starts + rows <= length

    (q_first, q_last, q_whole), (k_first, k_last, k_whole) = ends(q_rows), ends(k_rows)
    visited = k_first[None, :] <= q_last[:, None]
    full = k_last[None, :] <= q_first[:, None]
    if pattern == "diagonal":
        visited &= k_last[None, :] >= q_first[:, None]
        full &= k_first[None, :] >= q_last[:, None]
    return visited, full & q_whole[:, None] & k_whole[None, :]


def pack_blocks(block_sizes: tuple[int, ...], pattern: str, rows: int) -> tuple[Group, ...]:
    """Splits the blocks into consecutive groups: as many blocks as fit in `rows`, and longer blocks alone."""
    edges = np.cumsum((0, *block_sizes)).tolist()
    cuts = [0]
    for block in range(1, len(block_sizes)):
        if edges[block + 1] - edges[cuts[-1]] > rows:
            cuts.append(block)
    cuts.append(len(block_sizes))
    return tuple(
        Group(
            edges[first], edges[last], edges[first] if pattern == "diagonal" else 0, tuple(block_sizes[first:last])
        )
        for first, last in zip(cuts, cuts[1:])
    )


def query_tiles(group: Group, rows: int, columns: int):
    """Cuts the queries of a group into tiles of `rows`; the keys of each are visited in tiles of `columns`.

    Returns:
      A list of (first query, stop, first key, middle, edge, stop): the key tiles before the middle need neither a mask
      nor a check against the last key, those from the edge on only that check.
    """
    # The keys that every query of the group sees.
    common = group.start if group.needs_mask else group.stop
    middle = group.key_start + (common - group.key_start) // columns * columns
    edge = group.stop if group.needs_mask else middle
    return [
        (start, min(start + rows, group.stop), group.key_start, middle, edge, group.stop)
        for start in range(group.start, group.stop, rows)
    ]


def key_tiles(group: Group, pattern: str, length: int, rows: int, columns: int):
    """Cuts the keys of a group into tiles of `rows`; the queries of each are visited in tiles of `columns`.

    Returns:
      A list of (first key, stop, first query, middle, middle, stop): the query tiles from the middle on need no mask.
    """
    stop = group.stop if pattern == "diagonal" else length
    middle = group.start
    if group.needs_mask:
        middle = min(group.start - (group.start - group.stop) // columns * columns, stop)
    return [
        (start, min(start + rows, group.stop), group.start, middle, middle, stop)
        for start in range(group.start, group.stop, rows)
    ]


def query_bounds(block_sizes: tuple[int, ...], pattern: str) -> np.ndarray:
    """(2, L) int32: the first key that each query sees, and one past the last."""
    stops = np.cumsum(block_sizes)
    starts = stops - block_sizes if pattern == "diagonal" else np.zeros_like(stops)
    return np.stack([np.repeat(edge, block_sizes) for edge in (starts, stops)]).astype(np.int32)


def key_bounds(block_sizes: tuple[int, ...], pattern: str) -> np.ndarray:
    """(2, L) int32: the first query that sees each key, and one past the last."""
    stops = np.cumsum(block_sizes)
    starts = stops - block_sizes
    ends = stops if pattern == "diagonal" else np.full_like(stops, stops[-1])
    return np.stack([np.repeat(edge, block_sizes) for edge in (starts, ends)]).astype(np.int32)
