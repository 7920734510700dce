"""Losses of autoencoders: hinge losses, their adaptive weight, straight-through gradients, PSNR."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.autoencoders.discriminator import PatchDiscriminator
from hmar_jax.autoencoders.layers import conv3x3, unfold
from hmar_jax.autoencoders.losses import (
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
    psnr,
    straight_through,
)
from tests.conftest import relative
from tests.test_discriminator import TINY, noise, random_like


def test_hinge_losses():
    real, fake = jnp.array([[2.0, 0.5], [-1.0, 1.0]]), jnp.array([-3.0, 0.0, 1.0])
    assert float(hinge_discriminator_loss(real, fake)) == pytest.approx(
        (0 + 0.5 + 2 + 0) / 4 + (0 + 1 + 2) / 3
    )
    assert float(hinge_generator_loss(fake)) == pytest.approx(2 / 3)
    assert float(hinge_discriminator_loss(jnp.ones(3), -jnp.ones(2))) == 0
    # Logits beyond the margin have no gradient; the generator's loss has one everywhere.
    np.testing.assert_allclose(jax.grad(hinge_discriminator_loss, 1)(real, fake), [0, 1 / 3, 1 / 3])
    np.testing.assert_allclose(jax.grad(hinge_generator_loss)(fake), [-1 / 3] * 3)


def test_adaptive_weight():
    rec, gan = jnp.array([[3.0, 0.0], [0.0, 4.0]]), jnp.array([[0.0, 2.0], [0.0, 0.0]])
    assert float(adaptive_weight(rec, gan, eps=0.5)) == pytest.approx(5 / 2.5)
    assert float(adaptive_weight({"a": rec[0], "b": rec[1]}, gan, eps=0)) == pytest.approx(5 / 2)
    assert float(adaptive_weight(rec, gan, max_weight=1.5)) == 1.5
    assert float(adaptive_weight(rec, 0 * gan)) == 1e4  # 5 / 1e-4, clipped
    assert float(adaptive_weight(0 * rec, 0 * gan)) == 0
    assert np.isnan(adaptive_weight(jnp.nan * rec, gan))  # the maximum does not hide it
    for grad in jax.grad(lambda r, g: adaptive_weight(r, g) * g.sum(), (0, 1))(rec, 0 * gan):
        assert np.isfinite(grad).all()
    np.testing.assert_array_equal(jax.grad(adaptive_weight)(rec, gan), 0)


class TinyDecoder(nn.Module):
    """Few layers, the last ones as in the tokenizer's decoder."""

    @nn.compact
    def __call__(self, x):
        """(B, 8, 8, 4) -> (B, 16, 16, 3)."""
        x = nn.silu(conv3x3(8, "conv_in", jnp.float32)(x))
        return unfold(conv3x3(12, "conv_out", jnp.float32)(x), 2)


def test_a_step_with_the_adaptive_weight():
    """The step in the docstring of losses.py equals its definition, at the stated cost.

    VQGAN, equations 6 and 7.
    """
    f_hat = random_like(jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32))
    targets = noise(side=16, batch=2)
    discriminator = PatchDiscriminator(**TINY, num_layers=1)
    frozen = random_like(jax.eval_shape(discriminator.init, jax.random.key(0), targets))
    params = random_like(jax.eval_shape(TinyDecoder().init, jax.random.key(0), f_hat))
    decode = lambda params: TinyDecoder().apply(params, f_hat)
    rec_loss = lambda images: jnp.mean(jnp.abs(images - targets))
    gan_loss = lambda images: hinge_generator_loss(discriminator.apply(frozen, images))
    kernel_of = lambda grads: grads["params"]["conv_out"]["kernel"]

    def step(params, fixed_weight=None):
        images, pull_back = jax.vjp(decode, params)
        rec, gan = jax.grad(rec_loss)(images), jax.grad(gan_loss)(images)
        last = lambda cotangent: kernel_of(pull_back(cotangent)[0])
        weight = adaptive_weight(last(rec), last(gan)) if fixed_weight is None else fixed_weight
        (grads,) = pull_back(rec + weight * gan)
        return weight, grads

    @jax.jit
    def reference(params):
        rec = jax.grad(lambda p: rec_loss(decode(p)))(params)
        gan = jax.grad(lambda p: gan_loss(decode(p)))(params)
        weight = jnp.linalg.norm(kernel_of(rec).ravel()) / (
            jnp.linalg.norm(kernel_of(gan).ravel()) + 1e-4
        )
        return weight, jax.tree.map(lambda r, g: r + weight * g, rec, gan)

    compiled = jax.jit(step).lower(params).compile()
    (weight, grads), (expected_weight, expected_grads) = compiled(params), reference(params)
    assert 0 < float(weight) < 1e4
    assert float(weight) == pytest.approx(float(expected_weight), rel=1e-4)
    flat = lambda tree: jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    assert relative(flat(grads), flat(expected_grads)) < 1e-4

    if jax.default_backend() == "cpu":  # other backends rename convolutions
        without_weight = jax.jit(step).lower(params, 0.5).compile()
        convolutions = lambda program: program.as_text().count(" convolution(")
        assert convolutions(compiled) == convolutions(without_weight) + 2


def test_straight_through():
    f_hat, f = jnp.array([1.0, 2.0]), jnp.array([0.5, 2.5])
    np.testing.assert_array_equal(straight_through(f_hat, f), f_hat)
    grads = jax.grad(lambda *x: straight_through(*x) @ jnp.array([3.0, 5.0]), (0, 1))(f_hat, f)
    np.testing.assert_array_equal(grads, [[0, 0], [3, 5]])


def test_psnr():
    a = jnp.zeros((4, 4, 3))
    assert np.isclose(psnr(a + 0.2, a), 20.0, atol=1e-4)  # the range is 2: 10 log10(4 / 0.04)
    assert np.isclose(psnr(a, a), 10 * np.log10(4e10), rtol=1e-5)  # equal images: finite
    assert psnr(a + 3, a + 1) == psnr(a, a)  # clipped to the range
