"""Adversarial losses of a tokenizer, and their weight.

Hinge losses (Geometric GAN, arXiv 1705.02894, section 3) on the logits of a patch discriminator, and the adaptive
weight of VQGAN (arXiv 2012.09841, equations 6 and 7): the adversarial loss is scaled so that, where the decoder ends,
its gradient is as long as that of the reconstruction loss.

A training step needs the two gradients apart there, and only there. Differentiate both losses with respect to the
images, which does not touch the decoder, and pull them back:

    images, pull_back = jax.vjp(paint, params)  # paint(params) -> images (B, h, w, 3)
    rec = jax.grad(reconstruction_loss)(images)  # (B, h, w, 3)
    gan = jax.grad(lambda images: hinge_generator_loss(discriminate(images)))(images)  # (B, h, w, 3)
    last = lambda cotangent: pull_back(cotangent)[0]["decoder"]["conv_out"]["kernel"]
    weight = adaptive_weight(last(rec), last(gan))
    (grads,) = pull_back(rec + weight * gan)

Under jit, the weight costs one backward convolution for each loss: of the first two pull-backs XLA drops all that
leads to other parameters, and the third is needed anyway (tests/test_adversarial.py counts). Outside jit it costs two
backward passes. Losses that do not see the images (the quantizer's) are further outputs of paint: their cotangent
is 0 in `last`, and their weight in the third.
"""

import jax
import jax.numpy as jnp


def hinge_discriminator_loss(real_logits, fake_logits):
    """mean max(0, 1 - real) + mean max(0, 1 + fake), a scalar; least when real >= 1 and fake <= -1.

    Logits of any shapes; the two may differ. VQGAN's published code takes half of it.
    """
    return jnp.mean(jax.nn.relu(1 - real_logits)) + jnp.mean(jax.nn.relu(1 + fake_logits))


def hinge_generator_loss(fake_logits):
    """-mean fake, a scalar; logits of any shape."""
    return -jnp.mean(fake_logits)


def adaptive_weight(rec_grad, gan_grad, max_weight: float = 1e4, eps: float = 1e-4):
    """|rec_grad| / (|gan_grad| + eps), at most max_weight: the weight of the adversarial loss (VQGAN, equation 7).

    A constant to differentiation. Multiply it by the discriminator's own factor, 0 until the reconstruction is worth
    judging. The defaults are those of VQGAN's published code; its paper writes eps = 1e-6 and no maximum.

    Args:
      rec_grad: gradient of the reconstruction loss, perceptual distance included, with respect to the decoder's last
        kernel; an array, or a tree of arrays.
      gan_grad: gradient of the generator's adversarial loss with respect to the same, same shapes. Both over the whole
        batch: inside shard_map, reduce them over the shards first.

    Returns:
      A float32 scalar. NaN, if a gradient has one.
    """
    return jnp.minimum(_norm(rec_grad) / (_norm(gan_grad) + eps), max_weight)


def _norm(tree):
    """The length of all arrays of a tree as one vector, float32."""
    leaves = [jax.lax.stop_gradient(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in leaves))
