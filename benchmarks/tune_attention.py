"""Finds the tile sizes of the GPU kernels, for the cases of benchmarks/attention.py.

    python benchmarks/tune_attention.py [--cases=TEXT] [--kernels=triton,mosaic_gpu]

Prints entries for triton_tuning.TUNED and mosaic_gpu.TUNED, and all times behind the choice. The
Triton kernels are timed on PyTorch tensors, the Mosaic GPU kernels as jitted calls that are queued
one after the other.
"""

import argparse
import concurrent.futures
import dataclasses
import statistics
import time

import attention as benchmark
import jax
from attention import (
    CASES,
    DIM,
    SCALE,
    capture_graph,
    mosaic_config,
    require_triton,
    torch_inputs,
    torch_median,
)

from pallas_kernels import mosaic_gpu, triton_launches
from pallas_kernels.mosaic_gpu import PipelineConfig
from pallas_kernels.platform import gpu_name
from pallas_kernels.triton_tuning import TileConfig, TuningConfig

# Tile sizes that ptxas compiles for an H100 without register spills, for D = 64.
_SHORT = TileConfig(64, 64, 4, 1, load_copies=2)
FORWARD = (
    (TileConfig(64, 64, 4, 3),),
    (TileConfig(64, 64, 4, 2),),
    (TileConfig(64, 64, 4, 4),),
    (TileConfig(64, 32, 4, 3),),
    (TileConfig(64, 64, 4, 2), TileConfig(128, 64, 4, 3)),
    (TileConfig(64, 64, 4, 2), TileConfig(128, 64, 8, 3)),
    (TileConfig(64, 64, 4, 2), TileConfig(128, 64, 8, 4)),
    (TileConfig(64, 64, 4, 2), TileConfig(128, 32, 8, 4)),
    (TileConfig(64, 64, 4, 2), TileConfig(128, 128, 8, 3)),
)
BACKWARD_WHOLE = (
    (_SHORT,),
    (_SHORT, TileConfig(128, 32, 8, 2, load_copies=8)),
    (_SHORT, TileConfig(128, 128, 8, 1, load_copies=2)),
    (TileConfig(64, 32, 4, 2, load_copies=4),),
)
BACKWARD_KEYS = (
    TileConfig(64, 64, 4, 3, load_copies=2),
    TileConfig(64, 64, 4, 2, load_copies=2),
    TileConfig(64, 32, 4, 3, load_copies=4),
    TileConfig(64, 32, 4, 4, load_copies=4),
    TileConfig(128, 32, 8, 3, load_copies=8),
    TileConfig(128, 64, 8, 2, load_copies=4),
    TileConfig(128, 64, 8, 3, load_copies=4),
)
BACKWARD_QUERIES = (
    TileConfig(64, 64, 4, 3),
    TileConfig(64, 64, 4, 4),
    TileConfig(64, 32, 4, 3),
    TileConfig(64, 32, 4, 4),
    TileConfig(128, 32, 8, 3),
    TileConfig(128, 64, 8, 3),
)
HEADS_PER_GROUP = (1, 2, 4, 8, 16)


def tune_triton(case, dtype):
    """Finds the fastest tile sizes of the Triton kernels, one field after the other.

    Returns:
      The TuningConfig, and {field: [(milliseconds, candidate)]}.
    """
    from torch_launch import TorchAttention
    from triton.runtime.errors import OutOfResources

    q, k, v, d_out = torch_inputs(case, dtype)
    best = TuningConfig(
        forward=FORWARD[0],
        backward_whole=BACKWARD_WHOLE[0],
        backward_keys=BACKWARD_KEYS[0],
        backward_queries=BACKWARD_QUERIES[0],
        forward_heads_per_group=4,
        backward_heads_per_group=4,
    )
    times = {}

    def milliseconds(tuning, backward):
        problem = triton_launches.Problem(case.sizes, case.pattern, SCALE, tuning)
        attention = TorchAttention(problem, q)

        def run():
            return attention.backward(q, k, v, d_out) if backward else attention.forward(q, k, v)

        try:
            attention.forward(q, k, v)
            return torch_median(capture_graph(run), repeat_ms=40)
        except (OutOfResources, RuntimeError) as error:
            # The candidates are made for another GPU or version of Triton.
            print(f"{case}: {tuning}: {error}", flush=True)
            return float("inf")

    fields = [
        ("forward", FORWARD, False),
        ("backward_keys", BACKWARD_KEYS, True),
        ("backward_queries", BACKWARD_QUERIES, True),
    ]
    if case.pattern == "diagonal":
        # Last, so that the other two are chosen where they do most of the work.
        fields.append(("backward_whole", BACKWARD_WHOLE, True))
    fields += [
        ("forward_heads_per_group", HEADS_PER_GROUP, False),
        ("backward_heads_per_group", HEADS_PER_GROUP, True),
    ]
    for field, candidates, backward in fields:
        times[field] = []
        for candidate in candidates:
            tuning = dataclasses.replace(best, **{field: candidate})
            times[field].append((milliseconds(tuning, backward), candidate))
        best = dataclasses.replace(best, **{field: fastest(times[field])})
    return best, times


def fastest(results):
    """The candidate with the least time of [(milliseconds, candidate)]."""
    return min(results, key=lambda result: result[0])[1]


