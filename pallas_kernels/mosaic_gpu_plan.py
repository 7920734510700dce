"""The work of the Mosaic GPU kernels as plain Python data: which tiles each program computes, and in what steps.

Needs no JAX. The kernels are persistent: as many programs as the GPU has multiprocessors, each with a list of items, so
that the copies for the next item run beside the products of this one. Block sizes are known when a program is traced,
so the lists are balanced beforehand.

An item is a tile of own rows, of one picture and head: queries (forward, queries) or keys (keys). The rows of the other
side pass by in steps of `columns` rows.
"""

import dataclasses
import functools
import heapq

import numpy as np

from pallas_kernels import tiles

ROWS = 64  # own rows of a warpgroup: rows of one wgmma
WARPGROUPS = 2  # that compute: while one has the matrix units, the other does all else
NO_BOUND = 1 << 30  # the upper bound of rows that are no query

# Of an item, in table columns: its own rows from `start` on, `rows` of them, the first of its tiles of ROWS, the first
# row of the other side, the first step's number among all steps, how many there are, the step that parts those that
# need a mask from those that need none (masked ones come last for queries, first for keys), and the columns of the last
# step, if it has fewer than the others, otherwise 0.
ITEM = ("start", "rows", "tile", "other", "other_tile", "steps", "split", "last", "batch", "head")

# What an item costs beside its steps, in columns: its ends are not overlapped.
_COLUMNS_PER_ITEM = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """All that a kernel reads beside its operands."""

    items: np.ndarray  # (programs, most items of one, 10) int32, columns as in ITEM
    counts: np.ndarray  # (programs,) int32: items of each
    bounds: (
        np.ndarray
    )  # (tiles, 2, ROWS) int32: the first other row that each own row meets, and one past the last
    own_rows: np.ndarray  # (tiles, ROWS) int32: which row each is, -1 for none
    other_rows: np.ndarray  # (steps, columns) int32: which row each is, -1 for none; keys only


@functools.lru_cache(maxsize=64)
def query_plan(block_sizes, pattern, batch, heads, columns, together, programs, grain=None) -> Plan:
    """Items of queries, which keys pass by.

    Args:
      block_sizes, pattern: as in `pallas_kernels.block_attention`.
      batch, heads: every pair of them goes through the same tiles.
      columns: keys of a step.
      together: heads that go through the tiles side by side, at most, so that their keys stay in the L2 cache.
      programs: how many run at once.
      grain: the last step of an item has a multiple of so many columns; None: all of them.
    """
    grain = grain or columns
    (found,) = tiles.query_tiles(block_sizes, pattern, ((ROWS * WARPGROUPS, grain),))
    own = _Own(tiles.query_bounds(block_sizes, pattern), NO_BOUND)
    items = []
    for start, stop, first_key, middle, _, end in found:
        keys = -(-(end - first_key) // grain) * grain
        full = (middle - first_key) // columns
        items.append(
            (
                start,
                stop - start,
                own.add(start, stop),
                first_key,
                0,
                -(-keys // columns),
                full,
                keys % columns,
            )
        )
    table, counts = _share(items, batch, heads, columns, together, programs)
    return Plan(table, counts, *own.arrays(), np.zeros((0, columns), np.int32))


@functools.lru_cache(maxsize=64)
def key_plan(block_sizes, pattern, batch, heads, columns, together, programs) -> Plan:
    """Items of keys, which queries pass by. Arguments as in `query_plan`; columns: queries of a step.

    The steps of a part of the sequence that sees only itself end with its last row. What they hold beside its rows is
    no query (-1 in other_rows), and has no weight whatever the mask.
    """
    own = _Own(tiles.key_bounds(block_sizes, pattern), 0)
    items, other_rows = [], []
    for first, sizes in tiles.independent_parts(block_sizes, pattern, ROWS * WARPGROUPS):
        end = first + sum(sizes)
        steps = -(-(end - first) // columns)
        begin = end - steps * columns
        rows = np.arange(begin, end)
        other_rows.append(np.where(rows >= first, rows, -1).reshape(steps, columns))
        tile = sum(map(len, other_rows[:-1]))
        for start, stop, first_query, middle, _, _ in tiles.key_tiles(
            sizes, pattern, ROWS * WARPGROUPS, columns, first
        ):
            step = (first_query - begin) // columns
            if len(sizes) == 1:
                split = 0  # every query of the part sees every key
            elif pattern == "diagonal":
                split = (
                    steps - step
                )  # the steps go on to the end of the part, which no query of another block may see
            else:
                split = (middle - begin) // columns - step
            items.append(
                (
                    start,
                    stop - start,
                    own.add(start, stop),
                    begin + step * columns,
                    tile + step,
                    steps - step,
                    split,
                    0,
                )
            )
    table, counts = _share(items, batch, heads, columns, together, programs)
    return Plan(table, counts, *own.arrays(), np.concatenate(other_rows).astype(np.int32))


class _Own:
    """Tiles of own rows, one after the other."""

    def __init__(self, bounds, no_bound):
        self._bounds, self._no_bound = bounds, no_bound
        self._tiles, self._rows = [], []

    def add(self, start, stop):
        """Adds the tiles of the rows [start, stop); returns the number of the first."""
        number = len(self._tiles)
        for first in range(start, stop, ROWS):
            count = min(ROWS, stop - first)
            bounds = np.tile(np.array([[0], [self._no_bound]], np.int32), (1, ROWS))
            bounds[:, :count] = self._bounds[:, first : first + count]
            self._tiles.append(bounds)
            self._rows.append(np.where(np.arange(ROWS) < count, first + np.arange(ROWS), -1))
        return number

    def arrays(self):
        return np.stack(self._tiles), np.stack(self._rows).astype(np.int32)


def _share(items, batch, heads, columns, together, programs):
    """(items, counts) of a Plan: every item of every picture and head, given to the program that has least to do."""
    steps, last = ITEM.index("steps"), ITEM.index("last")

    def cost(item):
        return (
            item[steps] * columns - (columns - item[last] if item[last] else 0) + _COLUMNS_PER_ITEM
        )

    items = sorted(items, key=cost, reverse=True)
    side_by_side = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= together)
    pairs = [(b, h) for b in range(batch) for h in range(heads)]
    lists = [[] for _ in range(programs)]
    idle = [(0, program) for program in range(programs)]
    for first in range(0, len(pairs), side_by_side):
        for item in items:
            for pair in pairs[first : first + side_by_side]:
                work, program = heapq.heappop(idle)
                lists[program].append((*item, *pair))
                heapq.heappush(idle, (work + cost(item), program))
    table = np.zeros((programs, max(map(len, lists)), len(ITEM)), np.int32)
    for program, own in enumerate(lists):
        if own:
            table[program, : len(own)] = own
    return table, np.array([len(own) for own in lists], np.int32)
