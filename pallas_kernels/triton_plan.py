"""What the Triton kernels are launched with: tile sizes, tables of row ranges and grids, as plain Python data.

Needs neither JAX nor Triton: the JAX calls (triton.py), the tests in Triton's interpreter and the benchmark on PyTorch
tensors all run the launches made here.
"""

import dataclasses
import math
import re

import numpy as np

from pallas_kernels import tiles

_TABLE_COLUMNS = 9  # as in triton_kernels.py


@dataclasses.dataclass(frozen=True)
class Tile:
    """How one kernel cuts its work."""

    rows: int  # own rows of a program: queries (forward, queries) or keys (whole, keys)
    columns: int  # rows of the other side that it takes at a time
    warps: int  # warps of a program
    stages: int  # loads in flight: depth of the software pipeline over the other side
    spread: int = (
        1  # whole, keys: threads that load each number kept for a query; see `_load_columns`
    )


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Tile sizes of one call. Where there are several, a group of blocks takes the first whose rows hold it all."""

    forward: tuple[Tile, ...]  # longer groups than the last tile has rows are cut
    whole: tuple[
        Tile, ...
    ]  # backward in one pass, diagonal pattern only; longer groups take keys and queries
    keys: Tile  # dk and dv of all other groups
    queries: Tile  # dq of all other groups
    forward_together: int  # heads that go through the list of tiles side by side, at most
    backward_together: int


# Under 100 KB of shared memory, for any GPU since Ampere.
_DEFAULT = Tuning(
    forward=(Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
    whole=(Tile(64, 64, 4, 1, spread=2), Tile(128, 32, 8, 2, spread=8)),
    keys=Tile(128, 32, 8, 2, spread=8),
    queries=Tile(64, 64, 4, 2),
    forward_together=4,
    backward_together=4,
)
_WIDE_HEADS = Tuning(  # more than 64 columns
    forward=(Tile(64, 64, 4, 2),),
    whole=(Tile(64, 32, 4, 1, spread=4),),
    keys=Tile(64, 32, 4, 2, spread=4),
    queries=Tile(64, 32, 4, 2),
    forward_together=4,
    backward_together=4,
)
# float32 products are done without matrix units: small tiles keep the unrolled code short.
_FLOAT32 = Tuning(
    forward=(Tile(32, 32, 4, 1),),
    whole=(Tile(32, 32, 4, 1),),
    keys=Tile(32, 32, 4, 1),
    queries=Tile(32, 32, 4, 1),
    forward_together=4,
    backward_together=4,
)

# (GPU, L, D, "half" or "float32", pattern): made by `benchmarks/tune_attention.py`. GPU as `gpu_name` spells it.
TUNED = {
    ("H100", 680, 64, "half", "diagonal"): Tuning(
        forward=(Tile(64, 32, 4, 3),),
        whole=(Tile(64, 64, 4, 1, spread=2),),
        keys=Tile(64, 32, 4, 3, spread=4),
        queries=Tile(64, 32, 4, 4),
        forward_together=16,
        backward_together=8,
    ),
    ("H100", 680, 64, "half", "causal"): Tuning(
        forward=(Tile(64, 64, 4, 3),),
        whole=(Tile(64, 64, 4, 1, spread=2),),
        keys=Tile(64, 64, 4, 3, spread=2),
        queries=Tile(64, 32, 4, 3),
        forward_together=16,
        backward_together=1,
    ),
    ("H100", 2240, 64, "half", "diagonal"): Tuning(
        forward=(Tile(64, 64, 4, 3),),
        whole=(Tile(64, 64, 4, 1, spread=2),),
        keys=Tile(64, 64, 4, 3, spread=2),
        queries=Tile(64, 32, 4, 3),
        forward_together=4,
        backward_together=4,
    ),
    ("H100", 2240, 64, "half", "causal"): Tuning(
        forward=(Tile(64, 64, 4, 3),),
        whole=(Tile(64, 64, 4, 1, spread=2),),
        keys=Tile(64, 64, 4, 3, spread=2),
        queries=Tile(64, 32, 4, 4),
        forward_together=4,
        backward_together=1,
    ),
    ("H100", 9451, 64, "half", "diagonal"): Tuning(
        forward=(
            Tile(64, 64, 4, 2),
            Tile(128, 64, 8, 3),
        ),
        whole=(Tile(64, 64, 4, 1, spread=2),),
        keys=Tile(128, 64, 8, 3, spread=4),
        queries=Tile(64, 64, 4, 4),
        forward_together=8,
        backward_together=4,
    ),
    ("H100", 9451, 64, "half", "causal"): Tuning(
        forward=(
            Tile(64, 64, 4, 2),
            Tile(128, 64, 8, 3),
        ),
        whole=(Tile(64, 64, 4, 1, spread=2),),
        keys=Tile(128, 64, 8, 3, spread=4),
        queries=Tile(64, 64, 4, 3),
        forward_together=8,
        backward_together=16,
    ),
}


# GPUs with the multiprocessors of another and faster or slower memory: its choices are taken, though not measured there.
_SAME_CHIP = {"H200": "H100", "GH200": "H100", "H800": "H100"}


def gpu_name(device_kind):
    """Short name of a GPU for the tables: "NVIDIA H100 80GB HBM3" is "H100", and so is an H200."""
    found = re.search(r"\bG?[ABHLV]\d\w*", device_kind)
    name = found.group() if found else device_kind
    return _SAME_CHIP.get(name, name)


def tuning_for(gpu, length, dim, dtype, pattern):
    """The tile sizes measured for this case, or ones that work everywhere."""
    kind = "float32" if dtype == "float32" else "half"
    default = _FLOAT32 if kind == "float32" else _WIDE_HEADS if dim > 64 else _DEFAULT
    return TUNED.get((gpu, length, dim, kind, pattern), default)


@dataclasses.dataclass(frozen=True, eq=False)
class Launch:
    """One kernel launch, but for its arrays. Compared by identity: the table is an array."""

    kernel: str  # name in triton_kernels.py
    table: np.ndarray  # (tiles, 9) int32, read by the kernel
    grid: int  # programs
    warps: int
    stages: int
    counts: tuple[
        int, ...
    ]  # its int arguments: L, rows of the table, heads together and, for some, pieces
    constants: dict  # its constexpr arguments


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that is static about one call."""

    block_sizes: tuple[int, ...]
    pattern: str
    scale: float
    tuning: Tuning


