"""The tokenizer against the published code's recorded numbers, and its properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.autoencoders.vq import Tokenizer, TokenizerConfig, fold, unfold
from hmar_jax.autoencoders.vq_losses import quantizer_loss
from hmar_jax.errors import InputError
from hmar_jax.families.hmar import convert
from tests.conftest import relative

SIDES = (1, 2, 3, 4, 6)


@pytest.fixture(scope="module")
def published(golden_state):
    config, params = convert.tokenizer_from_state(
        golden_state("vae", "tokenizer"), ScaleList(SIDES)
    )
    return Tokenizer(config), {"params": params}


@pytest.fixture(scope="module")
def z(load_golden):
    return load_golden("tokenizer")


def run(tokenizer, params, *args, method):
    """Compiled as one program: eager operations are compiled one by one, which takes far longer."""
    return jax.jit(lambda p, *a: tokenizer.apply(p, *a, method=method))(params, *args)


def channels_last(x):
    return np.moveaxis(x, -3, -1)


def test_encoder(published, z):
    tokenizer, params = published
    images = channels_last(z["images"])
    encoder_out = run(tokenizer, params, images, method=lambda t, x: t.encoder(x))
    assert relative(encoder_out, channels_last(z["encoder_out"])) < 2e-4
    assert relative(run(tokenizer, params, images, method="features"), channels_last(z["f"])) < 2e-4


def test_tokens_from_images(published, z):
    tokenizer, params = published
    tokens = run(tokenizer, params, channels_last(z["images"]), method="encode")
    assert np.array_equal(tokens, z["tokens_BL"])


def test_quantizer(published, z):
    tokenizer, params = published
    quantized = run(tokenizer, params, channels_last(z["f"]), method="quantize")
    assert np.array_equal(quantized.tokens, z["tokens_BL"])
    assert relative(quantized.f_hats, channels_last(z["fhat_scales"])) < 1e-5
    recon = run(tokenizer, params, quantized.tokens, method="decode")
    assert relative(recon, channels_last(z["recon"])) < 1e-4


def test_decoding_random_tokens(published, z):
    tokenizer, params = published
    f_hats = run(tokenizer, params, z["rand_tokens_BL"], method=lambda t, x: t.quantizer.f_hats(x))
    assert relative(f_hats, channels_last(z["rand_fhat_scales"])) < 1e-5
    assert (
        relative(
            run(tokenizer, params, z["rand_tokens_BL"], method="decode"),
            channels_last(z["rand_image"]),
        )
        < 1e-4
    )


def test_transformer_inputs(published, z):
    tokenizer, params = published
    assert (
        relative(run(tokenizer, params, z["tokens_BL"], method="transformer_inputs"), z["ns_input"])
        < 1e-5
    )
    assert (
        relative(run(tokenizer, params, z["tokens_BL"], method="own_scale_inputs"), z["mask_input"])
        < 1e-5
    )


def test_quantizer_loss_and_gradients(published, z):
    tokenizer, params = published
    f = channels_last(z["f"])

    def loss(params, f):
        quantized = tokenizer.apply(params, f, method="quantize")
        return quantizer_loss(quantized.f_hats, f, beta=0.25), quantized

    (value, quantized), (grad_params, grad_f) = jax.jit(
        jax.value_and_grad(loss, (0, 1), has_aux=True)
    )(params, f)
    assert relative(value, z["vq_loss"]) < 1e-5
    assert relative(quantized.f_hats[-1], channels_last(z["vq_out"])) < 1e-5
    assert relative(grad_f, channels_last(z["vq_grad_f"])) < 1e-4
    grads = grad_params["params"]["quantizer"]
    assert relative(grads["codebook"], z["vq_grad_codebook"]) < 1e-4
    for i in range(4):
        assert (
            relative(grads["phi_kernel"][i].transpose(3, 2, 0, 1), z[f"vq_grad_phi{i}_weight"])
            < 1e-4
        )
        assert relative(grads["phi_bias"][i], z[f"vq_grad_phi{i}_bias"]) < 1e-4


SMALL = TokenizerConfig(
    scales=(1, 2, 4),
    vocab_size=32,
    z_channels=8,
    channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    groups=2,
)


def everything(tokenizer, images):
    tokens = tokenizer.encode(images)
    return tokens, tokenizer.decode(tokens), tokenizer.transformer_inputs(tokens)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"attention": False, "patch_size": 2},
        {"num_phi": 0},
        {"num_phi": 1, "distance": "cosine"},
        {"scales": (2, 3), "channel_multipliers": (1, 2, 1)},
        {"scales": (3,)},
    ],
)
def test_shapes_of_other_architectures(change):
    import dataclasses

    config = dataclasses.replace(SMALL, **change)
    tokenizer, side = Tokenizer(config), config.image_side
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    # Traced, not run: compiling each of them takes far longer.
    params = jax.eval_shape(tokenizer.init, jax.random.key(1), images)
    tokens, painted, codes = jax.eval_shape(
        lambda *x: tokenizer.apply(*x, method=everything), params, images
    )
    length = config.scale_list.length
    assert tokens.shape == (2, length) and tokens.dtype == jnp.int32
    assert painted.shape == images.shape
    assert codes.shape == (2, length - config.scale_list.lengths[0], config.z_channels)


def test_fold_is_inverted():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    assert fold(x, 2).shape == (2, 2, 3, 12)
    assert np.array_equal(unfold(fold(x, 2), 2), x)
    assert np.array_equal(fold(x, 2)[0, 0, 0], x[0, :2, :2].ravel())


def test_rests_without_quantizing_explain_everything():
    """With phi the identity the pyramid of averages loses nothing: the last scale takes all that is left."""
    import dataclasses

    tokenizer = Tokenizer(dataclasses.replace(SMALL, phi_ratio=0.0))
    f = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    params = jax.jit(tokenizer.init)(jax.random.key(1), jnp.zeros((1, 8, 8, 3)))
    z = run(tokenizer, params, f, method=lambda t, f: t.quantizer.unquantized_residuals(f))
    scales = SMALL.scale_list
    h = [
        run(tokenizer, params, z[:, scales.slice(k)], method=lambda t, c, k=k: t.residual(c, k))
        for k in range(3)
    ]
    np.testing.assert_allclose(sum(h), f, atol=1e-5)


def test_bad_config():
    with pytest.raises(InputError, match="groups=3"):
        TokenizerConfig(channels=8, groups=3)
    with pytest.raises(InputError, match="distance"):
        TokenizerConfig(distance="dot")
