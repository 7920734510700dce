"""Patch discriminator: real or painted, answered for every patch of a image.

The PatchGAN of pix2pix (arXiv 1611.07004, sections 3.2.2 and 6.1), which VQGAN (arXiv 2012.09841) trains its
tokenizer with. It judges texture; the whole image is the reconstruction loss's business. Used in training only,
with the losses in training/adversarial.py.

Differs from the paper in the normalisation, which is GroupNorm instead of BatchNorm. GroupNorm looks at one image
at a time: there are no running statistics to keep or save, real and painted images may share a call or not, and no
shard of a batch asks another for its statistics. The price is that a patch's logit knows, through the normalisation,
a little of its whole image.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from hmar_jax.autoencoders.vq import group_norm
from hmar_jax.errors import InputError

_SLOPE = 0.2  # of LeakyReLU (pix2pix, section 6.1)
_MAX_MULTIPLIER = 8  # channels double at each layer until C512 (pix2pix, section 6.1.2)
_INIT = nn.initializers.normal(0.02)  # pix2pix, section 6.2


class PatchDiscriminator(nn.Module):
    """4x4 convolutions: `num_layers` of stride 2, then two of stride 1, of which the last gives the logits.

    A logit sees 16, 34, 70, 142 pixels for 1, 2, 3, 4 layers; 70 is pix2pix's and VQGAN's choice for 256 pixels. The
    first convolution has no norm.
    """

    channels: int = 64  # of the first layer
    num_layers: int = 3  # of stride 2
    groups: int = 32  # of GroupNorm; divides 2 channels
    dtype: Any = jnp.float32  # of the convolutions; parameters and logits are float32

    @nn.compact
    def __call__(self, images):
        """(B, h, w, 3) in [-1, 1] -> logits (B, h', w', 1) float32, h' = floor(h / 2^num_layers) - 2; high means real.

        Raises:
          InputError: groups do not divide the channels, or the images are too small for num_layers.
        """
        self._check(min(images.shape[1:3]))
        x = nn.leaky_relu(
            self._conv(self.channels, "conv_in", 2)(images.astype(self.dtype)), _SLOPE
        )
        for i in range(1, self.num_layers + 1):
            strides = 2 if i < self.num_layers else 1
            x = self._conv(self.channels * min(2**i, _MAX_MULTIPLIER), f"conv_{i}", strides)(x)
            x = nn.leaky_relu(group_norm(self.groups, f"norm_{i}", self.dtype)(x), _SLOPE)
        return self._conv(1, "conv_out", 1)(x).astype(jnp.float32)

    def _conv(self, channels, name, strides):
        return nn.Conv(
            channels,
            (4, 4),
            strides,
            padding=((1, 1), (1, 1)),
            kernel_init=_INIT,
            name=name,
            dtype=self.dtype,
        )

    def _check(self, side):
        if self.num_layers < 1:
            raise InputError(
                f"num_layers={self.num_layers}: a discriminator has 1 layer of stride 2 or more"
            )
        if 2 * self.channels % self.groups:  # the other widths are multiples of this one
            raise InputError(
                f"groups={self.groups} does not divide {2 * self.channels} channels (twice channels)"
            )
        needed = 3 * 2**self.num_layers  # each of the two last convolutions takes one off the side
        if side < needed:
            raise InputError(
                f"images of side {side} are too small for num_layers={self.num_layers}: "
                f"it needs side {needed} or more"
            )
