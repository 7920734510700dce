"""The patch discriminator, the hinge losses and their adaptive weight."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hmar_jax.autoencoders.adversarial import (
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from hmar_jax.autoencoders.discriminator import PatchDiscriminator
from hmar_jax.autoencoders.vq import conv3x3, unfold
from hmar_jax.errors import InputError
from tests.conftest import relative

TINY = dict(channels=8, groups=4)


@pytest.mark.parametrize(
    "height, width, num_layers, grid",
    [
        (256, 256, 3, (30, 30)),  # the paper's
        (64, 64, 3, (6, 6)),
        (32, 32, 3, (2, 2)),
        (32, 32, 1, (14, 14)),
        (24, 49, 3, (1, 4)),
        (96, 96, 5, (1, 1)),
    ],
)
def test_logits_per_patch(height, width, num_layers, grid):
    model = PatchDiscriminator(num_layers=num_layers)
    images = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
    logits, params = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert logits.shape == (2, *grid, 1)
    assert params["params"]["conv_out"]["kernel"].shape == (4, 4, 64 * min(2**num_layers, 8), 1)


def test_bfloat16_keeps_float32_parameters_and_logits():
    model = PatchDiscriminator(**TINY, dtype=jnp.bfloat16)
    logits, params = jax.eval_shape(
        model.init_with_output, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, params))} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "options, side, words",
    [
        (dict(num_layers=3), 23, ["side 23", "num_layers=3", "side 24"]),
        (dict(num_layers=4), 32, ["side 32", "num_layers=4", "side 48"]),
        (dict(num_layers=0), 32, ["num_layers=0"]),
        (dict(channels=24), 32, ["groups=32", "48 channels"]),
    ],
)
def test_what_does_not_fit_is_named(options, side, words):
    with pytest.raises(InputError) as error:
        jax.eval_shape(
            PatchDiscriminator(**options).init, jax.random.key(0), jnp.zeros((1, side, side, 3))
        )
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def drawn(shapes, scale=0.3):
    """Normal arrays of the shapes: saves compiling an init."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype), shapes
    )


def noise(side, batch, seed=0):
    return jnp.asarray(
        np.random.default_rng(seed).uniform(-1, 1, (batch, side, side, 3)), jnp.float32
    )


def test_no_image_changes_the_logits_of_another():
    model = PatchDiscriminator(**TINY, num_layers=1)
    images = noise(32, 3)
    apply = jax.jit(model.apply)
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), images))
    logits, others = apply(params, images), apply(params, images.at[::2].set(0.5))
    assert not np.allclose(logits[0], others[0], atol=1e-2)
    np.testing.assert_array_equal(logits[1], others[1])


