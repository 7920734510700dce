"""Seconds to sample a batch of images, by schedule: the first call, and later ones.

python benchmarks/sampling_cpu.py --model=digits [--n=64]
"""

import argparse
import statistics
import time

import jax
import numpy as np

import hmar_jax


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="digits")
    parser.add_argument("--n", type=int, default=64)
    args = parser.parse_args()
    pipe = hmar_jax.load(args.model)
    ids = np.arange(args.n) % pipe.spec.num_classes

    def seconds(schedule):
        start = time.perf_counter()
        jax.block_until_ready(pipe.sample(jax.random.key(0), ids, schedule=schedule))
        return time.perf_counter() - start

    print(
        f"{args.n} images on {jax.devices()[0].device_kind}, seconds: first call, median of 7 more"
    )
    for schedule in ("none", "default", "cosine:3", "cosine:9"):
        first = seconds(schedule)
        later = statistics.median(seconds(schedule) for _ in range(7))
        print(f"  {schedule:10} {first:6.2f} {later:6.3f}")


if __name__ == "__main__":
    main()
