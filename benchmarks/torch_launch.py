"""Runs the launches of triton_plan.py on PyTorch tensors: on a GPU for timing, on a CPU in Triton's interpreter."""

import torch

from pallas_kernels import tiles, triton_kernels, triton_plan


class TorchAttention:
    """Block attention of one shape, its tables and buffers on the device."""

    def __init__(self, problem: triton_plan.Problem, like: torch.Tensor):
        dtype = str(like.dtype).removeprefix("torch.")
        batch, length, heads, _ = like.shape
        self._forward = self._on(
            like.device, triton_plan.forward_launches(problem, like.shape, dtype)
        )
        self._backward = self._on(
            like.device, triton_plan.backward_launches(problem, like.shape, dtype)
        )
        self._query_bounds, self._key_bounds = (
            torch.from_numpy(bounds(problem.block_sizes, problem.pattern)).to(like.device)
            for bounds in (tiles.query_bounds, tiles.key_bounds)
        )
        self.out, self.d_q, self.d_k, self.d_v = (
            torch.full_like(like, torch.nan) for _ in range(4)
        )
        wide = dict(dtype=torch.float32, device=like.device)
        self.lse = torch.full((batch, heads, length), torch.nan, **wide)
        self._delta = torch.full_like(self.lse, torch.nan)
        pieces = [
            len(launch.table) for launch, _ in self._backward if launch.kernel == "backward_queries"
        ]
        self._top_v, self._top_d_out = (
            torch.full((batch, heads, *(pieces or [1])), torch.nan, **wide) for _ in range(2)
        )

    @staticmethod
    def _on(device, launches):
        return [(launch, torch.from_numpy(launch.table).to(device)) for launch in launches]

    def forward(self, q, k, v):
        """Fills self.out and self.lse; returns out."""
        for launch, table in self._forward:
            results = (self.out, self.lse)
            _run(launch, q, k, v, self._query_bounds, table, *results, results=results)
        return self.out

    def backward(self, q, k, v, d_out):
        """Fills d_q, d_k and d_v, for the q, k, v that `forward` saw last; returns them."""
        for launch, table in self._backward:
            if launch.kernel == "backward_whole":
                results = (self.d_q, self.d_k, self.d_v)
                _run(
                    launch,
                    q,
                    k,
                    v,
                    d_out,
                    self.lse,
                    self._key_bounds,
                    table,
                    *results,
                    results=results,
                )
            elif launch.kernel == "prepare":
                _run(launch, v, table, results=(self._top_v,))
            elif launch.kernel == "backward_queries":
                results = (self.d_q, self._delta, self._top_d_out)
                inputs = (
                    q,
                    k,
                    v,
                    self.out,
                    d_out,
                    self.lse,
                    self._top_v,
                    self._query_bounds,
                    table,
                )
                _run(launch, *inputs, self.d_q, results=results)
            else:
                results = (self.d_k, self.d_v)
                inputs = (
                    q,
                    k,
                    v,
                    d_out,
                    self.lse,
                    self._delta,
                    self._top_d_out,
                    self._key_bounds,
                    table,
                )
                _run(launch, *inputs, *results, results=results)
        return self.d_q, self.d_k, self.d_v


def _run(launch, *inputs, results):
    kernel = getattr(triton_kernels, launch.kernel)
    options = dict(num_warps=launch.warps, num_stages=launch.stages)
    kernel[(launch.grid,)](*inputs, *launch.counts, *results, **launch.constants, **options)
