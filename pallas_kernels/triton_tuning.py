"""Tile sizes of the Triton kernels: the ones measured for a GPU and a shape, and defaults.

Plain Python data. `benchmarks/tune_attention.py` prints entries of `TUNED`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Tile sizes of one kernel. Resident and streamed rows are those of `tiles.TileRange`."""

    rows: int  # resident rows of a program
    columns: int  # streamed rows at a time
    num_warps: int  # warps of a program
    num_stages: int  # depth of the software pipeline over the streamed rows
    # Threads that load the same per-query value, if queries are streamed (backward_whole and
    # backward_keys); see `_load_columns` in triton_kernels.py.
    load_copies: int = 1


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """Tile sizes of all kernels of one call, by the names of the kernels.

    Of several `backward_whole` configs, a segment takes the first whose rows hold all of it.
    """

    forward: tuple[TileConfig, ...]  # tiles of each kind are chosen by `tiles.query_tiles`
    backward_whole: tuple[TileConfig, ...]  # diagonal pattern only
    backward_keys: TileConfig  # d_k and d_v of the segments that are too long for backward_whole
    backward_queries: TileConfig  # d_q of the same segments
    # Programs of this many heads run side by side through the list of tiles, at most.
    forward_heads_per_group: int
    backward_heads_per_group: int


# Under 100 KB of shared memory, which every GPU since Ampere has.
_DEFAULT = TuningConfig(
    forward=(TileConfig(64, 64, 4, 2), TileConfig(128, 64, 8, 2)),
    backward_whole=(
        TileConfig(64, 64, 4, 1, load_copies=2),
        TileConfig(128, 32, 8, 2, load_copies=8),
    ),
    backward_keys=TileConfig(128, 32, 8, 2, load_copies=8),
    backward_queries=TileConfig(64, 64, 4, 2),
    forward_heads_per_group=4,
    backward_heads_per_group=4,
)
_LARGE_HEAD_DIM = TuningConfig(  # head dims over 64
    forward=(TileConfig(64, 64, 4, 2),),
    backward_whole=(TileConfig(64, 32, 4, 1, load_copies=4),),
    backward_keys=TileConfig(64, 32, 4, 2, load_copies=4),
    backward_queries=TileConfig(64, 32, 4, 2),
    forward_heads_per_group=4,
    backward_heads_per_group=4,
)
# float32 products do not use the matrix units: small tiles keep the unrolled code short.
_FLOAT32 = TuningConfig(
    forward=(TileConfig(32, 32, 4, 1),),
    backward_whole=(TileConfig(32, 32, 4, 1),),
    backward_keys=TileConfig(32, 32, 4, 1),
    backward_queries=TileConfig(32, 32, 4, 1),
    forward_heads_per_group=4,
    backward_heads_per_group=4,
)

# Measured by `benchmarks/tune_attention.py`. Keys: GPU (`platform.gpu_name`), L, D, "half" (float16
# and bfloat16) or "float32", pattern.
TUNED = {
    ("H100", 680, 64, "half", "diagonal"): TuningConfig(
        forward=(TileConfig(64, 32, 4, 3),),
        backward_whole=(TileConfig(64, 64, 4, 1, load_copies=2),),
        backward_keys=TileConfig(64, 32, 4, 3, load_copies=4),
        backward_queries=TileConfig(64, 32, 4, 4),
        forward_heads_per_group=16,
        backward_heads_per_group=8,
    ),
    ("H100", 680, 64, "half", "causal"): TuningConfig(
        forward=(TileConfig(64, 64, 4, 3),),
        backward_whole=(TileConfig(64, 64, 4, 1, load_copies=2),),
        backward_keys=TileConfig(64, 64, 4, 3, load_copies=2),
        backward_queries=TileConfig(64, 32, 4, 3),
        forward_heads_per_group=16,
        backward_heads_per_group=1,
    ),
    ("H100", 2240, 64, "half", "diagonal"): TuningConfig(
        forward=(TileConfig(64, 64, 4, 3),),
        backward_whole=(TileConfig(64, 64, 4, 1, load_copies=2),),
        backward_keys=TileConfig(64, 64, 4, 3, load_copies=2),
        backward_queries=TileConfig(64, 32, 4, 3),
        forward_heads_per_group=4,
        backward_heads_per_group=4,
    ),
    ("H100", 2240, 64, "half", "causal"): TuningConfig(
        forward=(TileConfig(64, 64, 4, 3),),
        backward_whole=(TileConfig(64, 64, 4, 1, load_copies=2),),
        backward_keys=TileConfig(64, 64, 4, 3, load_copies=2),
        backward_queries=TileConfig(64, 32, 4, 4),
        forward_heads_per_group=4,
        backward_heads_per_group=1,
    ),
    ("H100", 9451, 64, "half", "diagonal"): TuningConfig(
        forward=(TileConfig(64, 64, 4, 2), TileConfig(128, 64, 8, 3)),
        backward_whole=(TileConfig(64, 64, 4, 1, load_copies=2),),
        backward_keys=TileConfig(128, 64, 8, 3, load_copies=4),
        backward_queries=TileConfig(64, 64, 4, 4),
        forward_heads_per_group=8,
        backward_heads_per_group=4,
    ),
    ("H100", 9451, 64, "half", "causal"): TuningConfig(
        forward=(TileConfig(64, 64, 4, 2), TileConfig(128, 64, 8, 3)),
        backward_whole=(TileConfig(64, 64, 4, 1, load_copies=2),),
        backward_keys=TileConfig(128, 64, 8, 3, load_copies=4),
        backward_queries=TileConfig(64, 64, 4, 3),
        forward_heads_per_group=8,
        backward_heads_per_group=16,
    ),
}


def tuning_for(gpu: str, length: int, dim: int, dtype: str, pattern: str) -> TuningConfig:
    """Returns the tile sizes measured for a case, or ones that work everywhere.

    Args:
      gpu: short name of the GPU, by `platform.gpu_name`.
      length: L, the number of tokens.
      dim: D, the head dim.
      dtype: name of the dtype.
      pattern: "diagonal" or "causal".
    """
    kind = "float32" if dtype == "float32" else "half"
    default = _FLOAT32 if kind == "float32" else _LARGE_HEAD_DIM if dim > 64 else _DEFAULT
    return TUNED.get((gpu, length, dim, kind, pattern), default)
