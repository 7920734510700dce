"""FLOPs of a training step, counted by hand from the shapes.

For model FLOPs utilization (MFU, arXiv 2204.02311, appendix B). Counted are matrix products over
tokens, and attention over the pairs that its pattern keeps; a multiply-add is two FLOPs. The
backward pass of a product is two products. That of attention, which computes its scores again, is
five products where the forward pass has two. Not counted: what rematerialization computes again,
and the encoding of images to tokens.

Letters: L tokens, C width, Z channels of the code, V codebook entries.
"""

from hmar_jax.families.hmar.transformer import TransformerConfig

_PRODUCT, _ATTENTION = 2, 2.5  # FLOPs of the backward pass / those of the forward pass


def attention_cells(config: TransformerConfig) -> int:
    """Pairs of query and key that the pattern keeps, in one head."""
    lengths, offsets = config.scale_list.lengths, config.scale_list.offsets
    return sum(
        l * (offsets[k + 1] if config.pattern == "causal" else l) for k, l in enumerate(lengths)
    )


def block_forward(config: TransformerConfig) -> tuple[float, float]:
    """FLOPs of one block for one image: of matrix products and of attention."""
    length, width = config.scale_list.length, config.width
    modulation = 0 if config.shared_adaln else 2 * 6 * width**2
    products = 2 * length * width**2 * (4 + 2 * config.mlp_ratio) + modulation
    return products, 4 * attention_cells(config) * width


def ends_forward(config: TransformerConfig) -> tuple[float, float]:
    """FLOPs for one image: of the word embedding, and of the head with its modulation."""
    length, width = config.scale_list.length, config.width
    return (
        2 * length * config.z_channels * width,
        2 * length * width * config.vocab_size + 4 * width**2,
    )


def next_scale_step(config: TransformerConfig) -> float:
    """FLOPs of forward and backward pass of stage 1, for one image."""
    products, attention = block_forward(config)
    words, head = ends_forward(config)
    return (1 + _PRODUCT) * (config.depth * products + words + head) + (
        1 + _ATTENTION
    ) * config.depth * attention


def masked_step(config: TransformerConfig, masked_depth: int) -> float:
    """FLOPs of forward and backward pass of stage 2, for one image.

    The frozen blocks have no parameter gradient, but the gradient of the mask embedding at the
    input passes through them.

    Args:
      masked_depth: M, blocks that are trained.
    """
    products, attention = block_forward(config)
    words, head = ends_forward(config)
    frozen = (1 + _PRODUCT / 2) * (config.depth - masked_depth) * products
    frozen += 2 * words  # both inputs of a position
    trained = (1 + _PRODUCT) * (masked_depth * products + head)
    return frozen + trained + (1 + _ATTENTION) * config.depth * attention
