"""Convolutional encoder and decoder, and the blocks that they consist of.

The networks around the latents of VQGAN (arXiv 2012.09841, appendix A), which VAR's tokenizer
(arXiv 2404.02905) uses: residual blocks with group normalization, and single-head attention at
the coarsest level. Nothing here knows what becomes of the features.

Letters: B images, h w sides of an image, S side of the features, Z channels of the features,
C channels of a layer. Arrays are channels-last.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hmar_jax.errors import InputError
from hmar_jax.parallel.sharding import constrain_batch
from hmar_jax.settings import Settings, setting

DTYPES = ("float32", "bfloat16", "float16")
_LARGEST = 2**20  # of every size


@dataclasses.dataclass(frozen=True)
class ConvNetConfig(Settings):
    """Sizes of an encoder and its decoder. The defaults are VAR's (16 pixels a token)."""

    channels: int = setting(160, "Channels of the finest level.", at_least=1, at_most=_LARGEST)
    channel_multipliers: tuple[int, ...] = setting(
        (1, 1, 2, 2, 4),
        "Channels of each level relative to the finest, finest first; a level halves the side.",
        at_least=1,
        at_most=_LARGEST,
    )
    num_res_blocks: int = setting(
        2,
        "Residual blocks of each level of the encoder; the decoder has one more.",
        at_least=0,
        at_most=_LARGEST,
    )
    patch_size: int = setting(
        1,
        "Side of the pixel patches that are folded into channels before the first convolution; "
        "compute falls with its square.",
        at_least=1,
        at_most=_LARGEST,
    )
    attention: bool = setting(True, "Self-attention in the coarsest level and in the middle.")
    groups: int = setting(
        32,
        "Groups of each group normalization. Keep 4 channels a group or more: with one channel a "
        "group the means of the channels are lost.",
        at_least=1,
        at_most=_LARGEST,
    )
    dropout: float = setting(
        0.0, "Dropout rate in residual blocks.", at_least=0, at_most=1, extendable=True
    )
    dtype: str = setting(
        "float32",
        "Type that convolutions compute in; parameters are float32.",
        choices=DTYPES,
        extendable=True,
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.channel_multipliers:
            raise InputError("channel_multipliers must have at least one level; got ()")
        for multiplier in self.channel_multipliers:
            channels = self.channels * multiplier
            if channels % self.groups:
                raise InputError(
                    f"groups must divide the channels of every level; got groups={self.groups} and "
                    f"{channels} channels (channels={self.channels} x multiplier {multiplier})"
                )

    @property
    def pixels_per_token(self) -> int:
        """Side of the square of pixels that one position of the features stands for."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)


class Encoder(nn.Module):
    """Images to features."""

    config: ConvNetConfig
    out_channels: int  # Z

    @nn.compact
    def __call__(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
        """(B, h, w, 3) in [-1, 1] -> (B, S, S, Z) of the config's dtype."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        coarsest = len(c.channel_multipliers) - 1
        block = lambda channels, name: ResBlock(channels, c.groups, c.dropout, dtype, name=name)
        x = conv3x3(c.channels, "conv_in", dtype)(fold(images, c.patch_size).astype(dtype))
        for i, multiplier in enumerate(c.channel_multipliers):
            for j in range(c.num_res_blocks):
                x = block(c.channels * multiplier, f"down_{i}_block_{j}")(x, deterministic)
                if c.attention and i == coarsest:
                    x = AttnBlock(c.groups, dtype, name=f"down_{i}_attn_{j}")(x)
            if i != coarsest:
                x = conv3x3(
                    x.shape[-1],
                    f"down_{i}_downsample",
                    dtype,
                    strides=2,
                    padding=((0, 1), (0, 1)),  # at the bottom and the right only
                )(x)
        x = block(x.shape[-1], "mid_block_1")(x, deterministic)
        if c.attention:
            x = AttnBlock(c.groups, dtype, name="mid_attn")(x)
        x = block(x.shape[-1], "mid_block_2")(x, deterministic)
        x = nn.silu(group_norm(c.groups, "norm_out", dtype)(x))
        return conv3x3(self.out_channels, "conv_out", dtype)(x)


class Decoder(nn.Module):
    """Features to images."""

    config: ConvNetConfig

    @nn.compact
    def __call__(self, features: jax.Array, deterministic: bool = True) -> jax.Array:
        """(B, S, S, Z) -> (B, h, w, 3) of the config's dtype, not clipped."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        coarsest = len(c.channel_multipliers) - 1
        block = lambda channels, name: ResBlock(channels, c.groups, c.dropout, dtype, name=name)
        x = conv3x3(c.channels * c.channel_multipliers[coarsest], "conv_in", dtype)(
            features.astype(dtype)
        )
        x = block(x.shape[-1], "mid_block_1")(x, deterministic)
        if c.attention:
            x = AttnBlock(c.groups, dtype, name="mid_attn")(x)
        x = block(x.shape[-1], "mid_block_2")(x, deterministic)
        for i in range(coarsest, -1, -1):
            channels = c.channels * c.channel_multipliers[i]
            for j in range(c.num_res_blocks + 1):
                x = block(channels, f"up_{i}_block_{j}")(x, deterministic)
                if c.attention and i == coarsest:
                    x = AttnBlock(c.groups, dtype, name=f"up_{i}_attn_{j}")(x)
            if i:
                x = x.repeat(2, axis=1).repeat(2, axis=2)  # nearest neighbour
                x = conv3x3(x.shape[-1], f"up_{i}_upsample", dtype)(x)
        x = nn.silu(group_norm(c.groups, "norm_out", dtype)(x))
        return unfold(conv3x3(3 * c.patch_size**2, "conv_out", dtype)(x), c.patch_size)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, norm, SiLU, dropout, convolution; plus the input.

    The input passes a 1x1 convolution where the number of channels changes.
    """

    channels: int
    groups: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """(B, s, s, C) -> (B, s, s, channels)."""
        h = nn.silu(group_norm(self.groups, "norm1", self.dtype)(x))
        h = conv3x3(self.channels, "conv1", self.dtype)(h)
        h = nn.silu(group_norm(self.groups, "norm2", self.dtype)(h))
        h = nn.Dropout(self.dropout)(h, deterministic=deterministic)
        h = conv3x3(self.channels, "conv2", self.dtype)(h)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, name="shortcut", dtype=self.dtype)(x)
        return x + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, after a norm; plus the input.

    softmax(q k^T / sqrt(C)) v, then a projection. One matrix makes [q | k | v].
    """

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, s, s, C) -> the same."""
        batch, height, width, channels = x.shape
        h = group_norm(self.groups, "norm", self.dtype)(x).reshape(batch, height * width, channels)
        qkv = nn.Dense(3 * channels, name="qkv", dtype=self.dtype)(h)
        q, k, v = jnp.split(qkv, 3, axis=-1)  # (B, s^2, C) each
        # jax.nn.dot_product_attention gives the same numbers, but its axis of heads, of length 1
        # here, makes it 1.3 to 1.8 times slower on CPU (jax 0.10).
        scores = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * channels**-0.5).astype(self.dtype)  # (B, s^2, s^2)
        h = jnp.einsum("bqk,bkc->bqc", weights, v)
        return x + nn.Dense(channels, name="proj", dtype=self.dtype)(h).reshape(x.shape)


