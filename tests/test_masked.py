"""Stage 2 against the published code's recorded numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.errors import InputError
from hmar_jax.families.hmar import convert
from hmar_jax.families.hmar.losses import cross_entropy, masked_weights, position_weights
from hmar_jax.families.hmar.masked import MaskedTransformer
from hmar_jax.families.hmar.masked_task import MaskedTask
from hmar_jax.families.hmar.transformer import NextScaleTransformer
from tests.conftest import relative
from tests.test_transformer import published_names

SIDES = (1, 2, 3, 4, 6)


@pytest.fixture(scope="module")
def case(load_golden, golden_state):
    state = golden_state("masked", "transformer")
    config, stage1 = convert.transformer_from_state(state, SIDES)
    params = convert.masked_from_state(state, config, ["blocks.2", "blocks.3"], "head")
    z = load_golden("masked")
    masked = np.zeros((2, 65), bool)
    masked[:, z["idx_to_mask"]] = True
    return MaskedTransformer(config, 2), stage1, params, masked, z, load_golden("tokenizer")


def test_logits(case):
    model, stage1, params, masked, z, tokenizer = case
    codes, own = tokenizer["ns_input"], tokenizer["mask_input"]
    words = jax.jit(model.words)(stage1, params, codes, own, masked)
    assert relative(words, z["input_embed"]) < 1e-5
    logits = jax.jit(model.logits)(stage1, params, z["labels"], codes, own, masked)
    assert relative(logits, z["logits"]) < 1e-5
    scales = model.config.scale_list
    for k in (1, 3):
        part = slice(scales.offsets[k] - 1, scales.offsets[k + 1] - 1)
        one = jax.jit(model.scale_logits, static_argnums=2)(
            stage1, params, k, z["labels"], codes[:, part], own[:, part], masked[:, part]
        )
        assert relative(one, z["logits"][:, scales.slice(k)]) < 1e-5


def published_stage2_names(params, config):
    """Stage 2's own parameters (or their gradients) as {published name: array in the published layout}."""
    # published_names wants a whole tree of M blocks; what stage 2 does not have is dropped again
    embed = jax.eval_shape(NextScaleTransformer(config).init, jax.random.key(0))["embed"]
    embed = jax.tree.map(lambda x: np.zeros(x.shape), embed)
    tail = dataclasses.replace(config, depth=2)
    names = published_names(
        {"embed": embed, "blocks": params["blocks"], "head": params["head"]}, tail
    )
    names = {
        n.replace("blocks.1", "blocks.3").replace("blocks.0", "blocks.2"): x
        for n, x in names.items()
    }
    return {n: x for n, x in names.items() if n.startswith(("blocks", "head"))} | {
        "mask_embed.weight": params["mask_embed"][None]
    }


@pytest.mark.parametrize(
    "tag, kind, smoothing",
    [("mask_unweighted_ls0", "unweighted", 0), ("equal_ls0.1", "equal_published", 0.1)],
)
def test_gradients(case, load_golden, tag, kind, smoothing):
    model, stage1, params, masked, z, _ = case
    tokens, frozen = load_golden("next_scale")["tokens_BL"], frozen_of(case)
    task = task_of(model, kind, smoothing, frozen)

    def loss(params):
        return task.figures(params, frozen, z["labels"], tokens, masked)["loss"].mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert relative(value, z[f"loss_{tag}"]) < 1e-5
    grads = published_stage2_names(grads, model.config)
    assert set(grads) == {str(n) for n in z["trainable"]}
    for name, grad in grads.items():
        grad = np.asarray(grad)
        norm = float(z[f"grad_{tag}/norm/{name}"])
        assert abs(np.linalg.norm(grad) - norm) <= 1e-4 * norm, name
        for part, values in (("first16", grad.ravel()[:16]), ("full", grad)):
            if f"grad_{tag}/{part}/{name}" in z:
                error = np.linalg.norm(values.ravel() - z[f"grad_{tag}/{part}/{name}"].ravel())
                assert error <= 1e-4 * max(
                    np.linalg.norm(values), norm * (values.size / grad.size) ** 0.5
                ), (name, part)


def test_the_rest_is_frozen(case):
    """Stage 2 has the published trainable parameters and no other; with stage 1's they are all that is published."""
    model, stage1, params, _, z, _ = case
    trained = set(published_stage2_names(params, model.config))
    whole = {
        n.replace("word_embed.bias", "word_embed_bias")
        for n in published_names(stage1, model.config)
    }
    assert trained == {str(n) for n in z["trainable"]}
    assert (whole | {"mask_embed.weight"}) - trained == {str(n) for n in z["frozen"]}


def frozen_of(case):
    """What the training step is given besides its state; the tokenizer's tokens become the recorded inputs."""
    _, stage1, _, _, _, tokenizer = case
    return {
        "transformer": stage1,
        "tokenizer": {
            "transformer_inputs": jnp.asarray(tokenizer["ns_input"]),
            "own_scale_inputs": jnp.asarray(tokenizer["mask_input"]),
        },
    }


def task_of(model, kind, smoothing, frozen):
    class Recorded(MaskedTask):
        def quantize(self, tokenizer_params, x, method):
            return tokenizer_params[method]

    return Recorded(
        transformer=model.config,
        tokenizer=None,
        masked_depth=2,
        steps=1,
        batch_size=2,
        learning_rate=0.0,
        loss_weights=kind,
        label_smoothing=smoothing,
    )


@pytest.mark.parametrize(
    "kind, recorded",
    [
        ("unweighted", "mask_unweighted"),
        ("equal_published", "equal"),
        ("lognorm_published", "lognorm"),
    ],
)
@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_losses(case, load_golden, kind, recorded, smoothing):
    model, _, _, masked, z, _ = case
    scales, positions = model.config.scale_list, z["idx_to_mask"]
    weights = np.asarray(masked_weights(scales, kind, jnp.asarray(masked)))
    np.testing.assert_allclose(
        weights[:, positions], np.stack([z[f"weights_{recorded}"]] * 2), rtol=1e-5
    )
    assert np.count_nonzero(weights) == 2 * len(positions)
    tokens = load_golden("next_scale")["tokens_BL"][:, 1:]
    ce = cross_entropy(jnp.asarray(z["logits"][:, 1:]), jnp.asarray(tokens), smoothing)
    assert relative(ce[:, positions], z[f"ce_ls{smoothing}"]) < 1e-5
    assert relative((weights * ce).sum(-1).mean(), z[f"loss_{recorded}_ls{smoothing}"]) < 1e-5


def test_corrected_weights_are_those_of_the_position_itself():
    scales = ScaleList((1, 2, 3))
    masked = jnp.array([[True, False, False, True] + [False] * 8 + [True]])
    for kind in ("lognorm", "equal"):
        own = position_weights(scales, kind)[1:]
        weights = np.asarray(masked_weights(scales, kind, masked))[0]
        assert np.isclose(weights.sum(), 1) and np.isclose(
            weights[12] / weights[0], own[12] / own[0]
        )
        assert np.count_nonzero(weights) == 3
    with pytest.raises(
        InputError, match="'plain': known for masked prediction are unweighted, lognorm"
    ):
        masked_weights(scales, "plain", masked)


def test_starts_as_a_copy_of_stage_1(case):
    model, stage1, *_ = case
    params = model.init(jax.random.key(0), stage1)
    assert np.array_equal(
        params["blocks"]["block"]["fc1"]["kernel"], stage1["blocks"]["block"]["fc1"]["kernel"][2:]
    )
    assert params["mask_embed"].shape == (128,)
