"""The work of the Mosaic GPU kernel as plain Python data: which tiles of queries each block of threads computes.

Needs no JAX. The kernel is persistent: as many programs as the GPU has multiprocessors, each with a list of items, so
that the copies of the next item run beside the products of this one. Block sizes are known when a program is traced, so
the lists are balanced beforehand.
"""

import dataclasses
import functools
import heapq

import numpy as np

from pallas_kernels import tiles

ROWS = 64  # queries of a warpgroup: rows of one wgmma
WARPGROUPS = 2  # that compute; one computes a softmax while the other has the matrix units
EVERY_KEY = 1 << 30  # an upper bound on keys for rows that are no query

# Of an item, in table columns. Keys are visited in steps of `columns`; those from `full` on need a mask.
ITEM = ("start", "rows", "first_key", "full", "steps", "tile", "batch", "head")

# What an item costs beside its steps of 256 keys, as so many steps: it starts and ends unoverlapped.
_STEPS_PER_ITEM = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """All that the kernel reads beside q, k and v."""

    items: np.ndarray  # (programs, most items of one, 8) int32, columns as in ITEM
    counts: np.ndarray  # (programs,) int32: items of each
    bounds: np.ndarray  # (tiles, 2, ROWS) int32: the first key that each query of a tile sees, and one past the last
    place: np.ndarray  # (L,) int32: where query l is among (tiles, ROWS)


@functools.lru_cache(maxsize=64)
def plan(
    block_sizes: tuple[int, ...], pattern: str, batch: int, heads: int, columns: int, together: int, programs: int
) -> Plan:
    """The items of `programs` programs.

    Args:
      block_sizes, pattern: as in `pallas_kernels.block_attention`.
      batch, heads: every pair of them goes through the same tiles.
      columns: keys of a step.
      together: heads that go through the tiles side by side, at most, so that their keys stay in the L2 cache.
      programs: how many run at once.
    """
    (rows,) = tiles.query_tiles(block_sizes, pattern, ((ROWS * WARPGROUPS, columns),))
    seen = tiles.query_bounds(block_sizes, pattern)
    items, bounds, place = [], [], np.zeros(sum(block_sizes), np.int32)
    for start, stop, first_key, middle, _, end in rows:
        full = (middle - first_key) // columns
        steps = full + -(-(end - middle) // columns)
        items.append((start, stop - start, first_key, full, steps, len(bounds)))
        for first in range(start, stop, ROWS):
            last = min(first + ROWS, stop)
            place[first:last] = len(bounds) * ROWS + np.arange(last - first)
            tile = np.tile(np.array([[0], [EVERY_KEY]], np.int32), (1, ROWS))
            tile[:, : last - first] = seen[:, first:last]
            bounds.append(tile)
    items.sort(key=lambda item: -item[4])
    side_by_side = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= together)
    pairs = [(b, h) for b in range(batch) for h in range(heads)]
    # Each item goes to the program that has least to do.
    lists = [[] for _ in range(programs)]
    idle = [(0.0, program) for program in range(programs)]
    for first in range(0, len(pairs), side_by_side):
        for item in items:
            for pair in pairs[first : first + side_by_side]:
                work, program = heapq.heappop(idle)
                lists[program].append((*item, *pair))
                heapq.heappush(idle, (work + item[4] + _STEPS_PER_ITEM, program))
    table = np.zeros((programs, max(map(len, lists)), len(ITEM)), np.int32)
    for program, own in enumerate(lists):
        if own:
            table[program, : len(own)] = own
    return Plan(table, np.array([len(own) for own in lists], np.int32), np.stack(bounds), place)
