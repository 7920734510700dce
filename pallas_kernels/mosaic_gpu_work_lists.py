"""Work lists of the Mosaic GPU kernels: which tiles each program computes, and in what steps.

Plain Python data, without JAX. The kernels are persistent: one program per multiprocessor of the
GPU, each with a list of items, so that the copies for the next item overlap with the products of
this one. Block sizes are known at trace time, so the lists are balanced in advance.

An item is a tile of resident rows of one image and head, queries (`forward`, `backward_queries`)
or keys (`backward_keys`). The rows of the other side stream past it in steps of `columns` rows.
"""

import dataclasses
import functools
import heapq

import numpy as np

from pallas_kernels import tiles

ROWS = 64  # resident rows of a warpgroup: the rows of one wgmma instruction
WARPGROUPS = 2  # computing warpgroups: while one uses the matrix units, the other does the rest
NO_BOUND = 1 << 30  # upper bound of resident rows past the end of a tile of queries

# Columns of `WorkList.items`:
#   start, num_rows: the resident rows [start, start + num_rows);
#   tile: number of the first of its tiles of ROWS rows;
#   streamed_start: first streamed row;
#   first_step: number of its first step in `WorkList.streamed_rows` (keys only);
#   num_steps: number of steps;
#   split: the step between those that need a mask and those that do not. Masked steps come last if
#     queries are resident, first if keys are;
#   last_columns: columns of the last step if it has fewer than the others, else 0;
#   batch, head: of the arrays.
ITEM_FIELDS = (
    "start",
    "num_rows",
    "tile",
    "streamed_start",
    "first_step",
    "num_steps",
    "split",
    "last_columns",
    "batch",
    "head",
)

# The fixed cost of an item, in columns: its first and last copies do not overlap with products.
_COLUMNS_PER_ITEM = 256


@dataclasses.dataclass(frozen=True, eq=False)
class WorkList:
    """Everything that a kernel reads in addition to its operands. Row number -1 means no row."""

    items: np.ndarray  # (programs, max items of a program, 10) int32, columns as in ITEM_FIELDS
    counts: np.ndarray  # (programs,) int32: items of each program
    # (tiles, 2, ROWS) int32: the first streamed row that each resident row sees, and one past the
    # last.
    bounds: np.ndarray
    resident_rows: np.ndarray  # (tiles, ROWS) int32: row numbers
    streamed_rows: np.ndarray  # (steps, columns) int32: row numbers; keys only


