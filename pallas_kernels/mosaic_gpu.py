"""Block attention on Hopper GPUs by kernels in Pallas for Mosaic GPU.

This module is the JAX side: support checks, tuning, forward, backward and their batching. The
arithmetic of the kernels is in mosaic_gpu_kernels.py, the loops and the memory around it are in
mosaic_gpu_pipeline.py, and the work of their programs is listed in mosaic_gpu_work_lists.py.

Letters in shapes: B batch, L all tokens, H heads, D head dim. In addition to (B, H, L), numbers per
row have the shapes of a work list: (B, H, tiles, ROWS) and (B, H, steps, columns).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import (
    mosaic_gpu_kernels,
    mosaic_gpu_pipeline,
    mosaic_gpu_work_lists,
    platform,
    transforms,
)
from pallas_kernels.mosaic_gpu_pipeline import SharedMemoryLayout, Stream
from pallas_kernels.mosaic_gpu_work_lists import ROWS

_MIN_JAX = (0, 11)  # Pallas' interface to Mosaic GPU still changes
_DTYPES = ("float16", "bfloat16")
_HEAD_DIM = 64
_HEADS_PER_GROUP = 8  # heads that go through the tiles side by side, at most; 1, 4, 16 are as fast


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """How a kernel streams the rows of the other side."""

    columns: int  # rows per step, a multiple of 64, at most 256
    stages: int  # steps in shared memory
    # Forward: the last step has a multiple of this many columns; None: all columns.
    granularity: int | None = None

    @property
    def partial_columns(self) -> tuple[int, ...]:
        """The columns that a last step may have if it has fewer than the others."""
        if self.granularity is None:
            return ()
        return tuple(range(self.granularity, self.columns, self.granularity))


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """The pipelines of all kernels of one call, by the names of the kernels."""

    forward: PipelineConfig = PipelineConfig(128, 4, 64)
    backward_queries: PipelineConfig = PipelineConfig(128, 2)
    backward_keys: PipelineConfig = PipelineConfig(128, 2)


# Cases (GPU, L, D, pattern), in half precision, in which `benchmarks/attention.py` measured these
# kernels to be faster than the Triton ones. The pipelines were found by
# `benchmarks/tune_attention.py`. At 680 tokens, the two are within 5 %.
TUNED = {
    ("H100", 2240, 64, "diagonal"): TuningConfig(),
    ("H100", 2240, 64, "causal"): TuningConfig(),
    ("H100", 9451, 64, "diagonal"): TuningConfig(forward=PipelineConfig(256, 2)),
    ("H100", 9451, 64, "causal"): TuningConfig(forward=PipelineConfig(256, 2)),
}


def tuning_for(gpu: str, length: int, dim: int, pattern: str) -> TuningConfig:
    """Returns the pipelines measured for a case, or ones that work everywhere.

    Args:
      gpu: short name of the GPU, by `platform.gpu_name`.
      length: L, the number of tokens.
      dim: D, the head dim.
      pattern: "diagonal" or "causal".
    """
    return TUNED.get((gpu, length, dim, pattern), TuningConfig())


def unsupported_reason(q) -> str | None:
    """Returns None if the kernels can run here on arrays like q, otherwise the reason in words."""
    reason = platform.nvidia_unsupported_reason()
    if reason is not None:
        return reason
    if jax.__version_info__ < _MIN_JAX:
        oldest = ".".join(map(str, _MIN_JAX))
        return f"requires jax {oldest} or newer; this is jax {jax.__version__}"
    device = jax.local_devices()[0]
    if device.compute_capability != "9.0":
        kind = device.device_kind
        return f"requires a Hopper GPU (compute capability 9.0); this process runs on {kind}"
    if q.dtype.name not in _DTYPES:
        return f"supports {', '.join(_DTYPES)}; got {q.dtype}"
    if q.shape[-1] != _HEAD_DIM:
        return f"supports head dim {_HEAD_DIM}; got {q.shape[-1]}"
    return None


def is_faster(q, pattern) -> bool:
    """Whether this module is measured to be the fastest on this GPU, for arrays like q."""
    return _tuning_key(q, pattern) in TUNED


def _tuning_key(q, pattern):
    gpu = platform.gpu_name(jax.local_devices()[0].device_kind)
    return gpu, q.shape[1], q.shape[3], pattern


def attention(q, k, v, block_sizes, pattern, scale):
    """Block attention; see `pallas_kernels.api.block_attention`, which validates the arguments."""
    tuning = tuning_for(*_tuning_key(q, pattern))
    num_multiprocessors = jax.local_devices()[0].core_count
    return attend(q, k, v, CallConfig(block_sizes, pattern, scale, tuning, num_multiprocessors))


@dataclasses.dataclass(frozen=True)
class CallConfig:
    """Everything static about a call from JAX."""

    block_sizes: tuple[int, ...]
    pattern: str
    scale: float
    tuning: TuningConfig = TuningConfig()
    num_multiprocessors: int = 132

    def work_list_args(self, q, pipeline):
        """The arguments of `query_work_list` and `key_work_list`, for arrays like q."""
        batch, _, heads, _ = q.shape
        return (
            self.block_sizes,
            self.pattern,
            batch,
            heads,
            pipeline.columns,
            _HEADS_PER_GROUP,
            self.num_multiprocessors,
        )


@functools.lru_cache(maxsize=256)
def run_forward(config: CallConfig):
    """Returns a function (q, k, v) -> (out, lse).

    q, k, v and out are (B, L, H, D); lse, the logsumexp of the scores in base 2, is (B, H, L)
    float32.
    """

    @transforms.batched
    def run(q, k, v):
        pipeline = config.tuning.forward
        work_list = mosaic_gpu_work_lists.query_work_list(
            *config.work_list_args(q, pipeline), pipeline.granularity
        )
        results = mosaic_gpu_pipeline.run_kernel(
            layout=SharedMemoryLayout(
                dtype=q.dtype,
                dim=q.shape[3],
                columns=pipeline.columns,
                stages=pipeline.stages,
                num_resident=1,
                streams=(Stream(1), Stream(1)),
                num_outputs=1,
                num_row_outputs=1,
                partial_columns=pipeline.partial_columns,
            ),
            compute=functools.partial(
                mosaic_gpu_kernels.forward,
                config.scale * math.log2(math.e),
                q.dtype,
                pipeline.columns,
                pipeline.partial_columns,
            ),
            work_list=work_list,
            num_programs=config.num_multiprocessors,
            operands=dict(q=q, k=k, v=v),
            resident=("q",),
            streams=(("k",), ("v",)),
            out_types=dict(out=_like(q), lse=_row_results_type(q, work_list)),
        )
        lse = _from_tiles(results["lse"], work_list)
        return tuple(transforms.varying_like(q, x) for x in (results["out"], lse))

    return run


@functools.lru_cache(maxsize=256)
def run_backward(config: CallConfig):
    """Returns a function (q, k, v, out, lse, d_out) -> (d_q, d_k, d_v), each (B, L, H, D)."""

    @transforms.batched
    def run(q, k, v, out, lse, d_out):
        rescaled = q.dtype == jnp.float16
        pipeline = config.tuning.backward_queries
        work_list = mosaic_gpu_work_lists.query_work_list(*config.work_list_args(q, pipeline))
        operands = dict(
            q=q, d_out=d_out, out=out, k=k, v=v, lse=_gather(lse, work_list.resident_rows, jnp.inf)
        )
        if rescaled:
            v_amax = jnp.abs(v).max(axis=(1, 3)).astype(jnp.float32)  # (B, H)
            operands["v_amax"] = v_amax
        results = mosaic_gpu_pipeline.run_kernel(
            layout=SharedMemoryLayout(
                dtype=q.dtype,
                dim=q.shape[3],
                columns=pipeline.columns,
                stages=pipeline.stages,
                num_resident=3,
                streams=(Stream(2),),
                num_outputs=1,
                num_row_outputs=2,
            ),
            compute=functools.partial(
                mosaic_gpu_kernels.backward_queries, config.scale, q.dtype, pipeline.columns
            ),
            work_list=work_list,
            num_programs=config.num_multiprocessors,
            operands=operands,
            resident=("q", "d_out", "out"),
            streams=(("k", "v"),),
            out_types=dict(
                d_q=_like(q),
                delta=_row_results_type(q, work_list),
                d_out_amax=_row_results_type(q, work_list),
            ),
        )
        d_q = results["d_q"]
        delta = _from_tiles(results["delta"], work_list)

        pipeline = config.tuning.backward_keys
        work_list = mosaic_gpu_work_lists.key_work_list(*config.work_list_args(q, pipeline))
        operands = dict(q=q, d_out=d_out, k=k, v=v)
        if rescaled:
            d_out_amax = results["d_out_amax"].max(axis=(2, 3))  # (B, H)
            largest = q.shape[3] * jnp.maximum(d_out_amax * v_amax, 1e-30)
            operands["d_scores_scale"] = mosaic_gpu_kernels.FLOAT16_LIMIT / largest  # (B, H)
            delta *= operands["d_scores_scale"][:, :, None]
        operands |= dict(
            lse=_gather(lse, work_list.streamed_rows, jnp.inf),
            delta=_gather(delta, work_list.streamed_rows, 0.0),
        )
        results = mosaic_gpu_pipeline.run_kernel(
            layout=SharedMemoryLayout(
                dtype=q.dtype,
                dim=q.shape[3],
                columns=pipeline.columns,
                stages=pipeline.stages,
                num_resident=2,
                streams=(Stream(2, 2),),
                num_outputs=2,
                num_row_outputs=0,
            ),
            compute=functools.partial(
                mosaic_gpu_kernels.backward_keys, config.scale, q.dtype, pipeline.columns
            ),
            work_list=work_list,
            num_programs=config.num_multiprocessors,
            operands=operands,
            resident=("k", "v"),
            streams=(("q", "d_out", "lse", "delta"),),
            out_types=dict(d_k=_like(q), d_v=_like(q)),
        )
        return tuple(transforms.varying_like(q, x) for x in (d_q, results["d_k"], results["d_v"]))

    return run


# (q, k, v, config) -> out: `attention` with the tuning and the GPU given.
attend = transforms.differentiable(run_forward, run_backward)


def _like(q):
    return jax.ShapeDtypeStruct(q.shape, q.dtype)


def _row_results_type(q, work_list):
    """The type of one number per resident row: (B, H, tiles, ROWS) float32."""
    batch, _, heads, _ = q.shape
    return jax.ShapeDtypeStruct((batch, heads, len(work_list.resident_rows), ROWS), jnp.float32)


def _from_tiles(x, work_list):
    """(B, H, tiles, ROWS) -> (B, H, L)"""
    rows = work_list.resident_rows.ravel()
    index = np.flatnonzero(rows >= 0)
    index = index[np.argsort(rows[index])]
    return x.reshape(*x.shape[:2], -1)[:, :, index]


def _gather(x, rows, fill):
    """(B, H, L) -> (B, H, *rows.shape): x at these rows, and fill where a row is -1."""
    return jnp.where(rows >= 0, x[:, :, np.maximum(rows, 0)], fill)