# Pipelines of the Mosaic GPU kernels that fit in shared memory.
MOSAIC = dict(
    forward=(
        PipelineConfig(128, 4, 64),
        PipelineConfig(128, 4),
        PipelineConfig(256, 2),
        PipelineConfig(256, 2, 128),
    ),
    backward_queries=(PipelineConfig(128, 2), PipelineConfig(128, 3), PipelineConfig(64, 4)),
    backward_keys=(PipelineConfig(128, 2), PipelineConfig(128, 3), PipelineConfig(64, 3)),
)


def tune_mosaic(case, dtype):
    """As `tune_triton`, for the Mosaic GPU kernels."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_out = (jax.random.normal(key, case.shape, dtype) for key in keys)
    best = mosaic_gpu.TuningConfig()
    times = {}

    def compiled(tuning, backward):
        """(function, arrays), or the exception that prevented it."""
        config = mosaic_config(case, tuning)
        try:
            arrays = q, k, v
            function = jax.jit(mosaic_gpu.run_forward(config)).lower(*arrays).compile()
            if backward:
                out, lse = function(*arrays)
                arrays = q, k, v, out, lse, d_out
                function = jax.jit(mosaic_gpu.run_backward(config)).lower(*arrays).compile()
            jax.block_until_ready(function(*arrays))
            return function, arrays
        except Exception as error:  # too much memory for this GPU, or rejected by its compiler
            return error

    for field, candidates in MOSAIC.items():
        tunings = [dataclasses.replace(best, **{field: candidate}) for candidate in candidates]
        backward = [field != "forward"] * len(tunings)
        # Compiled in parallel, then timed one after the other.
        with concurrent.futures.ThreadPoolExecutor(len(tunings)) as threads:
            results = list(threads.map(compiled, tunings, backward))
        runnable = {}
        for candidate, result in zip(candidates, results, strict=True):
            if isinstance(result, Exception):
                print(f"{case}: {field} {candidate}: {str(result)[:200]}", flush=True)
            else:
                runnable[candidate] = result
        if not runnable:
            raise SystemExit(f"{case}: no candidate for {field} runs here")
        times[field] = list(zip(queued_medians(runnable.values()), runnable, strict=True))
        best = dataclasses.replace(best, **{field: fastest(times[field])})
    return best, times


def queued_medians(calls, few=2, many=12, repeats=15):
    """Milliseconds of one more call of each function, among calls queued without waiting.

    The functions alternate, because a GPU slows down as it warms up.

    Args:
      calls: (function, arrays) each.
      few, many: the two numbers of calls whose times are compared.
      repeats: timed runs of each.
    """
    seconds = [{few: [], many: []} for _ in calls]
    for _ in range(repeats):
        for (function, arrays), times in zip(calls, seconds, strict=True):
            for count in (few, many):
                start = time.perf_counter()
                for _ in range(count):
                    result = function(*arrays)
                jax.block_until_ready(result)
                times[count].append(time.perf_counter() - start)
    return [
        1e3 * (statistics.median(x[many]) - statistics.median(x[few])) / (many - few)
        for x in seconds
    ]


def print_tuning(case, tuning, times, kernels):
    """Prints an entry of TUNED as source, and the times of all candidates as comments."""
    gpu = gpu_name(jax.devices()[0].device_kind)
    dtype = '"half", ' if kernels == "triton" else ""
    key = f'("{gpu}", {case.length}, {DIM}, {dtype}"{case.pattern}")'
    print(f"    {key}: TuningConfig(  # {kernels}")
    for field in dataclasses.fields(tuning):
        print(f"        {field.name}={_source(getattr(tuning, field.name))},")
    print("    ),")
    for field, results in times.items():
        listed = "  ".join(f"{ms:.3f} {_short(candidate)}" for ms, candidate in results)
        print(f"    # {field}: {listed}", flush=True)


def _source(value):
    """Python source of a field of a TuningConfig."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_source, value))},)"
    if isinstance(value, TileConfig):
        sizes = f"{value.rows}, {value.columns}, {value.num_warps}, {value.num_stages}"
        copies = f", load_copies={value.load_copies}" if value.load_copies != 1 else ""
        return f"TileConfig({sizes}{copies})"
    if isinstance(value, PipelineConfig):
        granularity = f", {value.granularity}" if value.granularity else ""
        return f"PipelineConfig({value.columns}, {value.stages}{granularity})"
    return str(value)


def _short(candidate):
    """A candidate in a few letters, for the list of times."""
    if isinstance(candidate, PipelineConfig):
        granularity = f"g{candidate.granularity}" if candidate.granularity else ""
        return f"{candidate.columns}s{candidate.stages}{granularity}"
    if isinstance(candidate, TileConfig):
        c = candidate
        return f"{c.rows}x{c.columns}w{c.num_warps}s{c.num_stages}c{c.load_copies}"
    return "+".join(map(_short, candidate)) if isinstance(candidate, tuple) else str(candidate)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--cases", default="", help="only cases whose name contains this text")
    parser.add_argument("--kernels", default="triton,mosaic_gpu", help="kernels to tune")
    args = parser.parse_args()
    kernels = args.kernels.split(",")
    require_triton(args.dtype)
    if "triton" in kernels and benchmark.torch is None:
        raise SystemExit("timing the Triton kernels requires PyTorch: pip install torch")
    for case in CASES:
        if case.required and args.cases in str(case):
            for name, tune in (("triton", tune_triton), ("mosaic_gpu", tune_mosaic)):
                if name in kernels:
                    print_tuning(case, *tune(case, args.dtype), name)


if __name__ == "__main__":
    main()