@pytest.mark.parametrize("num_layers, pixels", [(1, 16), (2, 34), (3, 70)])
def test_pixels_seen_by_a_logit(monkeypatch, num_layers, pixels):
    monkeypatch.setattr(
        "hmar_jax.autoencoders.discriminator.group_norm", lambda *_: lambda x: x
    )  # else all, a little
    model = PatchDiscriminator(**TINY, num_layers=num_layers)
    images = jnp.ones((1, 96, 96, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01), shapes)
    middle = jax.jit(
        jax.grad(lambda x: (l := model.apply(params, x))[0, l.shape[1] // 2, l.shape[2] // 2, 0])
    )(images)
    assert np.count_nonzero(middle[0].any(axis=(1, 2))) == pixels


def test_learns_to_tell_textures_apart():
    """Twenty steps separate noise from noise in 4x4 blocks: the same colours, another texture."""
    model, optimizer = PatchDiscriminator(**TINY, num_layers=1), optax.adam(1e-2)

    @jax.jit
    def step(params, state, real, fake):
        def loss_of(params):
            logits = model.apply(params, real), model.apply(params, fake)
            return hinge_discriminator_loss(*logits), logits

        (loss, logits), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss, logits

    params = jax.jit(model.init)(jax.random.key(0, impl="rbg"), noise(16, 4))  # rbg compiles fast
    state, losses = optimizer.init(params), []
    for i in range(20):  # new images each time
        real, fake = (
            noise(16, 4, seed=2 * i),
            noise(4, 4, seed=2 * i + 1).repeat(4, axis=1).repeat(4, axis=2),
        )
        params, state, loss, (real_logits, fake_logits) = step(params, state, real, fake)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert real_logits.mean((1, 2)).min() > 0 > fake_logits.mean((1, 2)).max()


def test_hinge_losses():
    real, fake = jnp.array([[2.0, 0.5], [-1.0, 1.0]]), jnp.array([-3.0, 0.0, 1.0])
    assert float(hinge_discriminator_loss(real, fake)) == pytest.approx(
        (0 + 0.5 + 2 + 0) / 4 + (0 + 1 + 2) / 3
    )
    assert float(hinge_generator_loss(fake)) == pytest.approx(2 / 3)
    assert float(hinge_discriminator_loss(jnp.ones(3), -jnp.ones(2))) == 0
    # Logits beyond the margin are left alone; the generator is always pushed.
    np.testing.assert_allclose(jax.grad(hinge_discriminator_loss, 1)(real, fake), [0, 1 / 3, 1 / 3])
    np.testing.assert_allclose(jax.grad(hinge_generator_loss)(fake), [-1 / 3] * 3)


def test_adaptive_weight():
    rec, gan = jnp.array([[3.0, 0.0], [0.0, 4.0]]), jnp.array([[0.0, 2.0], [0.0, 0.0]])
    assert float(adaptive_weight(rec, gan, eps=0.5)) == pytest.approx(5 / 2.5)
    assert float(adaptive_weight({"a": rec[0], "b": rec[1]}, gan, eps=0)) == pytest.approx(5 / 2)
    assert float(adaptive_weight(rec, gan, max_weight=1.5)) == 1.5
    assert float(adaptive_weight(rec, 0 * gan)) == 1e4  # 5 / 1e-4, clipped
    assert float(adaptive_weight(0 * rec, 0 * gan)) == 0
    assert np.isnan(adaptive_weight(jnp.nan * rec, gan))  # not hidden by the clipping
    for grad in jax.grad(lambda r, g: adaptive_weight(r, g) * g.sum(), (0, 1))(rec, 0 * gan):
        assert np.isfinite(grad).all()
    np.testing.assert_array_equal(jax.grad(adaptive_weight)(rec, gan), 0)


class TinyDecoder(nn.Module):
    """Ends as the tokenizer's decoder does, in few layers."""

    @nn.compact
    def __call__(self, x):
        """(B, 8, 8, 4) -> (B, 16, 16, 3)."""
        x = nn.silu(conv3x3(8, "conv_in", jnp.float32)(x))
        return unfold(conv3x3(12, "conv_out", jnp.float32)(x), 2)


def test_a_step_with_the_adaptive_weight():
    """The step in adversarial.py's docstring equals its definition (VQGAN, equations 6 and 7), at the price it says."""
    f_hat, targets = drawn(jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)), noise(side=16, batch=2)
    discriminator = PatchDiscriminator(**TINY, num_layers=1)
    judge = drawn(jax.eval_shape(discriminator.init, jax.random.key(0), targets))
    params = drawn(jax.eval_shape(TinyDecoder().init, jax.random.key(0), f_hat))
    paint = lambda params: TinyDecoder().apply(params, f_hat)
    rec_loss = lambda images: jnp.mean(jnp.abs(images - targets))
    gan_loss = lambda images: hinge_generator_loss(discriminator.apply(judge, images))
    kernel_of = lambda grads: grads["params"]["conv_out"]["kernel"]

    def step(params, fixed_weight=None):
        images, pull_back = jax.vjp(paint, params)
        rec, gan = jax.grad(rec_loss)(images), jax.grad(gan_loss)(images)
        last = lambda cotangent: kernel_of(pull_back(cotangent)[0])
        weight = adaptive_weight(last(rec), last(gan)) if fixed_weight is None else fixed_weight
        (grads,) = pull_back(rec + weight * gan)
        return weight, grads

    @jax.jit
    def defined(params):
        rec = jax.grad(lambda p: rec_loss(paint(p)))(params)
        gan = jax.grad(lambda p: gan_loss(paint(p)))(params)
        weight = jnp.linalg.norm(kernel_of(rec).ravel()) / (
            jnp.linalg.norm(kernel_of(gan).ravel()) + 1e-4
        )
        return weight, jax.tree.map(lambda r, g: r + weight * g, rec, gan)

    compiled = jax.jit(step).lower(params).compile()
    (weight, grads), (defined_weight, defined_grads) = compiled(params), defined(params)
    assert 0 < float(weight) < 1e4
    assert float(weight) == pytest.approx(float(defined_weight), rel=1e-4)
    flat = lambda tree: jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    assert relative(flat(grads), flat(defined_grads)) < 1e-4

    if jax.default_backend() == "cpu":  # others have other names for a convolution
        without_weight = jax.jit(step).lower(params, 0.5).compile()
        convolutions = lambda program: program.as_text().count(" convolution(")
        assert convolutions(compiled) == convolutions(without_weight) + 2
