"""Work counted by hand, from the shapes: for model FLOPs utilisation (MFU, arXiv 2204.02311, appendix B), not from a profile.

Counted are matrix products over tokens and attention over the cells that its pattern keeps; a multiply-add is two FLOPs.
The backward pass of a product is two products; of attention, which computes its scores again, five for the forward pass's two.
What rematerialisation computes again is not counted, nor is encoding images to tokens.

Letters: L tokens, C width, Z channels of the code, V codebook.
"""

from hmar_jax.families.hmar.transformer import TransformerConfig

_PRODUCT, _ATTENTION = 2, 2.5  # backward pass, of the forward pass


def attention_cells(config: TransformerConfig) -> int:
    """Pairs of query and key that the pattern keeps, of one head."""
    lengths, offsets = config.scale_list.lengths, config.scale_list.offsets
    return sum(
        l * (offsets[k + 1] if config.pattern == "causal" else l) for k, l in enumerate(lengths)
    )


def block_forward(config: TransformerConfig) -> tuple[float, float]:
    """FLOPs of one block for one image: matrix products, attention."""
    length, width = config.scale_list.length, config.width
    modulation = 0 if config.shared_adaln else 2 * 6 * width**2
    products = 2 * length * width**2 * (4 + 2 * config.mlp_ratio) + modulation
    return products, 4 * attention_cells(config) * width


def ends_forward(config: TransformerConfig) -> tuple[float, float]:
    """FLOPs of the word embedding, and of the head with its modulation, for one image."""
    length, width = config.scale_list.length, config.width
    return (
        2 * length * config.z_channels * width,
        2 * length * width * config.vocab_size + 4 * width**2,
    )


def next_scale_step(config: TransformerConfig) -> float:
    """Forward and backward pass of stage 1, for one image."""
    products, attention = block_forward(config)
    words, head = ends_forward(config)
    return (1 + _PRODUCT) * (config.depth * products + words + head) + (
        1 + _ATTENTION
    ) * config.depth * attention


def masked_step(config: TransformerConfig, masked_depth: int) -> float:
    """Of stage 2, for one image: forward and backward through all blocks, though those below the trained ones have no
    gradient of their own: it passes through them to the mask embedding at the input."""
    products, attention = block_forward(config)
    words, head = ends_forward(config)
    passed = (1 + _PRODUCT / 2) * (
        config.depth - masked_depth
    ) * products + 2 * words  # both inputs of a position
    return (
        passed
        + (1 + _PRODUCT) * (masked_depth * products + head)
        + (1 + _ATTENTION) * config.depth * attention
    )
