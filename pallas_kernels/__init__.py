"""Attention over a sequence of blocks (the scales of a picture), computing only the score cells that its mask keeps."""

from pallas_kernels.api import block_attention

__all__ = ["block_attention"]
