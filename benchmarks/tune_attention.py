"""Finds the tile sizes that are written down in the code, for the rows of benchmarks/attention.py.

    python benchmarks/tune_attention.py [--rows=TEXT] [--kernels=triton,mosaic]

Prints entries for triton_plan.TUNED and mosaic_gpu.TUNED, and all times that they were chosen by. The Triton kernels are
timed on PyTorch tensors, the Mosaic kernels as jitted calls, one queued after the other.
"""

import argparse
import concurrent.futures
import dataclasses
import statistics
import time

import attention as benchmark
import jax
from attention import DIM, ROWS, SCALE, captured, mosaic_call, start, torch_inputs, torch_median

from pallas_kernels import mosaic_gpu, triton_plan
from pallas_kernels.mosaic_gpu import Step
from pallas_kernels.triton_plan import Tile, Tuning

# Tile sizes that ptxas fits on an H100 without spilled registers, for D = 64.
_SHORT = Tile(64, 64, 4, 1, spread=2)
FORWARD = (
    (Tile(64, 64, 4, 3),),
    (Tile(64, 64, 4, 2),),
    (Tile(64, 64, 4, 4),),
    (Tile(64, 32, 4, 3),),
    (Tile(64, 64, 4, 2), Tile(128, 64, 4, 3)),
    (Tile(64, 64, 4, 2), Tile(128, 64, 8, 3)),
    (Tile(64, 64, 4, 2), Tile(128, 64, 8, 4)),
    (Tile(64, 64, 4, 2), Tile(128, 32, 8, 4)),
    (Tile(64, 64, 4, 2), Tile(128, 128, 8, 3)),
)
WHOLE = (
    (_SHORT,),
    (_SHORT, Tile(128, 32, 8, 2, spread=8)),
    (_SHORT, Tile(128, 128, 8, 1, spread=2)),
    (Tile(64, 32, 4, 2, spread=4),),
)
KEYS = (
    Tile(64, 64, 4, 3, spread=2),
    Tile(64, 64, 4, 2, spread=2),
    Tile(64, 32, 4, 3, spread=4),
    Tile(64, 32, 4, 4, spread=4),
    Tile(128, 32, 8, 3, spread=8),
    Tile(128, 64, 8, 2, spread=4),
    Tile(128, 64, 8, 3, spread=4),
)
QUERIES = (
    Tile(64, 64, 4, 3),
    Tile(64, 64, 4, 4),
    Tile(64, 32, 4, 3),
    Tile(64, 32, 4, 4),
    Tile(128, 32, 8, 3),
    Tile(128, 64, 8, 3),
)
TOGETHER = (1, 2, 4, 8, 16)


def tune_triton(row, dtype):
    """The fastest tile sizes for a row, one field after the other: the Tuning, and {field: [(ms, candidate)]}."""
    from torch_launch import TorchAttention
    from triton.runtime.errors import OutOfResources

    q, k, v, d_out = torch_inputs(row, dtype)
    best = Tuning(
        FORWARD[0], WHOLE[0], KEYS[0], QUERIES[0], forward_together=4, backward_together=4
    )
    tried = {}

    def milliseconds(tuning, backward):
        attention = TorchAttention(triton_plan.Problem(row.sizes, row.pattern, SCALE, tuning), q)
        run = (
            (lambda: attention.backward(q, k, v, d_out))
            if backward
            else (lambda: attention.forward(q, k, v))
        )
        try:
            attention.forward(q, k, v)
            return torch_median(captured(run), repeat_ms=40)
        except (
            OutOfResources,
            RuntimeError,
        ) as error:  # another GPU or Triton than the candidates are made for
            print(f"{row}: {tuning}: {error}", flush=True)
            return float("inf")

    fields = [("forward", FORWARD, False), ("keys", KEYS, True), ("queries", QUERIES, True)]
    if row.pattern == "diagonal":
        # Last, so that keys and queries are chosen where they do most of the work.
        fields.append(("whole", WHOLE, True))
    fields += [("forward_together", TOGETHER, False), ("backward_together", TOGETHER, True)]
    for field, candidates, backward in fields:
        tried[field] = []
        for candidate in candidates:
            tuning = dataclasses.replace(best, **{field: candidate})
            tried[field].append((milliseconds(tuning, backward), candidate))
        best = dataclasses.replace(
            best, **{field: min(tried[field], key=lambda result: result[0])[1]}
        )
    return best, tried


