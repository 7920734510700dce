"""The definition of block attention: all scores are computed, then a boolean mask is applied.

The other modules compute the same function without the scores that the mask removes; tests and
benchmarks compare them with this one. There are two masks. "diagonal": a token attends to its own
block (HMAR, arXiv 2506.04421, section on block-diagonal attention). "causal": it attends to its
own and all earlier blocks (VAR, arXiv 2404.02905, block-wise causal mask).

Letters in shapes: B batch, L all tokens, H heads, D head dim; l and m index queries and keys.
"""

import jax
import jax.numpy as jnp
import numpy as np

PATTERNS = ("diagonal", "causal")


def block_mask(block_sizes, pattern):
    """Returns which key (column) each query (row) attends to.

    Args:
      block_sizes: lengths of the consecutive blocks; L is their sum.
      pattern: "diagonal" (own block) or "causal" (own and earlier blocks).

    Returns:
      (L, L) bool array. Every row holds at least its own token.

    Raises:
      ValueError: the pattern is unknown.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}; got {pattern!r}")
    block = np.repeat(np.arange(len(block_sizes)), block_sizes)  # (L,)
    query_block, key_block = block[:, None], block[None, :]
    return query_block == key_block if pattern == "diagonal" else query_block >= key_block


def dense_attention(
    q: jax.Array,  # (B, L, H, D)
    k: jax.Array,  # (B, L, H, D)
    v: jax.Array,  # (B, L, H, D)
    block_sizes,
    pattern="diagonal",
    scale=1.0,
):
    """Computes softmax(scale * q k^T, masked) v for every head, with all (B, H, L, L) scores.

    All arithmetic is float32, or float64 for float64 inputs.

    Args:
      q, k, v: (B, L, H, D) each, floating point.
      block_sizes: lengths of the consecutive blocks, positive ints; their sum is L.
      pattern: "diagonal" (own block) or "causal" (own and earlier blocks).
      scale: factor of the scores.

    Returns:
      (B, L, H, D), dtype of q.

    Raises:
      ValueError: the pattern is unknown.
    """
    mask = block_mask(block_sizes, pattern)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # The default precision rounds float32 operands on TPUs and recent GPUs.
    highest = jax.lax.Precision.HIGHEST
    q_wide, k_wide, v_wide = (x.astype(wide) for x in (q, k, v))
    scores = jnp.einsum("BlHD,BmHD->BHlm", q_wide, k_wide, precision=highest) * scale
    probabilities = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("BHlm,BmHD->BlHD", probabilities, v_wide, precision=highest).astype(q.dtype)
