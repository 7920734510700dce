"""Runs the Triton kernels in Triton's interpreter and prints their errors against float64 as JSON.

test_triton_interpreted.py starts this script. Triton reads TRITON_INTERPRET=1 on import, so it
needs its own process.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from triton.runtime import interpreter

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))
from torch_launch import TorchAttention

from pallas_kernels import triton_launches
from pallas_kernels.reference import block_mask
from pallas_kernels.triton_tuning import TileConfig, TuningConfig

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_for_numpy_2_4(tensor, scope):
    """For loop bounds, Triton 3.6 takes int() of one-element arrays, which numpy 2.4 rejects."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_tensor_for_numpy_2_4

# Tiles small enough that short lists are split, packed and masked in every way.
SMALL_TILES = TuningConfig(
    forward=(TileConfig(16, 16, 4, 1), TileConfig(32, 16, 4, 1)),
    backward_whole=(TileConfig(16, 16, 4, 1), TileConfig(32, 16, 4, 1, load_copies=8)),
    backward_keys=TileConfig(16, 32, 4, 1, load_copies=4),
    backward_queries=TileConfig(32, 16, 4, 1),
    forward_heads_per_group=2,
    backward_heads_per_group=1,
)


def expected(sizes, pattern, scale, q, k, v, d_out):
    """out, d_q, d_k, d_v of the dense definition in float64."""
    q, k, v, d_out = (x.double().numpy().swapaxes(1, 2) for x in (q, k, v, d_out))
    p = np.where(block_mask(sizes, pattern), scale * (q @ k.swapaxes(2, 3)), -np.inf)
    p = np.exp(p - p.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    d_p = d_out @ v.swapaxes(2, 3)
    d_scores = scale * p * (d_p - (p * d_p).sum(-1, keepdims=True))
    results = (p @ v, d_scores @ k, d_scores.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ d_out)
    return [x.swapaxes(1, 2) for x in results]


def compute_errors(
    sizes, pattern, scale, dim, dtype, tuning, spread=1.0, d_out_size=1.0, batch=1, heads=2
):
    """Relative L2 errors of out, d_q, d_k, d_v. An element that is not written makes them NaN."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, sum(sizes), heads, dim)
    q, k, v, d_out = (spread * torch.randn(shape, generator=generator) for _ in range(4))
    q, k, v, d_out = (x.to(getattr(torch, dtype)) for x in (q, k, v, d_out * d_out_size))
    attention = TorchAttention(triton_launches.Problem(sizes, pattern, scale, tuning), q)
    results = [attention.forward(q, k, v), *attention.backward(q, k, v, d_out)]
    errors = []
    for x, y in zip(results, expected(sizes, pattern, scale, q, k, v, d_out), strict=True):
        size = np.linalg.norm(y)
        error = np.linalg.norm(x.double().numpy() - y) / (size if size > 1e-9 else 1.0)
        errors.append(float(error))
    return errors


def main():
    cases = json.loads(sys.argv[1])
    print(
        json.dumps(
            [
                compute_errors(**{"tuning": SMALL_TILES, **case, "sizes": tuple(case["sizes"])})
                for case in cases
            ]
        )
    )


if __name__ == "__main__":
    main()
