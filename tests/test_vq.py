"""The VQ tokenizer against numbers recorded from the published code, and its properties."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.autoencoders import convert
from hmar_jax.autoencoders.layers import fold, unfold
from hmar_jax.autoencoders.losses import quantizer_loss
from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.autoencoders.vq import TokenizerConfig, VQAutoencoder, apply_tokenizer
from hmar_jax.errors import InputError
from hmar_jax.io.weight_files import load_state_dicts
from tests.conftest import relative

SIDES = (1, 2, 3, 4, 6)


@pytest.fixture(scope="module")
def published(golden):
    """Config and parameters of the recorded tokenizer."""
    state = load_state_dicts(golden / "vae.pth", {"tokenizer": convert.MARKER})["tokenizer"]
    return convert.tokenizer_from_state(state, ScaleList(SIDES))


@pytest.fixture(scope="module")
def z(load_golden):
    return load_golden("tokenizer")


def run(model, *arrays, method, **static):
    """apply_tokenizer as one program: compiling operations one by one takes far longer."""
    config, params = model
    apply = functools.partial(apply_tokenizer, config, method=method, **static)
    return jax.jit(apply)(params, *arrays)


def channels_last(x):
    return np.moveaxis(x, -3, -1)


# Recorded numbers


def test_features_agree_with_recorded(published, z):
    images = channels_last(z["images"])
    encoder_out = run(published, images, method=lambda t, x: t.encoder(x))
    assert relative(encoder_out, channels_last(z["encoder_out"])) < 2e-4
    assert relative(run(published, images, method="compute_features"), channels_last(z["f"])) < 2e-4


def test_encoded_images_agree_with_recorded(published, z):
    images = channels_last(z["images"])
    encoded = run(published, images, method="encode_with_features")
    assert np.array_equal(encoded.tokens, z["tokens_BL"])
    assert relative(encoded.f_hats, channels_last(z["fhat_scales"])) < 1e-5
    assert np.array_equal(run(published, images, method="encode"), z["tokens_BL"])


def test_quantizer_agrees_with_recorded(published, z):
    quantized = run(published, channels_last(z["f"]), method="quantize")
    assert np.array_equal(quantized.tokens, z["tokens_BL"])
    assert relative(quantized.f_hats, channels_last(z["fhat_scales"])) < 1e-5
    images = run(published, quantized.tokens, method="decode")
    assert relative(images, channels_last(z["recon"])) < 1e-4


def test_decoded_random_tokens_agree_with_recorded(published, z):
    tokens = z["rand_tokens_BL"]
    f_hats = run(published, tokens, method="tokens_to_f_hats")
    assert relative(f_hats, channels_last(z["rand_fhat_scales"])) < 1e-5
    images = run(published, tokens, method="decode")
    assert relative(images, channels_last(z["rand_image"])) < 1e-4


def test_transformer_inputs_agree_with_recorded(published, z):
    f_hats = run(published, z["tokens_BL"], method="tokens_to_f_hats")
    assert relative(run(published, f_hats, method="next_scale_inputs"), z["ns_input"]) < 1e-5
    features = run(published, z["tokens_BL"], method="token_features")
    assert relative(features, z["mask_input"]) < 1e-5


def test_quantizer_loss_and_gradients_agree_with_recorded(published, z):
    config, params = published
    f = channels_last(z["f"])

    def loss(params, f):
        quantized = apply_tokenizer(config, params, f, method="quantize")
        return quantizer_loss(quantized.f_hats, f, beta=0.25), quantized

    (value, quantized), (grad_params, grad_f) = jax.jit(
        jax.value_and_grad(loss, (0, 1), has_aux=True)
    )(params, f)
    assert relative(value, z["vq_loss"]) < 1e-5
    assert relative(quantized.f_hats[-1], channels_last(z["vq_out"])) < 1e-5
    assert relative(grad_f, channels_last(z["vq_grad_f"])) < 1e-4
    grads = grad_params["quantizer"]
    assert relative(grads["codebook"], z["vq_grad_codebook"]) < 1e-4
    for i in range(4):
        kernel = grads["phi_kernel"][i].transpose(3, 2, 0, 1)  # as torch has it, OIHW
        assert relative(kernel, z[f"vq_grad_phi{i}_weight"]) < 1e-4
        assert relative(grads["phi_bias"][i], z[f"vq_grad_phi{i}_bias"]) < 1e-4


# Properties

SMALL = TokenizerConfig(
    scales=(1, 2, 4),
    vocab_size=32,
    z_channels=8,
    channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    groups=2,
)


def call_all(tokenizer, images):
    encoded = tokenizer.encode_with_features(images)
    return (
        encoded,
        tokenizer.decode(encoded.tokens),
        tokenizer.next_scale_inputs(encoded.f_hats),
        tokenizer.token_features(encoded.tokens),
    )


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
    config = dataclasses.replace(SMALL, **change)
    images = jax.ShapeDtypeStruct((2, config.image_side, config.image_side, 3), jnp.float32)
    # Traced, not run: compiling each of them takes far longer.
    params = jax.eval_shape(VQAutoencoder(config).init, jax.random.key(1))
    encoded, decoded, scale_inputs, token_features = jax.eval_shape(
        lambda *x: apply_tokenizer(config, *x, method=call_all), params, images
    )
    scales, channels = config.scale_list, config.z_channels
    assert encoded.tokens.shape == (2, scales.length) and encoded.tokens.dtype == jnp.int32
    assert encoded.f_hats.shape == (scales.num_scales, 2, scales.side, scales.side, channels)
    assert decoded.shape == images.shape
    assert scale_inputs.shape == (2, scales.length - scales.lengths[0], channels)
    assert token_features.shape == scale_inputs.shape


def test_encoding_returns_the_features_of_its_tokens():
    params = jax.jit(VQAutoencoder(SMALL).init)(jax.random.key(1))
    images = jax.random.uniform(jax.random.key(2), (2, 8, 8, 3), minval=-1)
    encoded = run((SMALL, params), images, method="encode_with_features")
    f_hats = run((SMALL, params), encoded.tokens, method="tokens_to_f_hats")
    np.testing.assert_allclose(encoded.f_hats, f_hats, atol=1e-6)


def test_fold_is_inverted():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    assert fold(x, 2).shape == (2, 2, 3, 12)
    assert np.array_equal(unfold(fold(x, 2), 2), x)
    assert np.array_equal(fold(x, 2)[0, 0, 0], x[0, :2, :2].ravel())


def test_contributions_of_unquantized_residuals_sum_to_the_features():
    """With phi the identity nothing is lost: the last scale contributes what the others left."""
    config = dataclasses.replace(SMALL, phi_ratio=0.0)
    f = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    model = config, jax.jit(VQAutoencoder(config).init)(jax.random.key(1))
    z = run(model, f, method="unquantized_residuals")
    scales = config.scale_list
    contributions = [
        run(model, z[:, scales.slice(k)], method="scale_contribution", k=k) for k in range(3)
    ]
    np.testing.assert_allclose(sum(contributions), f, atol=1e-5)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(channels=8, groups=3), "groups must divide .*; got groups=3 and 8 channels"),
        (dict(distance="dot"), "distance must be one of l2, cosine; got 'dot'"),
        (dict(groups=0), "groups must be an integer in .*; got 0"),
        (dict(dtype="int8"), "dtype must be one of float32, bfloat16, float16; got 'int8'"),
        (dict(scales=(2, 1)), "scales must be increasing .*; got 2,1"),
    ],
)
def test_invalid_configs(values, message):
    with pytest.raises(InputError, match=message):
        TokenizerConfig(**values)
