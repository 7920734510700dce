"""Filters against the recorded numbers, and draws from what they keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.errors import InputError
from hmar_jax.families.hmar import filters
from hmar_jax.families.hmar.sampler import Draw, Strength, image_keys, options, sample_tokens


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
    assert (
        (filters.top_p(logits, 1e-6) > -jnp.inf).sum(-1) == 1
    ).all()  # the likeliest always stays


def test_draws_follow_the_probabilities():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 1)
    many = jnp.broadcast_to(logits, (1, 20000, 4))
    for draw, strength, wanted in [
        (Draw(), Strength(), [0.5, 0.3, 0.15, 0.05]),
        (Draw(top_k=2), Strength(), [0.625, 0.375, 0, 0]),
        (Draw(use_top_p=True), Strength(top_p=0.9), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (Draw(greedy=True), Strength(), [1, 0, 0, 0]),
    ]:
        tokens, _ = sample_tokens(many, keys, draw, strength)
        np.testing.assert_allclose(np.bincount(tokens[0], minlength=4) / 20000, wanted, atol=0.015)


def test_keys_do_not_depend_on_the_batch():
    rng = jax.random.key(3)
    seven, three = (jax.random.key_data(image_keys(rng, n)) for n in (7, 3))
    assert np.array_equal(seven[:3], three)
    assert len({tuple(k) for k in seven.tolist()}) == 7


@pytest.mark.parametrize(
    "bad,name",
    [
        ({"guidance": -1}, "guidance=-1"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"top_p": 1.2}, "top_p=1.2"),
        ({"top_p": -0.1}, "top_p=-0.1"),
        ({"top_k": 65}, "top_k=65"),
        ({"top_k": 1.5}, "top_k=1.5"),
    ],
)
def test_bad_options(bad, name):
    with pytest.raises(InputError, match=name):
        options(**bad, vocab_size=64)
