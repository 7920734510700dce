"""`block_attention`: checks its arguments and chooses the implementation. The only place where either happens."""

import math
import numbers
import operator

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu, mosaic_tpu, triton, xla
from pallas_kernels.reference import PATTERNS

# Every name that users may write, best first. A module offers `attention(q, k, v, block_sizes, pattern, scale)`,
# `why_not(q)`: None if it can run here on arrays like q, otherwise the reason in words, and, if it is not the best
# wherever it can run, `is_faster(q, pattern)`.
_MODULES = {
    "mosaic_tpu": mosaic_tpu,
    "mosaic_gpu": mosaic_gpu,
    "triton": triton,
    "xla": xla,
}
IMPLEMENTATIONS = tuple(reversed(_MODULES))

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def block_attention(
    q: jax.Array,  # (B, L, H, D)
    k: jax.Array,  # (B, L, H, D)
    v: jax.Array,  # (B, L, H, D)
    block_sizes,
    pattern="diagonal",
    scale=1.0,
    implementation=None,
):
    """Attention over a sequence of blocks: softmax(scale * q k^T, over the keys of the pattern) v, for every head.

    "diagonal": a token attends to its own block (HMAR, arXiv 2506.04421, its section on block-diagonal attention).
    "causal": to its own and all earlier blocks (VAR, arXiv 2404.02905, block-causal mask). Within a block all tokens
    see each other. The softmax and all sums are float32 (float64 for float64 inputs). Differentiable in reverse mode by
    q, k and v.

    Args:
      q, k, v: (B, L, H, D) each, of one dtype: float32, bfloat16, float16, or float64 where JAX has it enabled.
      block_sizes: lengths of the consecutive blocks, positive ints known at trace time; their sum is L.
      pattern: "diagonal" or "causal".
      scale: a finite number known at trace time. Multiply q by a scale that is learned.
      implementation: "xla", "triton", "mosaic_gpu" or "mosaic_tpu"; None picks the best that can run here.

    Returns:
      (B, L, H, D), dtype of q.

    Raises:
      ValueError: an argument is wrong; the message names what was wanted and what came.
      NotImplementedError: the named implementation cannot run here; the message says why.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    block_sizes = _check(q, k, v, block_sizes, pattern, scale)
    return _choose(implementation, q, pattern).attention(
        q, k, v, block_sizes, pattern, float(scale)
    )


def _check(q, k, v, block_sizes, pattern, scale):
    """Raises ValueError for the first wrong argument; returns the block sizes as a tuple of ints."""
    if pattern not in PATTERNS:
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}; got {pattern!r}")
    # A traced scale is neither a number for Python nor hashable, so it is refused here with the others.
    if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite Python number; got {scale!r}")
    try:
        sizes = tuple(operator.index(size) for size in block_sizes)
    except TypeError:
        raise ValueError(f"block_sizes must be a sequence of ints; got {block_sizes!r}") from None
    if not sizes or min(sizes) < 1:
        raise ValueError(f"block_sizes must be positive, at least one of them; got {sizes}")
    if q.ndim != 4:
        raise ValueError(f"q must be (batch, length, heads, head dim); got shape {q.shape}")
    if k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"q, k and v must have one shape; got {q.shape}, {k.shape} and {v.shape}")
    if q.shape[1] != sum(sizes):
        raise ValueError(
            f"block_sizes {sizes} sum to {sum(sizes)}, but q has length {q.shape[1]} (shape {q.shape})"
        )
    if q.dtype.name not in _DTYPES:
        raise ValueError(f"q, k and v must be one of {', '.join(_DTYPES)}; got {q.dtype}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}")
    return sizes


def _choose(implementation, q, pattern):
    """The module that computes: the named one, or the first that can run here."""
    if implementation is None:
        return next(
            module
            for module in _MODULES.values()
            if module.why_not(q) is None and _is_best(module, q, pattern)
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}"
        )
    reason = _MODULES[implementation].why_not(q)
    if reason is not None:
        raise NotImplementedError(f"implementation {implementation!r} cannot run here: {reason}")
    return _MODULES[implementation]


def _is_best(module, q, pattern):
    return not hasattr(module, "is_faster") or module.is_faster(q, pattern)
