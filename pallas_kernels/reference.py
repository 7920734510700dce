"""The plain definition of block attention: every score is computed, then a boolean mask is applied.

The other files compute the same function and skip what the mask removes; tests and benchmarks compare them with it.
Two masks: "diagonal", where a token attends to its own block (HMAR, arXiv 2506.04421, its section on block-diagonal
attention), and "causal", where it attends to its own and all earlier blocks (VAR, arXiv 2404.02905, block-causal mask).

Letters: B batch, L all tokens, H heads, D head dim; l and m number the queries and the keys.
"""

import jax
import jax.numpy as jnp
import numpy as np

PATTERNS = ("diagonal", "causal")


def block_mask(block_sizes, pattern):
    """Which key (column) each query (row) attends to.

    Args:
      block_sizes: lengths of the consecutive blocks; L is their sum.
      pattern: "diagonal" (own block) or "causal" (own and earlier blocks).

    Returns:
      (L, L) bool. Every row holds at least its own token.

    Raises:
      ValueError: the pattern is unknown.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}; got {pattern!r}")
    block = np.repeat(np.arange(len(block_sizes)), block_sizes)
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
    """softmax(scale * q k^T, over the keys the mask keeps) v, for every head, in (B, H, L, L) scores.

    All arithmetic is float32, or float64 for float64 inputs.

    Returns:
      (B, L, H, D), dtype of q.

    Raises:
      ValueError: the pattern is unknown.
    """
    mask = block_mask(block_sizes, pattern)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    highest = (
        jax.lax.Precision.HIGHEST
    )  # the default rounds float32 operands on TPUs and recent GPUs
    q_wide, k_wide, v_wide = (x.astype(wide) for x in (q, k, v))
    scores = jnp.einsum("BlHD,BmHD->BHlm", q_wide, k_wide, precision=highest) * scale
    probabilities = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("BHlm,BmHD->BlHD", probabilities, v_wide, precision=highest).astype(q.dtype)