def conv3x3(
    channels: int,
    name: str | None,
    dtype: Any,
    strides: int = 1,
    padding: tuple = ((1, 1), (1, 1)),
) -> nn.Conv:
    """A 3x3 convolution that keeps the side, unless strides or padding are given."""
    return nn.Conv(channels, (3, 3), strides, padding=padding, name=name, dtype=dtype)


def group_norm(groups: int, name: str, dtype: Any) -> Callable[[jax.Array], jax.Array]:
    """Group normalization (arXiv 1803.08494) of (B, s, s, C)."""
    # Not the fast variance E[x^2] - E[x]^2: it cancels in float32.
    norm = nn.GroupNorm(groups, epsilon=1e-6, name=name, dtype=dtype, use_fast_variance=False)
    # Kernels that are divided over output channels would leave parts of groups on each device, and
    # the gradients would be copied between devices.
    return lambda x: norm(constrain_batch(x))


def fold(x: jax.Array, patch: int) -> jax.Array:
    """Pixel patches to channels: (B, h, w, c) -> (B, h/patch, w/patch, c patch^2)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.swapaxes(2, 3).reshape(batch, height // patch, width // patch, -1)


def unfold(x: jax.Array, patch: int) -> jax.Array:
    """The inverse of fold: (B, h, w, c patch^2) -> (B, h patch, w patch, c)."""
    batch, height, width, _ = x.shape
    x = x.reshape(batch, height, width, patch, patch, -1)
    return x.swapaxes(2, 3).reshape(batch, height * patch, width * patch, -1)