def forward_launches(problem: Problem, shape, dtype) -> list[Launch]:
    """Launches of the `forward` kernel, which together write all of out and lse; shape is that of q."""
    options = problem.tuning.forward
    shapes = tuple((tile.rows, tile.columns) for tile in options)
    constants = _constants(problem, shape, dtype, "LOG2_SCALE", "PRECISION")
    return [
        _launch("forward", rows, shape, problem, tile, {**constants, "MASKED": _any_masked(rows)})
        for rows, tile in zip(
            tiles.query_tiles(problem.block_sizes, problem.pattern, shapes), options, strict=True
        )
        if rows
    ]


def _any_masked(rows):
    """Whether some tile of `tiles.query_tiles` needs a mask: from its middle to its edge."""
    return any(middle < edge for _, _, _, middle, edge, _ in rows)


def backward_launches(problem: Problem, shape, dtype) -> list[Launch]:
    """Launches that together write all of dq, dk and dv.

    First `backward_whole`s, which write all three of short groups; then, if there are longer ones, `prepare` (float16
    only), `backward_queries` and `backward_keys`.
    """
    whole, keys, queries = problem.tuning.whole, problem.tuning.keys, problem.tuning.queries
    diagonal = problem.pattern == "diagonal"
    short = whole if diagonal else ()
    classes = [[] for _ in short]
    masked = [False] * len(short)
    query_rows, key_rows = [], []
    for start, block_sizes in tiles.independent_parts(
        problem.block_sizes, problem.pattern, whole[0].rows
    ):
        length = sum(block_sizes)
        index = next((index for index, tile in enumerate(short) if length <= tile.rows), None)
        if index is not None:
            classes[index].append((start, start + length))
            masked[index] |= len(block_sizes) > 1
            continue
        (rows,) = tiles.query_tiles(
            block_sizes, problem.pattern, ((queries.rows, queries.columns),), start
        )
        # A piece is the own rows of a program of `backward_queries`; these are the ones that the part's programs read.
        first = len(query_rows)
        pieces = (first, first + len(rows))
        query_rows += [(*row, *pieces, first + piece) for piece, row in enumerate(rows)]
        rows = tiles.key_tiles(block_sizes, problem.pattern, keys.rows, keys.columns, start)
        key_rows += [(*row, *pieces) for row in rows]

    constants = _constants(problem, shape, dtype, "SCALE", "LOG2_SCALE", "PRECISION", "RANGED")
    launches = [
        _launch(
            "backward_whole",
            rows,
            shape,
            problem,
            tile,
            {**constants, "MASKED": mask, "SPREAD": tile.spread},
        )
        for rows, tile, mask in zip(classes, short, masked, strict=True)
        if rows
    ]
    if query_rows:
        pieces = len(query_rows)
        if constants["RANGED"]:
            piece = Tile(queries.rows, 0, 4, 1)
            rows = [row[:2] for row in query_rows]
            launches.append(
                _launch("prepare", rows, shape, problem, piece, _constants(problem, shape, dtype))
            )
        # Far more than short lists have, so that lists do not differ in compiled code.
        constants["BLOCK_PIECES"] = max(256, _power_of_two(pieces))
        launches.append(
            _launch("backward_queries", query_rows, shape, problem, queries, constants, pieces)
        )
        constants["SPREAD"] = keys.spread
        launches.append(_launch("backward_keys", key_rows, shape, problem, keys, constants, pieces))
    return launches


