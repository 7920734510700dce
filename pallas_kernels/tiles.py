"""Static work lists: how the score matrix of block attention is split into dense pieces.

Block sizes are known at trace time, so everything here is plain Python and NumPy. Three
granularities: groups of whole blocks (xla.py), pairs of equal tiles (mosaic_tpu.py), and tiles
that start and stop at any row (the GPU kernels). All of them skip the scores that the mask
removes, as block-sparse FlashAttention does (arXiv 2205.14135, section 3.3).
"""

import bisect
import dataclasses
import functools
import heapq
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pallas_kernels.reference import block_mask

# Groups of blocks.

# The fixed cost of one group, as the number of scores (of one image and head) that take the same
# time. Measured by `benchmarks/attention_cpu.py --groups`, forward + backward in float32 on two CPU
# cores. The optimum is flat: 500 to 2000 are within noise of the best. With 0, lists of 30 tokens
# are 25 % slower; with 4000, an 8x8 block is merged with 21 tokens (30 % slower).
GROUP_OVERHEAD = 1000


@dataclasses.dataclass(frozen=True)
class Group:
    """Consecutive blocks in one dense attention: queries [start, stop), keys [key_start, stop)."""

    start: int  # first query
    stop: int  # one past the last query, and one past the last key
    key_start: int  # first key: start for the diagonal pattern, 0 for the causal one
    block_sizes: tuple[int, ...]  # the blocks of the group; their sum is stop - start

    @property
    def needs_mask(self) -> bool:
        """Whether the mask removes some scores. In a single block, every query sees every key."""
        return len(self.block_sizes) > 1

    @property
    def num_keys(self) -> int:
        """Number of keys of the group."""
        return self.stop - self.key_start


@functools.lru_cache(maxsize=256)
def group_blocks(
    block_sizes: tuple[int, ...], pattern: str, group_overhead: int = GROUP_OVERHEAD
) -> tuple[Group, ...]:
    """Splits the blocks into consecutive groups of least total cost.

    A single block computes no masked score, but each group has a fixed cost; so small blocks are
    computed together under a mask and large ones alone. The solution is exact, by dynamic
    programming over the end of the last group.

    Args:
      block_sizes: lengths of the consecutive blocks.
      pattern: "diagonal" or "causal".
      group_overhead: fixed cost of a group, in scores. A group costs queries * keys + this.

    Returns:
      The groups, in order.
    """
    edges = np.cumsum((0, *block_sizes)).tolist()
    # best[j]: (least cost of the first j blocks, first block of the last group there).
    best = [(0, 0)]
    for last in range(1, len(edges)):
        candidates = []
        for first in reversed(range(last)):
            num_queries = edges[last] - edges[first]
            num_keys = num_queries if pattern == "diagonal" else edges[last]
            candidates.append((best[first][0] + num_queries * num_keys + group_overhead, first))
            # A longer group that contains this one could be split after its first block. Once the
            # masked scores that the split saves outweigh a group, they do for longer groups too.
            scores_saved = (
                block_sizes[first]
                * (num_queries - block_sizes[first])
                * (2 if pattern == "diagonal" else 1)
            )
            if scores_saved > group_overhead:
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
    """Returns the part of `block_mask` that a group computes.

    Args:
      group: one of the groups of a list of blocks.
      pattern: "diagonal" or "causal".

    Returns:
      (stop - start, num_keys) bool.
    """
    own_blocks = block_mask(group.block_sizes, pattern)
    earlier = group.start - group.key_start
    return np.pad(own_blocks, ((0, 0), (earlier, 0)), constant_values=True)


# Pairs of equal tiles.


