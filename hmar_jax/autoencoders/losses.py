"""Losses of autoencoders: quantizer, adversarial losses and their weight; PSNR.

VAR (arXiv 2404.02905) uses the losses of VQGAN (arXiv 2012.09841) and published no training code.
Section 3.1 and equations 1 to 7 of VQGAN are what is computed here. The perceptual loss is in
perceptual.py.

The adversarial losses are hinge losses (Geometric GAN, arXiv 1705.02894, section 3) on the logits
of a patch discriminator. VQGAN's adaptive weight (equations 6 and 7) scales them so that at the
decoder's last layer their gradient is as long as that of the reconstruction loss. A training step
needs the two gradients apart at that layer only. It differentiates both losses with respect to
the images, which does not touch the decoder, and pulls them back:

    images, pull_back = jax.vjp(decode, params)  # decode(params) -> images (B, h, w, 3)
    rec = jax.grad(reconstruction_loss)(images)  # (B, h, w, 3)
    gan = jax.grad(lambda x: hinge_generator_loss(discriminate(x)))(images)  # (B, h, w, 3)
    last = lambda cotangent: pull_back(cotangent)[0]["decoder"]["conv_out"]["kernel"]
    weight = adaptive_weight(last(rec), last(gan))
    (grads,) = pull_back(rec + weight * gan)

Under jit the weight costs one backward convolution for each loss: XLA drops all of the first two
pull-backs that leads to other parameters, and the third is needed anyway. (A test counts
convolutions.) Outside jit it costs two backward passes. Losses that do not depend on the images
(the quantizer's) are further outputs of `decode`: their cotangent is 0 in `last`, and their
weight in the last pull-back.

Letters: B images, h w sides of an image, S side of the features, Z channels of the code, K scales.
"""

from typing import Any

import jax
import jax.numpy as jnp


def quantizer_loss(f_hats: jax.Array, f: jax.Array, beta: float) -> jax.Array:
    """Codebook and commitment loss of the residual quantizer.

    Of VQ-VAE (arXiv 1711.00937, equation 3), at every scale.

    Args:
      f_hats: (K, B, S, S, Z) running sum after each scale.
      f: (B, S, S, Z) features.
      beta: weight of the commitment term.

    Returns:
      The mean over k of beta mse(sg(f_hat_k), f) + mse(f_hat_k, sg(f)), where sg stops gradients.
    """
    stop = jax.lax.stop_gradient
    return beta * jnp.mean((stop(f_hats) - f) ** 2) + jnp.mean((f_hats - stop(f)) ** 2)


def straight_through(f_hat: jax.Array, f: jax.Array) -> jax.Array:
    """f_hat in the forward pass, the identity to f in the backward pass; both (B, S, S, Z)."""
    return f + jax.lax.stop_gradient(f_hat - f)


def hinge_discriminator_loss(real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
    """mean max(0, 1 - real) + mean max(0, 1 + fake), a scalar.

    Least where real >= 1 and fake <= -1. The logits may have any shapes, also two different ones.
    VQGAN's published code takes half of this loss.
    """
    return jnp.mean(jax.nn.relu(1 - real_logits)) + jnp.mean(jax.nn.relu(1 + fake_logits))


def hinge_generator_loss(fake_logits: jax.Array) -> jax.Array:
    """-mean fake, a scalar; logits of any shape."""
    return -jnp.mean(fake_logits)


def adaptive_weight(
    rec_grad: Any, gan_grad: Any, max_weight: float = 1e4, eps: float = 1e-4
) -> jax.Array:
    """|rec_grad| / (|gan_grad| + eps), at most max_weight: the weight of the adversarial loss.

    VQGAN, equation 7. Multiply it by a factor that is 0 until reconstructions are good enough for
    the discriminator to be useful. The defaults are those of VQGAN's published code; its paper
    has eps = 1e-6 and no maximum. Gradients are stopped: the weight is a constant.

    Args:
      rec_grad: gradient of the reconstruction loss, perceptual loss included, with respect to the
        decoder's last kernel: an array or a tree of arrays.
      gan_grad: gradient of the generator's adversarial loss with respect to the same, same
        shapes. Both are means over the whole batch: inside shard_map, reduce them over the shards
        first.

    Returns:
      A float32 scalar; NaN if a gradient has one.
    """
    return jnp.minimum(_norm(rec_grad) / (_norm(gan_grad) + eps), max_weight)


def psnr(reconstructions: jax.Array, images: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB, a scalar; images of any shape in [-1, 1].

    Reconstructions are clipped to the range. Finite for equal images.
    """
    error = jnp.mean((reconstructions.clip(-1, 1) - images) ** 2)
    return 10 * jnp.log10(4 / error.clip(1e-10))


def _norm(tree: Any) -> jax.Array:
    """The length of all arrays of a tree as one vector, float32."""
    leaves = [jax.lax.stop_gradient(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in leaves))