def _constants(problem, shape, dtype, *names):
    """The constexpr arguments that every kernel has, and those of the names given."""
    _, _, heads, dim = shape
    values = {
        "SCALE": problem.scale,
        "LOG2_SCALE": problem.scale * math.log2(math.e),
        # Without it, Triton rounds float32 operands to TF32.
        "PRECISION": "ieee" if dtype == "float32" else "tf32",
        # Whether d_scores would leave the range of the dtype.
        "RANGED": dtype == "float16",
    }
    # The matrix units take at least 16 columns.
    always = {"H": heads, "D": dim, "BLOCK_D": max(16, _power_of_two(dim))}
    return {**always, **{name: values[name] for name in names}}


def _launch(kernel, rows, shape, problem, tile, constants, *more_counts):
    """A launch over the table of these rows, most work first so that the last programs to run are short."""
    batch, length, heads, _ = shape
    table = np.zeros((len(rows), _TABLE_COLUMNS), np.int32)
    if kernel != "prepare":  # its pieces are known by their place
        rows = sorted(rows, key=_work)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    tuning = problem.tuning
    most = tuning.forward_together if kernel == "forward" else tuning.backward_together
    together = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most)
    constants = {**constants, "BLOCK_OWN": tile.rows}
    if tile.columns:
        constants["BLOCK_OTHER"] = tile.columns
    counts = (length, len(rows), together, *more_counts)
    return Launch(
        kernel, table, len(rows) * batch * heads, tile.warps, tile.stages, counts, constants
    )


def _work(row):
    """Sorts the rows of a table; rows without another side by their own length."""
    return -(row[5] - row[2]) if len(row) > 5 else -(row[1] - row[0])


def _power_of_two(n):
    """The least power of two that is not under n."""
    return 1 << (n - 1).bit_length()
