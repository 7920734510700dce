"""Patch discriminator: one logit, real or reconstructed, for every patch of an image.

The PatchGAN of pix2pix (arXiv 1611.07004, sections 3.2.2 and 6.1), with which VQGAN (arXiv
2012.09841) trains its autoencoder. It scores texture; the image as a whole is left to the
reconstruction loss. It is used in training only, with the losses of losses.py.

It differs from the paper in its normalization: GroupNorm instead of BatchNorm. GroupNorm treats
each image by itself, so there are no running statistics to save, real and reconstructed images
may share a call or not, and shards of a batch exchange no statistics. The price: through the
normalization a patch's logit depends a little on the whole image.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hmar_jax.autoencoders.layers import group_norm
from hmar_jax.errors import InputError

_SLOPE = 0.2  # of LeakyReLU (pix2pix, section 6.1)
_MAX_MULTIPLIER = 8  # channels double at each layer until C512 (pix2pix, section 6.1.2)
_INIT = nn.initializers.normal(0.02)  # pix2pix, section 6.2


class PatchDiscriminator(nn.Module):
    """4x4 convolutions: `num_layers` of stride 2, then two of stride 1.

    The last one gives the logits. A logit sees 16, 34, 70, 142 pixels for 1, 2, 3, 4 layers;
    pix2pix and VQGAN use 70 for images of 256 pixels. The first convolution has no norm.
    """

    channels: int = 64  # of the first layer
    num_layers: int = 3  # of stride 2
    groups: int = 32  # of GroupNorm; divides twice the channels
    dtype: Any = jnp.float32  # of the convolutions; parameters and logits are float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """The logits of all patches; high means real.

        Args:
          images: (B, h, w, 3) in [-1, 1].

        Returns:
          (B, h', w', 1) float32, where h' = floor(h / 2^num_layers) - 2.

        Raises:
          InputError: groups do not divide the channels, or the images are too small for num_layers.
        """
        self._check(min(images.shape[1:3]))
        x = self._conv(self.channels, "conv_in", 2)(images.astype(self.dtype))
        x = nn.leaky_relu(x, _SLOPE)
        for i in range(1, self.num_layers + 1):
            strides = 2 if i < self.num_layers else 1
            x = self._conv(self.channels * min(2**i, _MAX_MULTIPLIER), f"conv_{i}", strides)(x)
            x = nn.leaky_relu(group_norm(self.groups, f"norm_{i}", self.dtype)(x), _SLOPE)
        return self._conv(1, "conv_out", 1)(x).astype(jnp.float32)

    def _conv(self, channels: int, name: str, strides: int) -> nn.Conv:
        return nn.Conv(
            channels,
            (4, 4),
            strides,
            padding=((1, 1), (1, 1)),
            kernel_init=_INIT,
            name=name,
            dtype=self.dtype,
        )

    def _check(self, side: int) -> None:
        if self.num_layers < 1:
            raise InputError(f"num_layers must be 1 or more; got {self.num_layers}")
        if 2 * self.channels % self.groups:  # the other widths are multiples of this one
            raise InputError(
                f"groups of the discriminator must divide twice its channels; "
                f"got groups={self.groups} and channels={self.channels}"
            )
        needed = 3 * 2**self.num_layers  # each of the two last convolutions takes one off the side
        if side < needed:
            raise InputError(
                f"a discriminator of num_layers={self.num_layers} needs images of side {needed} or "
                f"more; got side {side}"
            )
