"""Filters against the recorded numbers, samples of what they keep, and the sampling options."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax import settings
from hmar_jax.autoencoders.vq import TokenizerConfig
from hmar_jax.errors import InputError
from hmar_jax.families.base import image_keys
from hmar_jax.families.hmar import filters
from hmar_jax.families.hmar.options import EditingConfig, SamplingConfig
from hmar_jax.families.hmar.sampler import HmarSampler, SamplerOptions, sample_tokens
from hmar_jax.families.hmar.spec import HmarSpec
from hmar_jax.families.hmar.transformer import TransformerConfig


def test_agree_with_recorded(load_golden):
    z = load_golden("filters")
    for i, (k, p) in enumerate(z["pairs"]):
        logits = filters.top_k(jnp.asarray(z["logits"]), int(k))
        if p:
            logits = filters.top_p(logits, p)
        assert np.array_equal(logits > -jnp.inf, z[f"keep_{i}"]), (k, p)
        np.testing.assert_allclose(jax.nn.softmax(logits), z[f"probs_{i}"], atol=1e-6)
    ties = filters.top_k(jnp.asarray(z["logits_ties"]), 10)
    assert np.array_equal(ties > -jnp.inf, z["keep_ties_topk10"])


def test_smooth_weights_agree_with_recorded(load_golden):
    z = load_golden("filters")
    filtered = filters.top_p(filters.top_k(jnp.asarray(z["logits"]), 10), 0.9)
    for i, ratio in enumerate(z["gumbel_ratio"]):
        for logits, name in (
            (jnp.asarray(z["logits"]), f"gumbel_y_{i}"),
            (filtered, f"gumbel_filtered_y_{i}"),
        ):
            np.testing.assert_allclose(
                filters.smooth_weights(logits, z["gumbel_noise"], float(ratio)),
                z[name],
                atol=2e-5,
                err_msg=name,
            )


def test_off():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 8))
    assert filters.top_k(logits, 0) is logits and filters.top_k(logits, 8) is logits
    assert np.array_equal(filters.top_p(logits, 1.0), logits)
    # The most likely entry is always kept.
    assert ((filters.top_p(logits, 1e-6) > -jnp.inf).sum(-1) == 1).all()


def test_samples_follow_the_probabilities():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 1)
    many = jnp.broadcast_to(logits, (1, 20000, 4))
    for config, expected in [
        (SamplingConfig(), [0.5, 0.3, 0.15, 0.05]),
        (SamplingConfig(top_k=2), [0.625, 0.375, 0, 0]),
        (SamplingConfig(top_p=0.9), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (SamplingConfig(greedy=True), [1, 0, 0, 0]),
    ]:
        tokens, _ = sample_tokens(many, keys, SamplerOptions.of(config))
        found = np.bincount(tokens[0], minlength=4) / 20000
        np.testing.assert_allclose(found, expected, atol=0.015)


def test_keys_do_not_depend_on_the_batch():
    rng = jax.random.key(3)
    seven, three = (jax.random.key_data(image_keys(rng, n)) for n in (7, 3))
    assert np.array_equal(seven[:3], three)
    assert len({tuple(k) for k in seven.tolist()}) == 7


# Options


@pytest.mark.parametrize(
    "option, value, rule",
    [
        ("guidance", -1, "a number of at least 0"),
        ("guidance", float("nan"), "a number of at least 0"),
        ("guidance", float("inf"), "a number of at least 0"),
        ("guidance", "1", "a number of at least 0"),
        ("guidance", (1.0, 2.0), "a number of at least 0"),
        ("guidance", True, "a number of at least 0"),
        ("masked_guidance", -0.5, "a number of at least 0"),
        ("temperature", 0, "a number above 0"),
        ("temperature", -1.0, "a number above 0"),
        ("temperature", None, "a number above 0"),
        ("top_p", 1.2, "a number in [0, 1]"),
        ("top_p", -0.1, "a number in [0, 1]"),
        ("top_k", -1, "an integer of at least 0"),
        ("top_k", 1.5, "an integer of at least 0"),
        ("greedy", 1, "True or False"),
        ("smooth", "yes", "True or False"),
        ("choice_temperature", -1, "a number of at least 0"),
    ],
)
def test_invalid_options(option, value, rule):
    with pytest.raises(InputError) as error:
        SamplingConfig(**{option: value})
    assert str(error.value) == f"{option} must be {rule}; got {value!r}"


def sampler_of(masked_depth=0):
    scales = (1, 2)
    transformer = TransformerConfig(scales, vocab_size=64, depth=1, width=8, heads=1)
    tokenizer = TokenizerConfig(scales=scales, vocab_size=64)
    return HmarSampler(HmarSpec(tokenizer, transformer, masked_depth=masked_depth))


@pytest.mark.parametrize(
    "config, message",
    [
        (SamplingConfig(top_k=65), "top_k must be in [0, 64]; got 65"),
        (SamplingConfig(greedy=True, smooth=True), "greedy and smooth exclude each other: "),
        (
            SamplingConfig(schedule="default"),
            "schedule 'default' has masked passes, which require stage 2; this model has none: ",
        ),
        (SamplingConfig(schedule=[[1], [3]]), "schedule of scale 1 (2x2) must sum to its 4 tokens"),
    ],
)
def test_options_that_do_not_fit_the_model(config, message):
    with pytest.raises(InputError) as error:
        sampler_of().check(config)
    assert str(error.value).startswith(message)


def test_default_schedule():
    """None: masked passes where the model has a stage 2, otherwise one pass a scale."""
    assert sampler_of().schedule(None) == ((1,), (4,))
    assert sampler_of(masked_depth=1).schedule(None) == ((1,), (1, 1, 1, 1))
    for config in (SamplingConfig(), SamplingConfig(top_k=64), SamplingConfig(schedule="none")):
        sampler_of().check(config)
    sampler_of(masked_depth=1).check(SamplingConfig(schedule=[[1], [1, 3]]))


@pytest.mark.parametrize(
    "cls, old, new, value",
    [
        (SamplingConfig, "confidence_noise", "choice_temperature", 2.5),
        (EditingConfig, "ring", "dilation", 2),
    ],
)
def test_deprecated_names(cls, old, new, value):
    """As a keyword and on the command line: the value arrives under the new name, and a warning."""
    message = f"{old} is deprecated; use {new}"
    with pytest.warns(FutureWarning, match=f"^{message}$"):
        assert settings.resolve_names(cls, {old: value}) == {new: value}
    with pytest.warns(FutureWarning), pytest.raises(InputError) as error:
        settings.resolve_names(cls, {old: value, new: value})
    assert str(error.value) == f"{old} and {new} are the same option; give one of them"

    parser = argparse.ArgumentParser()
    settings.add_arguments(parser, cls)
    assert f"--{new}" in parser.format_help() and f"--{old}" not in parser.format_help()
    with pytest.warns(FutureWarning, match=f"^--{old} is deprecated; use --{new}$"):
        arguments = parser.parse_args([f"--{old}={value}"])
    assert getattr(arguments, new) == value
    assert getattr(parser.parse_args([f"--{new}={value}"]), new) == value


def test_unknown_option():
    with pytest.raises(InputError, match="^unknown option 'topk'; known: choice_temperature, "):
        settings.resolve_names(SamplingConfig, {"topk": 3})
