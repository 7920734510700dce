"""The launches of the Triton kernels: tables of row ranges, grids and constants, as plain data.

Needs neither JAX nor Triton: the JAX calls (triton.py), the tests in Triton's interpreter and the
benchmark on PyTorch tensors all run the launches made here.
"""

import dataclasses
import math

import numpy as np

from pallas_kernels import tiles
from pallas_kernels.triton_tuning import TileConfig, TuningConfig

_TABLE_COLUMNS = 9  # as in triton_kernels.py


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything static about one call, except for the shape and dtype of its arrays."""

    block_sizes: tuple[int, ...]
    pattern: str
    scale: float
    tuning: TuningConfig


@dataclasses.dataclass(frozen=True, eq=False)
class KernelLaunch:
    """One kernel launch without its arrays. Compared by identity, since the table is an array."""

    kernel: str  # name in triton_kernels.py
    table: np.ndarray  # (tiles, 9) int32, described in triton_kernels.py
    grid: int  # number of programs
    num_warps: int
    num_stages: int
    scalars: tuple[int, ...]  # L, tiles, heads per group and, for some kernels, number of chunks
    constants: dict  # constexpr arguments by name


def forward_launches(problem: Problem, shape, dtype: str) -> list[KernelLaunch]:
    """Makes the launches of the `forward` kernel, which together write all of out and lse.

    Args:
      problem: what is static about the call.
      shape: (B, L, H, D), the shape of q.
      dtype: name of the dtype of q.
    """
    configs = problem.tuning.forward
    tile_shapes = tuple((config.rows, config.columns) for config in configs)
    constants = _constants(problem, shape, dtype, "LOG2_SCALE", "PRECISION")
    return [
        _launch("forward", rows, shape, problem, config, {**constants, "MASKED": _any_masked(rows)})
        for rows, config in zip(
            tiles.query_tiles(problem.block_sizes, problem.pattern, tile_shapes),
            configs,
            strict=True,
        )
        if rows
    ]


def _any_masked(rows):
    """Whether some tile of `tiles.query_tiles` has keys that need a mask."""
    return any(row.split < row.mask_stop for row in rows)


def backward_launches(problem: Problem, shape, dtype: str) -> list[KernelLaunch]:
    """Makes the launches that together write all of d_q, d_k and d_v.

    `backward_whole` writes all three of short segments. If there are longer ones, `prepare`
    (float16 only), `backward_queries` and `backward_keys` follow.

    Args:
      problem: what is static about the call.
      shape: (B, L, H, D), the shape of q.
      dtype: name of the dtype of q.
    """
    tuning = problem.tuning
    keys, queries = tuning.backward_keys, tuning.backward_queries
    whole_configs = tuning.backward_whole if problem.pattern == "diagonal" else ()
    whole_rows = [[] for _ in whole_configs]
    whole_masked = [False] * len(whole_configs)
    query_rows, key_rows = [], []
    for start, block_sizes in tiles.independent_segments(
        problem.block_sizes, problem.pattern, tuning.backward_whole[0].rows
    ):
        length = sum(block_sizes)
        index = next((i for i, config in enumerate(whole_configs) if length <= config.rows), None)
        if index is not None:
            whole_rows[index].append((start, start + length))
            whole_masked[index] |= len(block_sizes) > 1
            continue
        (rows,) = tiles.query_tiles(
            block_sizes, problem.pattern, ((queries.rows, queries.columns),), start
        )
        # A chunk is the resident rows of one program of `backward_queries`. The programs of this
        # segment read the chunks [first, stop).
        first = len(query_rows)
        chunks = (first, first + len(rows))
        query_rows += [(*row, *chunks, first + chunk) for chunk, row in enumerate(rows)]
        rows = tiles.key_tiles(block_sizes, problem.pattern, keys.rows, keys.columns, start)
        key_rows += [(*row, *chunks) for row in rows]

    constants = _constants(problem, shape, dtype, "SCALE", "LOG2_SCALE", "PRECISION", "RESCALED")
    launches = [
        _launch(
            "backward_whole",
            rows,
            shape,
            problem,
            config,
            {**constants, "MASKED": masked, "LOAD_COPIES": config.load_copies},
        )
        for rows, config, masked in zip(whole_rows, whole_configs, whole_masked, strict=True)
        if rows
    ]
    if query_rows:
        num_chunks = len(query_rows)
        if constants["RESCALED"]:
            config = TileConfig(queries.rows, 0, 4, 1)
            rows = [row[:2] for row in query_rows]
            launches.append(
                _launch("prepare", rows, shape, problem, config, _constants(problem, shape, dtype))
            )
        # At least 256, far more than short lists have: so they all share their compiled code.
        constants["BLOCK_CHUNKS"] = max(256, _next_power_of_two(num_chunks))
        launches.append(
            _launch("backward_queries", query_rows, shape, problem, queries, constants, num_chunks)
        )
        constants["LOAD_COPIES"] = keys.load_copies
        launches.append(
            _launch("backward_keys", key_rows, shape, problem, keys, constants, num_chunks)
        )
    return launches


def _constants(problem, shape, dtype, *names):
    """The constexpr arguments that every kernel has, and those of the given names."""
    _, _, heads, dim = shape
    values = {
        "SCALE": problem.scale,
        "LOG2_SCALE": problem.scale * math.log2(math.e),
        # By default, Triton rounds float32 operands to TF32.
        "PRECISION": "ieee" if dtype == "float32" else "tf32",
        # Whether d_scores need a scale to stay in the range of the dtype.
        "RESCALED": dtype == "float16",
    }
    # The matrix units need at least 16 columns.
    always = {"H": heads, "D": dim, "BLOCK_D": max(16, _next_power_of_two(dim))}
    return {**always, **{name: values[name] for name in names}}


def _launch(kernel, rows, shape, problem, config, constants, *more_scalars):
    """A launch over a table of these rows, most work first so that the last programs are short."""
    batch, length, heads, _ = shape
    table = np.zeros((len(rows), _TABLE_COLUMNS), np.int32)
    if kernel != "prepare":  # the number of a chunk is its place in the table
        rows = sorted(rows, key=lambda row: -_work(row))
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    if kernel == "forward":
        most = problem.tuning.forward_heads_per_group
    else:
        most = problem.tuning.backward_heads_per_group
    heads_per_group = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most)
    constants = {**constants, "BLOCK_RESIDENT": config.rows}
    if config.columns:
        constants["BLOCK_STREAMED"] = config.columns
    return KernelLaunch(
        kernel=kernel,
        table=table,
        grid=len(rows) * batch * heads,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        scalars=(length, len(rows), heads_per_group, *more_scalars),
        constants=constants,
    )


def _work(row):
    """The number of rows that a tile streams or, if it streams none, of its own."""
    return row[5] - row[2] if len(row) > 5 else row[1] - row[0]


def _next_power_of_two(n):
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()
