"""Runs the launches of triton_launches.py on PyTorch tensors.

On a GPU for timing, on a CPU in Triton's interpreter for tests.
"""

import torch

from pallas_kernels import tiles, triton_kernels, triton_launches


class TorchAttention:
    """Block attention of one shape, with its tables and buffers on the device of its inputs."""

    def __init__(self, problem: triton_launches.Problem, like: torch.Tensor):
        """Makes the launches and allocates the results.

        Args:
          problem: what is static about the call.
          like: a tensor (B, L, H, D) with the shape, dtype and device of q.
        """
        dtype = str(like.dtype).removeprefix("torch.")
        batch, length, heads, _ = like.shape
        self._forward = self._with_tables(
            like.device, triton_launches.forward_launches(problem, like.shape, dtype)
        )
        self._backward = self._with_tables(
            like.device, triton_launches.backward_launches(problem, like.shape, dtype)
        )
        self._query_bounds, self._key_bounds = (
            torch.from_numpy(bounds(problem.block_sizes, problem.pattern)).to(like.device)
            for bounds in (tiles.query_bounds, tiles.key_bounds)
        )  # (2, L) each
        # NaN shows rows that no launch writes.
        self.out, self.d_q, self.d_k, self.d_v = (
            torch.full_like(like, torch.nan) for _ in range(4)
        )
        options = dict(dtype=torch.float32, device=like.device)
        self.lse = torch.full((batch, heads, length), torch.nan, **options)
        self._delta = torch.full_like(self.lse, torch.nan)
        num_chunks = [
            len(launch.table) for launch, _ in self._backward if launch.kernel == "backward_queries"
        ]
        self._v_amax, self._d_out_amax = (
            torch.full((batch, heads, *(num_chunks or [1])), torch.nan, **options) for _ in range(2)
        )

    @staticmethod
    def _with_tables(device, launches):
        return [(launch, torch.from_numpy(launch.table).to(device)) for launch in launches]

    def forward(self, q, k, v):
        """Fills self.out and self.lse; returns out."""
        for launch, table in self._forward:
            results = (self.out, self.lse)
            _run(launch, q, k, v, self._query_bounds, table, *results, results=results)
        return self.out

    def backward(self, q, k, v, d_out):
        """Fills d_q, d_k and d_v for the q, k, v of the last call of `forward`; returns them."""
        for launch, table in self._backward:
            if launch.kernel == "backward_whole":
                results = (self.d_q, self.d_k, self.d_v)
                inputs = (q, k, v, d_out, self.lse, self._key_bounds, table)
                _run(launch, *inputs, *results, results=results)
            elif launch.kernel == "prepare":
                _run(launch, v, table, results=(self._v_amax,))
            elif launch.kernel == "backward_queries":
                results = (self.d_q, self._delta, self._d_out_amax)
                inputs = (q, k, v, self.out, d_out, self.lse, self._v_amax, self._query_bounds)
                _run(launch, *inputs, table, self.d_q, results=results)
            else:
                results = (self.d_k, self.d_v)
                inputs = (q, k, v, d_out, self.lse, self._delta, self._d_out_amax, self._key_bounds)
                _run(launch, *inputs, table, *results, results=results)
        return self.d_q, self.d_k, self.d_v


def _run(launch, *inputs, results):
    kernel = getattr(triton_kernels, launch.kernel)
    options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages)
    kernel[(launch.grid,)](*inputs, *launch.scalars, *results, **launch.constants, **options)
