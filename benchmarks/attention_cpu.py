"""Dense masked attention against block attention on this machine's CPU: forward + backward, float32.

Prints medians and their ratio, for the two patterns. The contract, for the diagonal pattern: at least 3x for the
256-pixel list, and no slower than dense for the small lists.

    python benchmarks/attention_cpu.py [--repeats=15] [--groups]

--groups also times the diagonal pattern for several values of `tiles.CELLS_PER_GROUP`; its value was chosen so.
"""

import argparse
import functools
import statistics
import time

import jax
import numpy as np

from pallas_kernels import block_attention, tiles, xla
from pallas_kernels.reference import dense_attention

# (sides, batch, heads, head dim): the published 256-pixel list, and the lists of small models that train on a laptop.
CASES = (
    ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 2, 16, 64),
    ((1, 2, 3, 4), 32, 4, 32),
    ((1, 2, 4, 8), 32, 4, 32),
)
CELLS = (0, 200, 500, 1000, 2000, 4000, 8000)


def medians(functions, arrays, repeats):
    """Median seconds of forward + backward of each function, run in turn so that noise falls on all of them alike."""

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
            if repeat:  # the first turn warms up
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--groups", action="store_true")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    for sides, batch, heads, dim in CASES:
        sizes = tuple(side * side for side in sides)
        scale = dim**-0.5
        arrays = [
            rng.standard_normal((batch, sum(sizes), heads, dim), np.float32) for _ in range(4)
        ]
        arrays = [jax.device_put(x) for x in arrays]
        print(
            f"sides {sides}: batch {batch}, heads {heads}, head dim {dim}, L {sum(sizes)}",
            flush=True,
        )
        # The small lists take milliseconds, where one run says little.
        repeats = args.repeats if sum(sizes) > 500 else 10 * args.repeats
        for pattern in ("diagonal", "causal"):
            options = dict(block_sizes=sizes, pattern=pattern, scale=scale)
            functions = [
                functools.partial(f, **options) for f in (dense_attention, block_attention)
            ]
            dense, ours = medians(functions, arrays, repeats)
            times = f"dense {dense * 1e3:8.2f} ms  xla {ours * 1e3:8.2f} ms"
            print(f"  {pattern:8s}  {times}  ratio {dense / ours:5.2f}", flush=True)
        if args.groups:
            splits = [tiles.group_blocks(sizes, "diagonal", cells) for cells in CELLS]
            functions = [
                lambda q, k, v, s=split: xla.attend_groups(q, k, v, s, "diagonal", scale)
                for split in splits
            ]
            for cells, split, seconds in zip(
                CELLS, splits, medians(functions, arrays, repeats), strict=True
            ):
                print(
                    f"  {cells:5d} cells a group: {seconds * 1e3:8.2f} ms, groups {[g.block_sizes for g in split]}"
                )


if __name__ == "__main__":
    main()
