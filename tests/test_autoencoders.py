"""The Autoencoder protocol: registry, config.json, encoding and decoding, make_encoder."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax import autoencoders
from hmar_jax.autoencoders.base import AutoencoderSpec, config_to_json, make_encoder
from hmar_jax.autoencoders.vq import TokenizerConfig, VQAutoencoder, apply_tokenizer, to_float
from hmar_jax.data.record_spec import RecordField, RecordSpec
from hmar_jax.errors import InputError

CONFIG = TokenizerConfig(
    scales=(1, 2),
    vocab_size=16,
    z_channels=4,
    channels=8,
    channel_multipliers=(1,),
    num_res_blocks=0,
    patch_size=4,
    attention=False,
    groups=2,
)
VQ = VQAutoencoder(CONFIG)
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def params():
    return jax.jit(VQ.init)(jax.random.key(0))


# The registry and config.json


def test_registry():
    assert autoencoders.get_autoencoder_class("vq") is VQAutoencoder
    assert autoencoders.make_autoencoder(CONFIG) == VQ
    with pytest.raises(InputError, match="autoencoder kind must be one of vq; got 'kl'"):
        autoencoders.get_autoencoder_class("kl")


def test_config_round_trip():
    data = json.loads(json.dumps(config_to_json(CONFIG)))
    assert data["kind"] == "vq" and data["scales"] == [1, 2]
    assert autoencoders.config_from_json(data) == CONFIG
    with pytest.raises(InputError, match="kind"):
        autoencoders.config_from_json({"scales": [1, 2]})
    with pytest.raises(InputError, match="vocab_size must be an integer"):
        autoencoders.config_from_json(data | {"vocab_size": 0})


def test_spec_round_trip():
    spec = AutoencoderSpec(CONFIG, ("cat", "dog"), origin="trained on digits", licence="Apache-2.0")
    data = json.loads(json.dumps(spec.to_json()))
    assert data["format"] == "hmar_jax model 1" and data["autoencoder"]["kind"] == "vq"
    assert AutoencoderSpec.from_json(data, "config.json") == spec
    assert spec.kind == "tokenizer" and spec.family == "vq"
    assert spec.with_dtype("bfloat16").autoencoder.dtype == "bfloat16"


FIRST_VERSION = {
    "format": "hmar_jax model 1",
    "tokenizer": {
        "scales": [1, 2],
        "vocab_size": 16,
        "z_channels": 4,
        "channels": 8,
        "channel_multipliers": [1],
        "num_res_blocks": 0,
        "patch_size": 4,
        "attention": False,
        "groups": 2,
        "dropout": 0.0,
        "num_phi": 4,
        "phi_ratio": 0.5,
        "distance": "l2",
        "dtype": "float32",
    },
    "transformer": None,
    "masked_depth": 0,
    "next_scale": True,
    "class_names": ["a"],
    "guidance": 0.0,
    "top_k": 0,
    "top_p": 0.0,
    "masked_guidance": 0.0,
    "confidence_noise": 0.0,
    "origin": "trained on digits",
    "licence": "",
}


def test_spec_of_the_first_version():
    spec = AutoencoderSpec.from_json(FIRST_VERSION, "config.json")
    assert spec == AutoencoderSpec(CONFIG, ("a",), origin="trained on digits")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "other"}, r"must be .* \(format 'hmar_jax model 1'\); got format 'other'"),
        ({"transformer": {"depth": 2}}, "must be the config of an autoencoder"),
        ({"unknown": 1}, "not a config that this version can read .*unknown"),
        ({"tokenizer": {"unknown": 1}}, "not a config that this version can read .*unknown"),
    ],
)
def test_invalid_specs(changes, message):
    with pytest.raises(InputError, match=f"m/config.json:? {message}"):
        AutoencoderSpec.from_json(FIRST_VERSION | changes, "m/config.json")


# Encoding and decoding


def test_encode_and_decode(params):
    latents = jax.jit(VQ.encode)(params, IMAGES)
    assert latents["tokens"].shape == (6, 5) and latents["tokens"].dtype == jnp.int32
    expected = apply_tokenizer(CONFIG, params, to_float(jnp.asarray(IMAGES)), method="encode")
    assert np.array_equal(latents["tokens"], expected)
    as_floats = jax.jit(VQ.encode)(params, IMAGES.astype(np.float32) / 255)
    assert np.array_equal(as_floats["tokens"], expected)
    images = jax.jit(VQ.decode)(params, latents)
    assert images.shape == IMAGES.shape and images.dtype == jnp.float32
    assert 0 <= images.min() and images.max() <= 1


def test_each_half_needs_its_parameters_only(params):
    latents = VQ.encode(VQ.encoder_params(params), IMAGES)
    assert np.array_equal(latents["tokens"], VQ.encode(params, IMAGES)["tokens"])
    assert VQ.encoder_params(params).keys() == {"encoder", "quant_conv", "quantizer"}
    images = VQ.decode(VQ.decoder_params(params), latents)
    assert np.array_equal(images, VQ.decode(params, latents))
    assert VQ.decoder_params(params).keys() == {"decoder", "post_quant_conv", "quantizer"}


def test_record_spec():
    field = RecordField("tokens", (5,), "int32", vocab_size=16)
    assert VQ.record_spec == RecordSpec(kind="tokens", fields=(field,))


def test_make_encoder(params):
    encode, batch_size = make_encoder(VQ, params, 5, jax.devices()[:1])
    assert batch_size == 5
    latents = encode(IMAGES[:5])
    assert np.array_equal(latents["tokens"], VQ.encode(params, IMAGES[:5])["tokens"])


def test_describe():
    rows = dict(VQ.describe(1234))
    assert rows == {
        "images": "8 x 8 pixels, 5 tokens",
        "scales": "1x1, 2x2",
        "tokenizer": "1,234 parameters, codebook 16 x 4",
    }


def test_fingerprint(params):
    known = VQ.fingerprint(params)
    assert len(known) == 16 and int(known, 16) >= 0
    assert known == VQ.fingerprint(jax.tree.map(np.asarray, params))

    def changed(**values):
        return VQAutoencoder(dataclasses.replace(CONFIG, **values)).fingerprint(params)

    assert changed(dtype="bfloat16", dropout=0.1) == known
    assert changed(distance="cosine") != known
    assert VQ.fingerprint({**params, "decoder": None}) == known
    quantizer = {**params["quantizer"], "phi_bias": params["quantizer"]["phi_bias"] + 1}
    assert VQ.fingerprint({**params, "quantizer": quantizer}) != known


def test_fingerprint_is_that_of_the_first_version():
    """Token sets that were made with it remain valid."""
    shapes = jax.eval_shape(VQ.init, jax.random.key(0))
    ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    assert VQ.fingerprint(ones) == "253b8b330ae0a0a2"
