"""Static work lists: how consecutive blocks are grouped, so that each group is one dense attention.

Block sizes are known at trace time, so all of this is plain Python. A block alone computes no score that its mask
removes, but every group costs a fixed amount; so small blocks are computed together under a mask, large ones alone.
"""

import bisect
import dataclasses
import functools
import heapq

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
            cells_cut = (
                block_sizes[first]
                * (rows - block_sizes[first])
                * (2 if pattern == "diagonal" else 1)
            )
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
def tile_pairs(
    block_sizes: tuple[int, ...], pattern: str, q_rows: int, k_rows: int
) -> tuple[np.ndarray, np.ndarray]:
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


def independent_parts(
    block_sizes: tuple[int, ...], pattern: str, rows: int
) -> list[tuple[int, tuple[int, ...]]]:
    """(first row, block sizes) of consecutive parts of the sequence that see nothing of each other.

    Of the diagonal pattern as many blocks together as fit in `rows`, and longer blocks alone; else there is one part.
    """
    if pattern == "causal":
        return [(0, block_sizes)]
    edges = np.cumsum((0, *block_sizes)).tolist()
    cuts = [0]
    for block in range(1, len(block_sizes)):
        if edges[block + 1] - edges[cuts[-1]] > rows:
            cuts.append(block)
    cuts.append(len(block_sizes))
    return [(edges[first], block_sizes[first:last]) for first, last in zip(cuts, cuts[1:])]


def cut_rows(
    block_sizes: tuple[int, ...], row_options: tuple[int, ...], cost
) -> list[tuple[int, int, int]]:
    """Cuts all rows into tiles of least total cost. A tile may begin and end inside blocks, and hold parts of several.

    Exact, by dynamic programming over the end of the last tile, for tiles that are full or end with a block.

    Args:
      block_sizes: lengths of the consecutive blocks.
      row_options: how many rows a tile can have, for each kind of tile.
      cost: a function of (start, stop, kind) of a tile.

    Returns:
      A list of (start, stop, kind); kind is an index into row_options.
    """
    edges = np.cumsum(block_sizes).tolist()
    length = edges[-1]
    best = {
        0: (0, 0, 0)
    }  # row: (least cost of all rows before it, start and kind of the tile that ends there)
    ahead = [0]  # rows to cut on from, a heap: every tile that ends at the first of them is known
    while ahead:
        start = heapq.heappop(ahead)
        if start == length:
            break
        for kind, rows in enumerate(row_options):
            full = min(start + rows, length)
            within = edges[bisect.bisect_right(edges, start) : bisect.bisect_left(edges, full)]
            for stop in (*within, full):
                total = best[start][0] + cost(start, stop, kind)
                if stop not in best:
                    heapq.heappush(ahead, stop)
                if stop not in best or total < best[stop][0]:
                    best[stop] = (total, start, kind)
    found = []
    stop = length
    while stop:
        _, start, kind = best[stop]
        found.append((start, stop, kind))
        stop = start
    return found[::-1]


# What a tile costs beside its scores, as so many columns: its own rows are loaded and stored, and the loop filled.
_COLUMNS_PER_TILE = 32


def query_tiles(
    block_sizes: tuple[int, ...], pattern: str, options: tuple[tuple[int, int], ...], first: int = 0
) -> list[list[tuple[int, ...]]]:
    """Cuts the queries into tiles; the keys that a tile sees are visited in tiles of so many columns.

    Args:
      block_sizes: lengths of consecutive blocks that see no key outside themselves.
      pattern: "diagonal" or "causal".
      options: (rows, columns) of each kind of tile.
      first: number of the first row; all row numbers returned start from it.

    Returns:
      For each kind a list of (first query, stop, first key, middle, edge, stop): the key tiles before the middle need
      neither a mask nor a check against the last key, those from the edge on only that check.
    """
    stops, starts = _ends(block_sizes)

    def keys(start, stop):
        """(first key, end of those that all queries see, end)"""
        low, high = bisect.bisect_right(stops, start), bisect.bisect_right(stops, stop - 1)
        if pattern == "causal":
            return 0, stops[low], stops[high]
        return starts[low], stops[low] if low == high else starts[low], stops[high]

    def cost(start, stop, kind):
        rows, columns = options[kind]
        first_key, _, end = keys(start, stop)
        return rows * (-(-(end - first_key) // columns) * columns + _COLUMNS_PER_TILE)

    found = [[] for _ in options]
    for start, stop, kind in cut_rows(block_sizes, tuple(rows for rows, _ in options), cost):
        columns = options[kind][1]
        first_key, common, end = keys(start, stop)
        middle = first_key + (common - first_key) // columns * columns
        edge = end if common < end else middle
        found[kind].append(
            tuple(first + row for row in (start, stop, first_key, middle, edge, end))
        )
    return found


def key_tiles(
    block_sizes: tuple[int, ...], pattern: str, rows: int, columns: int, first: int = 0
) -> list[tuple[int, ...]]:
    """Cuts the keys into tiles of `rows`; the queries that see a tile are visited in tiles of `columns`.

    Arguments as in `query_tiles`.

    Returns:
      A list of (first key, stop, first query, middle, middle, stop): the query tiles from the middle on need no mask
      and are full; those before it end at the middle.
    """
    stops, starts = _ends(block_sizes)

    def queries(start, stop):
        """(first query, where those begin that all see all keys, end)"""
        low, high = bisect.bisect_right(stops, start), bisect.bisect_right(stops, stop - 1)
        if pattern == "causal":
            return starts[low], starts[high], stops[-1]
        return starts[low], starts[low] if low == high else stops[high], stops[high]

    def cost(start, stop, kind):
        first_query, _, end = queries(start, stop)
        return rows * (-(-(end - first_query) // columns) * columns + _COLUMNS_PER_TILE)

    found = []
    for start, stop, _ in cut_rows(block_sizes, (rows,), cost):
        first_query, common, end = queries(start, stop)
        middle = end - (end - common) // columns * columns
        found.append(tuple(first + row for row in (start, stop, first_query, middle, middle, end)))
    return found


def _ends(block_sizes):
    """Where the blocks stop, and where they start."""
    stops = np.cumsum(block_sizes).tolist()
    return stops, [0, *stops[:-1]]


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
