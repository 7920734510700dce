"""Times block attention against dense masked attention on a CPU: forward + backward, float32.

Prints medians and their ratio for both patterns. Requirements for the diagonal pattern: at least
3x as fast as dense for the 256-pixel list, and no slower than dense for the small lists.

    python benchmarks/attention_cpu.py [--repeats=15] [--groups]

--groups also times the diagonal pattern for several values of `tiles.GROUP_OVERHEAD`; the value in
the code was chosen with it.
"""

import argparse
import functools
import statistics
import time

import jax
import numpy as np

from pallas_kernels import block_attention, tiles, xla
from pallas_kernels.reference import dense_attention

# (sides, batch, heads, head dim): the published 256-pixel list, and the lists of small models that
# train on a laptop.
CASES = (
    ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 2, 16, 64),
    ((1, 2, 3, 4), 32, 4, 32),
    ((1, 2, 4, 8), 32, 4, 32),
)
GROUP_OVERHEADS = (0, 200, 500, 1000, 2000, 4000, 8000)


def medians(functions, arrays, repeats):
    """Median seconds of forward + backward of each function; they alternate to share the noise."""

    def forward_backward(function, q, k, v, d_out):
        out, vjp = jax.vjp(function, q, k, v)
        return out, vjp(d_out)

    compiled = [
        jax.jit(functools.partial(forward_backward, f)).lower(*arrays).compile() for f in functions
    ]
    seconds = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for run, times in zip(compiled, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(run(*arrays))
            if repeat:  # the first run warms up
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of a long case")
    parser.add_argument("--groups", action="store_true", help="also time several group overheads")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    for sides, batch, heads, dim in CASES:
        sizes = tuple(side * side for side in sides)
        length, scale = sum(sizes), dim**-0.5
        arrays = [rng.standard_normal((batch, length, heads, dim), np.float32) for _ in range(4)]
        arrays = [jax.device_put(x) for x in arrays]
        shape = f"batch {batch}, heads {heads}, head dim {dim}, L {length}"
        print(f"sides {sides}: {shape}", flush=True)
        # The small lists take milliseconds, so they need more runs.
        repeats = args.repeats if length > 500 else 10 * args.repeats
        for pattern in ("diagonal", "causal"):
            options = dict(block_sizes=sizes, pattern=pattern, scale=scale)
            functions = [
                functools.partial(f, **options) for f in (dense_attention, block_attention)
            ]
            dense, block = medians(functions, arrays, repeats)
            times = f"dense {dense * 1e3:8.2f} ms  xla {block * 1e3:8.2f} ms"
            print(f"  {pattern:8s}  {times}  ratio {dense / block:5.2f}", flush=True)
        if args.groups:
            groupings = [
                tiles.group_blocks(sizes, "diagonal", overhead) for overhead in GROUP_OVERHEADS
            ]
            functions = [
                functools.partial(xla.attend_groups, groups=groups, pattern="diagonal", scale=scale)
                for groups in groupings
            ]
            seconds = medians(functions, arrays, repeats)
            for overhead, groups, s in zip(GROUP_OVERHEADS, groupings, seconds, strict=True):
                blocks = [group.block_sizes for group in groups]
                print(f"  group overhead {overhead:5d}: {s * 1e3:8.2f} ms, groups {blocks}")


if __name__ == "__main__":
    main()
