"""`block_attention`: validates its arguments and selects the implementation.

This is the only module that does either; the implementations rely on it.
"""

import math
import numbers
import operator

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu, mosaic_tpu, triton, xla
from pallas_kernels.reference import PATTERNS

# Every name that users may write, in order of preference. A module provides
#   attention(q, k, v, block_sizes, pattern, scale);
#   unsupported_reason(q): None if it can run here on arrays like q, otherwise the reason in words;
#   is_faster(q, pattern), if it is not the best choice wherever it can run.
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
    """Computes softmax(scale * q k^T, masked by blocks) v for every head.

    The L tokens form consecutive blocks. With pattern "diagonal", a token attends to its own block
    (HMAR, arXiv 2506.04421, section on block-diagonal attention). With pattern "causal", it
    attends to its own and all earlier blocks (VAR, arXiv 2404.02905, block-wise causal mask).
    Within a block, all tokens attend to each other. The softmax and all sums are float32 (float64
    for float64 inputs). The function is differentiable in reverse mode by q, k and v.

    Args:
      q, k, v: (B, L, H, D) each, of one dtype: float32, bfloat16, float16, or float64 where JAX has
        it enabled.
      block_sizes: lengths of the consecutive blocks, positive ints known at trace time; their sum
        is L.
      pattern: "diagonal" or "causal".
      scale: a finite number known at trace time. To learn a scale, multiply q by it instead.
      implementation: "xla", "triton", "mosaic_gpu" or "mosaic_tpu"; None selects the best one that
        can run here.

    Returns:
      (B, L, H, D), dtype of q.

    Raises:
      ValueError: an argument is invalid.
      NotImplementedError: the named implementation cannot run here; the message says why.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    block_sizes = _validate(q, k, v, block_sizes, pattern, scale)
    module = _select_module(implementation, q, pattern)
    return module.attention(q, k, v, block_sizes, pattern, float(scale))


def _validate(q, k, v, block_sizes, pattern, scale):
    """Raises ValueError for the first invalid argument; returns block_sizes as a tuple of ints."""
    if pattern not in PATTERNS:
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}; got {pattern!r}")
    # A traced scale is neither a Python number nor hashable, so this check rejects it too.
    if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite Python number; got {scale!r}")
    try:
        sizes = tuple(operator.index(size) for size in block_sizes)
    except TypeError:
        raise ValueError(f"block_sizes must be a sequence of ints; got {block_sizes!r}") from None
    if not sizes or min(sizes) < 1:
        raise ValueError(f"block_sizes must be one or more positive ints; got {sizes}")
    if q.ndim != 4:
        raise ValueError(f"q must have shape (batch, length, heads, head dim); got {q.shape}")
    if k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"q, k and v must have one shape; got {q.shape}, {k.shape} and {v.shape}")
    if q.shape[1] != sum(sizes):
        raise ValueError(
            f"block_sizes must sum to the length of q, {q.shape[1]}; got {sizes}, sum {sum(sizes)}"
        )
    if q.dtype.name not in _DTYPES:
        raise ValueError(f"q, k and v must be one of {', '.join(_DTYPES)}; got {q.dtype}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}")
    return sizes


def _select_module(implementation, q, pattern):
    """Returns the module of the named implementation or, for None, the best one that runs here."""
    if implementation is None:
        return next(
            module
            for module in _MODULES.values()
            if module.unsupported_reason(q) is None and _is_best(module, q, pattern)
        )
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation must be None or one of {names}; got {implementation!r}")
    reason = _MODULES[implementation].unsupported_reason(q)
    if reason is not None:
        raise NotImplementedError(f"implementation {implementation!r} cannot run here: {reason}")
    return _MODULES[implementation]


def _is_best(module, q, pattern):
    """Whether a module that can run here is preferred over those after it in `_MODULES`."""
    return not hasattr(module, "is_faster") or module.is_faster(q, pattern)
