"""The patch discriminator: shapes, receptive field, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hmar_jax.autoencoders.discriminator import PatchDiscriminator
from hmar_jax.autoencoders.losses import hinge_discriminator_loss
from hmar_jax.errors import InputError

TINY = dict(channels=8, groups=4)


@pytest.mark.parametrize(
    "height, width, num_layers, grid",
    [
        (256, 256, 3, (30, 30)),  # pix2pix
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
    "options, side, message",
    [
        (dict(num_layers=3), 23, "num_layers=3 needs images of side 24 or more; got side 23"),
        (dict(num_layers=4), 32, "num_layers=4 needs images of side 48 or more; got side 32"),
        (dict(num_layers=0), 32, "num_layers must be 1 or more; got 0"),
        (dict(channels=24), 32, "must divide twice its channels; got groups=32 and channels=24"),
    ],
)
def test_invalid_sizes(options, side, message):
    images = jnp.zeros((1, side, side, 3))
    with pytest.raises(InputError, match=message) as error:
        jax.eval_shape(PatchDiscriminator(**options).init, jax.random.key(0), images)
    assert "\n" not in str(error.value)


def random_like(shapes, scale=0.3):
    """Normal arrays of these shapes: saves compiling an init."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype), shapes
    )


def noise(side, batch, seed=0):
    return jnp.asarray(
        np.random.default_rng(seed).uniform(-1, 1, (batch, side, side, 3)), jnp.float32
    )


def test_logits_depend_on_their_own_image_only():
    model = PatchDiscriminator(**TINY, num_layers=1)
    images = noise(32, 3)
    apply = jax.jit(model.apply)
    params = random_like(jax.eval_shape(model.init, jax.random.key(0), images))
    logits, others = apply(params, images), apply(params, images.at[::2].set(0.5))
    assert not np.allclose(logits[0], others[0], atol=1e-2)
    np.testing.assert_array_equal(logits[1], others[1])


@pytest.mark.parametrize("num_layers, pixels", [(1, 16), (2, 34), (3, 70)])
def test_pixels_seen_by_a_logit(monkeypatch, num_layers, pixels):
    monkeypatch.setattr(
        "hmar_jax.autoencoders.discriminator.group_norm", lambda *_: lambda x: x
    )  # with norms a logit depends on all pixels, a little
    model = PatchDiscriminator(**TINY, num_layers=num_layers)
    images = jnp.ones((1, 96, 96, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01), shapes)
    middle = jax.jit(
        jax.grad(lambda x: (l := model.apply(params, x))[0, l.shape[1] // 2, l.shape[2] // 2, 0])
    )(images)
    assert np.count_nonzero(middle[0].any(axis=(1, 2))) == pixels


def test_learns_to_distinguish_textures():
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