@functools.lru_cache(maxsize=64)
def query_work_list(
    block_sizes, pattern, batch, heads, columns, heads_per_group, num_programs, granularity=None
) -> WorkList:
    """Makes the work list of kernels in which queries are resident and keys stream.

    Args:
      block_sizes, pattern: as in `pallas_kernels.block_attention`.
      batch, heads: B and H; each pair of them goes through the same tiles.
      columns: keys per step.
      heads_per_group: heads that go through the tiles side by side, at most, so that their keys
        stay in the L2 cache.
      num_programs: programs that run at once.
      granularity: the last step of an item has a multiple of this many columns; None: all columns.
    """
    granularity = granularity or columns
    (ranges,) = tiles.query_tiles(block_sizes, pattern, ((ROWS * WARPGROUPS, granularity),))
    resident = _ResidentTiles(tiles.query_bounds(block_sizes, pattern), NO_BOUND)
    items = []
    for start, stop, first_key, split, _, key_stop in ranges:
        num_keys = -(-(key_stop - first_key) // granularity) * granularity
        items.append(
            (
                start,
                stop - start,
                resident.add(start, stop),
                first_key,
                0,
                -(-num_keys // columns),
                (split - first_key) // columns,
                num_keys % columns,
            )
        )
    table, counts = _distribute(items, batch, heads, columns, heads_per_group, num_programs)
    return WorkList(table, counts, *resident.arrays(), np.zeros((0, columns), np.int32))


@functools.lru_cache(maxsize=64)
def key_work_list(
    block_sizes, pattern, batch, heads, columns, heads_per_group, num_programs
) -> WorkList:
    """Makes the work list of kernels in which keys are resident and queries stream.

    The last step of a segment (`tiles.independent_segments`) ends with its last row. Rows before
    the segment that its first step holds are no queries (-1 in streamed_rows): the kernel gives
    them no weight, whatever the mask.

    Args: as in `query_work_list`; columns are queries per step.
    """
    resident = _ResidentTiles(tiles.key_bounds(block_sizes, pattern), 0)
    items, streamed_rows = [], []
    for first, sizes in tiles.independent_segments(block_sizes, pattern, ROWS * WARPGROUPS):
        stop_row = first + sum(sizes)
        num_steps = -(-(stop_row - first) // columns)
        begin = stop_row - num_steps * columns
        rows = np.arange(begin, stop_row)
        first_step = sum(map(len, streamed_rows))
        streamed_rows.append(np.where(rows >= first, rows, -1).reshape(num_steps, columns))
        for start, stop, first_query, split_row, _, _ in tiles.key_tiles(
            sizes, pattern, ROWS * WARPGROUPS, columns, first
        ):
            step = (first_query - begin) // columns
            if len(sizes) == 1:
                split = 0  # every query of the segment sees every key
            elif pattern == "diagonal":
                # The steps extend to the end of the segment, where queries of other blocks are.
                split = num_steps - step
            else:
                split = (split_row - begin) // columns - step
            items.append(
                (
                    start,
                    stop - start,
                    resident.add(start, stop),
                    begin + step * columns,
                    first_step + step,
                    num_steps - step,
                    split,
                    0,
                )
            )
    table, counts = _distribute(items, batch, heads, columns, heads_per_group, num_programs)
    streamed_rows = np.concatenate(streamed_rows).astype(np.int32)
    return WorkList(table, counts, *resident.arrays(), streamed_rows)


class _ResidentTiles:
    """Collects tiles of ROWS resident rows: their bounds and row numbers."""

    def __init__(self, bounds, no_bound):
        self._bounds, self._no_bound = bounds, no_bound  # (2, L), upper bound of missing rows
        self._tile_bounds, self._tile_rows = [], []

    def add(self, start, stop):
        """Adds the tiles of the rows [start, stop); returns the number of the first tile."""
        number = len(self._tile_bounds)
        for first in range(start, stop, ROWS):
            count = min(ROWS, stop - first)
            bounds = np.tile(np.array([[0], [self._no_bound]], np.int32), (1, ROWS))
            bounds[:, :count] = self._bounds[:, first : first + count]
            self._tile_bounds.append(bounds)
            self._tile_rows.append(np.where(np.arange(ROWS) < count, first + np.arange(ROWS), -1))
        return number

    def arrays(self):
        """(bounds, resident_rows) of a WorkList."""
        return np.stack(self._tile_bounds), np.stack(self._tile_rows).astype(np.int32)


def _distribute(items, batch, heads, columns, heads_per_group, num_programs):
    """Gives each item of each image and head to the program with least work so far.

    Returns:
      items and counts of a WorkList.
    """
    num_steps, last_columns = ITEM_FIELDS.index("num_steps"), ITEM_FIELDS.index("last_columns")

    def cost(item):
        missing = columns - item[last_columns] if item[last_columns] else 0
        return item[num_steps] * columns - missing + _COLUMNS_PER_ITEM

    items = sorted(items, key=cost, reverse=True)
    group_size = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= heads_per_group)
    pairs = [(b, h) for b in range(batch) for h in range(heads)]
    lists = [[] for _ in range(num_programs)]
    queue = [(0, program) for program in range(num_programs)]  # a heap of (work, program)
    for first in range(0, len(pairs), group_size):
        for item in items:
            for pair in pairs[first : first + group_size]:
                work, program = heapq.heappop(queue)
                lists[program].append((*item, *pair))
                heapq.heappush(queue, (work + cost(item), program))
    table = np.zeros((num_programs, max(map(len, lists)), len(ITEM_FIELDS)), np.int32)
    for program, program_items in enumerate(lists):
        if program_items:
            table[program, : len(program_items)] = program_items
    return table, np.array([len(program_items) for program_items in lists], np.int32)