# Steps of the Mosaic kernels that fit in shared memory.
MOSAIC = dict(
    forward=(Step(128, 4, 64), Step(128, 4), Step(256, 2), Step(256, 2, 128)),
    queries=(Step(128, 2), Step(128, 3), Step(64, 4)),
    keys=(Step(128, 2), Step(128, 3), Step(64, 3)),
)


def tune_mosaic(row, dtype):
    """As `tune_triton`, for the Mosaic kernels."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_out = (jax.random.normal(key, row.shape, dtype) for key in keys)
    best = mosaic_gpu.Tuning()
    tried = {}

    def compiled(tuning, backward):
        """The function with its arguments, or why there is none."""
        call = mosaic_call(row, tuning)
        try:
            arrays = q, k, v
            function = jax.jit(mosaic_gpu.run_forward(call)).lower(*arrays).compile()
            if backward:
                out, lse = function(*arrays)
                arrays = q, k, v, out, lse, d_out
                function = jax.jit(mosaic_gpu.run_backward(call)).lower(*arrays).compile()
            jax.block_until_ready(function(*arrays))
            return function, arrays
        except (
            Exception
        ) as error:  # too much memory for this GPU, or code that its compiler refuses
            return error

    for field, candidates in MOSAIC.items():
        tunings = [dataclasses.replace(best, **{field: candidate}) for candidate in candidates]
        # Compiled side by side, then timed one after the other.
        with concurrent.futures.ThreadPoolExecutor(len(tunings)) as threads:
            found = list(threads.map(lambda tuning: compiled(tuning, field != "forward"), tunings))
        for candidate, result in zip(candidates, found, strict=True):
            if isinstance(result, Exception):
                print(f"{row}: {field} {candidate}: {str(result)[:200]}", flush=True)
        if all(isinstance(result, Exception) for result in found):
            raise SystemExit(f"{row}: no {field} of the candidates runs here")
        fit = {
            c: result
            for c, result in zip(candidates, found, strict=True)
            if not isinstance(result, Exception)
        }
        tried[field] = list(zip(queued_medians(fit.values()), fit, strict=True))
        best = dataclasses.replace(
            best, **{field: min(tried[field], key=lambda result: result[0])[1]}
        )
    return best, tried


def queued_medians(calls, few=2, many=12, repeats=15):
    """For each (function, arrays): milliseconds of one more call among calls that are queued without waiting.

    In turns, for a GPU slows down as it warms up.
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


def print_tuning(row, tuning, tried, kind):
    gpu = triton_plan.gpu_name(jax.devices()[0].device_kind)
    dtype = '"half", ' if kind == "triton" else ""
    print(f'    ("{gpu}", {row.length}, {DIM}, {dtype}"{row.pattern}"): Tuning(  # {kind}')
    for field in dataclasses.fields(tuning):
        print(f"        {field.name}={_source(getattr(tuning, field.name))},")
    print("    ),")
    for field, results in tried.items():
        print(
            f"    # {field}: {'  '.join(f'{ms:.3f} {_short(candidate)}' for ms, candidate in results)}",
            flush=True,
        )


def _source(value):
    """Python source of a field of a Tuning."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_source, value))},)"
    if isinstance(value, Tile):
        spread = f", spread={value.spread}" if value.spread != 1 else ""
        return f"Tile({value.rows}, {value.columns}, {value.warps}, {value.stages}{spread})"
    if isinstance(value, Step):
        return f"Step({value.columns}, {value.stages}{f', {value.grain}' if value.grain else ''})"
    return str(value)


def _short(candidate):
    if isinstance(candidate, Step):
        return f"{candidate.columns}s{candidate.stages}{f'g{candidate.grain}' if candidate.grain else ''}"
    if isinstance(candidate, Tile):
        return f"{candidate.rows}x{candidate.columns}w{candidate.warps}s{candidate.stages}p{candidate.spread}"
    return "+".join(map(_short, candidate)) if isinstance(candidate, tuple) else str(candidate)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--rows", default="", help="only rows whose name holds this text")
    parser.add_argument("--kernels", default="triton,mosaic")
    args = parser.parse_args()
    start(args.dtype)
    if "triton" in args.kernels and benchmark.torch is None:
        raise SystemExit("Triton's are timed on PyTorch tensors: pip install torch")
    for row in ROWS:
        if row.must and args.rows in str(row):
            for kind, tune in (("triton", tune_triton), ("mosaic", tune_mosaic)):
                if kind in args.kernels.split(","):
                    print_tuning(row, *tune(row, args.dtype), kind)


if __name__ == "__main__":
    main()
