"""Attention over a sequence of blocks, such as the scales of an image.

Only the scores that the mask keeps are computed, forward and backward. `block_attention` is the
public function, in implementations for TPUs, NVIDIA GPUs and plain JAX;
`pallas_kernels.reference.dense_attention` is its definition.
"""

from pallas_kernels.api import block_attention

__all__ = ["block_attention"]
