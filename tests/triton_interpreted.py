"""Runs the Triton kernels in Triton's interpreter (TRITON_INTERPRET=1) and prints their errors against float64 as JSON.

Started by test_triton_interpreted.py: Triton reads the variable when it is imported, so this needs its own process.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from triton.runtime import interpreter

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))
from torch_launch import TorchAttention

from pallas_kernels import triton_plan
from pallas_kernels.reference import block_mask
from pallas_kernels.triton_plan import Tile, Tuning

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_for_numpy_2_4(tensor, scope):
    """Triton 3.6 takes int() of arrays of one element for loop bounds, which numpy refuses since 2.4."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_tensor_for_numpy_2_4

# Tiles small enough for short lists to be cut, packed and masked in every way.
SMALL_TILES = Tuning(
    forward=(Tile(16, 16, 4, 1), Tile(32, 16, 4, 1)),
    whole=(Tile(16, 16, 4, 1), Tile(32, 16, 4, 1, spread=8)),
    keys=Tile(16, 32, 4, 1, spread=4),
    queries=Tile(32, 16, 4, 1),
    forward_together=2,
    backward_together=1,
)


def expected(sizes, pattern, scale, q, k, v, d_out):
    """out, dq, dk, dv of the dense definition in float64."""
    q, k, v, d_out = (x.double().numpy().swapaxes(1, 2) for x in (q, k, v, d_out))
    p = np.where(block_mask(sizes, pattern), scale * (q @ k.swapaxes(2, 3)), -np.inf)
    p = np.exp(p - p.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    d_p = d_out @ v.swapaxes(2, 3)
    d_scores = scale * p * (d_p - (p * d_p).sum(-1, keepdims=True))
    results = (p @ v, d_scores @ k, d_scores.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ d_out)
    return [x.swapaxes(1, 2) for x in results]


def errors(sizes, pattern, scale, dim, dtype, tuning, spread=1.0, d_out_size=1.0, batch=1, heads=2):
    """Relative L2 errors of out, dq, dk, dv; every element is checked to have been written."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, sum(sizes), heads, dim)
    q, k, v, d_out = (spread * torch.randn(shape, generator=generator) for _ in range(4))
    q, k, v, d_out = (x.to(getattr(torch, dtype)) for x in (q, k, v, d_out * d_out_size))
    attention = TorchAttention(triton_plan.Problem(sizes, pattern, scale, tuning), q)
    ours = [attention.forward(q, k, v), *attention.backward(q, k, v, d_out)]
    found = []
    for x, y in zip(ours, expected(sizes, pattern, scale, q, k, v, d_out), strict=True):
        size = np.linalg.norm(y)
        found.append(float(np.linalg.norm(x.double().numpy() - y) / (size if size > 1e-9 else 1.0)))
    return found


def main():
    cases = json.loads(sys.argv[1])
    small = dict(tuning=SMALL_TILES)
    print(
        json.dumps([errors(**{**small, **case, "sizes": tuple(case["sizes"])}) for case in cases])
    )


if __name__ == "__main__":
    main()