@functools.lru_cache(maxsize=256)
def tile_pairs(
    block_sizes: tuple[int, ...], pattern: str, q_rows: int, k_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the pairs of equal query and key tiles that hold a score which the mask keeps.

    Tiles start at 0, q_rows, 2 q_rows, ... and at 0, k_rows, 2 k_rows, ...; the last ones may
    extend past the end.

    Args:
      block_sizes: lengths of the consecutive blocks.
      pattern: "diagonal" or "causal".
      q_rows: length of a query tile.
      k_rows: length of a key tile.

    Returns:
      visited: (query tiles, key tiles) bool: the pair has a score to compute. Every tile has one in
        its row or column.
      full: (query tiles, key tiles) bool: visited, and the mask keeps every score of the pair. A
        pair that extends past the end is not full.
    """
    length = sum(block_sizes)
    block = np.repeat(np.arange(len(block_sizes)), block_sizes)  # (L,)

    def describe(rows):
        """(first block, last block, whether it ends within the sequence) of every tile."""
        starts = np.arange(0, length, rows)
        return block[starts], block[np.minimum(starts + rows, length) - 1], starts + rows <= length

    (q_first, q_last, q_whole), (k_first, k_last, k_whole) = describe(q_rows), describe(k_rows)
    visited = k_first[None, :] <= q_last[:, None]
    full = k_last[None, :] <= q_first[:, None]
    if pattern == "diagonal":
        visited &= k_last[None, :] >= q_first[:, None]
        full &= k_first[None, :] >= q_last[:, None]
    return visited, full & q_whole[:, None] & k_whole[None, :]


# Tiles that start and stop at any row.


class TileRange(NamedTuple):
    """Rows of one tile, and the rows of the other side that its program loops over.

    The resident rows (queries or keys) stay on the chip; the rows of the other side stream past
    them, tile by tile. Some of the streamed rows need a mask: from `split` to `mask_stop` if the
    resident rows are queries, before `split` if they are keys.
    """

    start: int  # resident rows [start, stop)
    stop: int
    streamed_start: int  # streamed rows [streamed_start, streamed_stop)
    split: int  # where streamed rows change between masked and unmasked
    mask_stop: int  # one past the last streamed row that needs a mask
    streamed_stop: int


# The fixed cost of a tile, in score columns: its resident rows are loaded and stored, and the
# pipeline of its loop fills.
_COLUMNS_PER_TILE = 32


def query_tiles(
    block_sizes: tuple[int, ...],
    pattern: str,
    tile_shapes: tuple[tuple[int, int], ...],
    offset: int = 0,
) -> list[list[TileRange]]:
    """Partitions the queries into tiles; each streams the keys that its queries see.

    Keys before `split` need neither a mask nor a bounds check: every query of the tile sees them.
    Those in [split, mask_stop) need both, those from `mask_stop` on only the bounds check.

    Args:
      block_sizes: lengths of consecutive blocks that see no key outside themselves.
      pattern: "diagonal" or "causal".
      tile_shapes: (queries, keys at a time) of each kind of tile.
      offset: added to all row numbers returned.

    Returns:
      For each kind of tile, its `TileRange`s.
    """
    block_stops, block_starts = _block_edges(block_sizes)

    def visible_keys(start, stop):
        """(first key, stop of those that all queries see, stop)"""
        first_block = bisect.bisect_right(block_stops, start)
        last_block = bisect.bisect_right(block_stops, stop - 1)
        if pattern == "causal":
            return 0, block_stops[first_block], block_stops[last_block]
        first_key = block_starts[first_block]
        common = block_stops[first_block] if first_block == last_block else first_key
        return first_key, common, block_stops[last_block]

    def cost(start, stop, kind):
        rows, columns = tile_shapes[kind]
        first_key, _, key_stop = visible_keys(start, stop)
        return rows * (-(-(key_stop - first_key) // columns) * columns + _COLUMNS_PER_TILE)

    found = [[] for _ in tile_shapes]
    row_options = tuple(rows for rows, _ in tile_shapes)
    for start, stop, kind in partition_rows(block_sizes, row_options, cost):
        columns = tile_shapes[kind][1]
        first_key, common, key_stop = visible_keys(start, stop)
        split = first_key + (common - first_key) // columns * columns
        mask_stop = key_stop if common < key_stop else split
        rows = (start, stop, first_key, split, mask_stop, key_stop)
        found[kind].append(TileRange(*(offset + row for row in rows)))
    return found


def key_tiles(
    block_sizes: tuple[int, ...], pattern: str, rows: int, columns: int, offset: int = 0
) -> list[TileRange]:
    """Partitions the keys into tiles; each streams the queries that see its keys.

    Queries before `split` need a mask and a bounds check. Those from `split` on need neither: they
    see every key of the tile, and fill whole tiles of `columns`.

    Args:
      block_sizes: lengths of consecutive blocks that see no key outside themselves.
      pattern: "diagonal" or "causal".
      rows: keys of a tile.
      columns: queries at a time.
      offset: added to all row numbers returned.

    Returns:
      The `TileRange`s, with mask_stop == split.
    """
    block_stops, block_starts = _block_edges(block_sizes)

    def visible_queries(start, stop):
        """(first query, start of those that see all keys, stop)"""
        first_block = bisect.bisect_right(block_stops, start)
        last_block = bisect.bisect_right(block_stops, stop - 1)
        if pattern == "causal":
            return block_starts[first_block], block_starts[last_block], block_stops[-1]
        first_query, query_stop = block_starts[first_block], block_stops[last_block]
        common = first_query if first_block == last_block else query_stop
        return first_query, common, query_stop

    def cost(start, stop, _kind):
        first_query, _, query_stop = visible_queries(start, stop)
        return rows * (-(-(query_stop - first_query) // columns) * columns + _COLUMNS_PER_TILE)

    found = []
    for start, stop, _ in partition_rows(block_sizes, (rows,), cost):
        first_query, common, query_stop = visible_queries(start, stop)
        split = query_stop - (query_stop - common) // columns * columns
        tile_rows = (start, stop, first_query, split, split, query_stop)
        found.append(TileRange(*(offset + row for row in tile_rows)))
    return found


def partition_rows(
    block_sizes: tuple[int, ...],
    row_options: tuple[int, ...],
    cost: Callable[[int, int, int], int],
) -> list[tuple[int, int, int]]:
    """Partitions all rows into tiles of least total cost.

    A tile may start and stop inside blocks, and hold parts of several. The solution is exact, by
    dynamic programming over the end of the last tile, among tiles that are full or stop at the end
    of a block.

    Args:
      block_sizes: lengths of the consecutive blocks.
      row_options: the maximum number of rows of each kind of tile.
      cost: a function of (start, stop, kind) of a tile.

    Returns:
      (start, stop, kind) of each tile, in order; kind is an index into row_options.
    """
    edges = np.cumsum(block_sizes).tolist()
    length = edges[-1]
    # best[row]: (least cost of all rows before it, start and kind of the tile that stops there).
    best = {0: (0, 0, 0)}
    # A heap of the rows where a tile may start. Every tile that stops at its least row is known.
    pending = [0]
    while pending:
        start = heapq.heappop(pending)
        if start == length:
            break
        for kind, rows in enumerate(row_options):
            full = min(start + rows, length)
            within = edges[bisect.bisect_right(edges, start) : bisect.bisect_left(edges, full)]
            for stop in (*within, full):
                total_cost = best[start][0] + cost(start, stop, kind)
                if stop not in best:
                    heapq.heappush(pending, stop)
                if stop not in best or total_cost < best[stop][0]:
                    best[stop] = (total_cost, start, kind)
    found = []
    stop = length
    while stop:
        _, start, kind = best[stop]
        found.append((start, stop, kind))
        stop = start
    return found[::-1]


def independent_segments(
    block_sizes: tuple[int, ...], pattern: str, rows: int
) -> list[tuple[int, tuple[int, ...]]]:
    """Splits the sequence into consecutive segments that see nothing of each other.

    Args:
      block_sizes: lengths of the consecutive blocks.
      pattern: "diagonal" or "causal". A causal sequence is one segment.
      rows: a segment holds as many blocks as fit in this many rows, or one longer block.

    Returns:
      (first row, block sizes) of each segment, in order.
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


def _block_edges(block_sizes):
    """(stops, starts) of the blocks, as lists of row numbers."""
    stops = np.cumsum(block_sizes).tolist()
    return stops, [0, *stops[:-1]]


# Bounds of single rows.


def query_bounds(block_sizes: tuple[int, ...], pattern: str) -> np.ndarray:
    """Returns which keys each query sees.

    Args:
      block_sizes: lengths of the consecutive blocks.
      pattern: "diagonal" or "causal".

    Returns:
      (2, L) int32: the first key that each query sees, and one past the last.
    """
    stops = np.cumsum(block_sizes)
    starts = stops - block_sizes if pattern == "diagonal" else np.zeros_like(stops)
    return np.stack([np.repeat(edge, block_sizes) for edge in (starts, stops)]).astype(np.int32)


def key_bounds(block_sizes: tuple[int, ...], pattern: str) -> np.ndarray:
    """Returns which queries see each key.

    Args:
      block_sizes: lengths of the consecutive blocks.
      pattern: "diagonal" or "causal".

    Returns:
      (2, L) int32: the first query that sees each key, and one past the last.
    """
    stops = np.cumsum(block_sizes)
    starts = stops - block_sizes
    stops = stops if pattern == "diagonal" else np.full_like(stops, stops[-1])
    return np.stack([np.repeat(edge, block_sizes) for edge in (starts, stops)]).astype(np.int32)
