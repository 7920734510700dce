"""Stage 2 against the published code's recorded numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.autoencoders.vq import TokenizerConfig
from hmar_jax.errors import InputError
from hmar_jax.families.hmar import convert
from hmar_jax.families.hmar.losses import cross_entropy, masked_weights, position_weights
from hmar_jax.families.hmar.masked import MaskedTransformer
from hmar_jax.families.hmar.masked_task import MaskedTask
from hmar_jax.families.hmar.recipe import MaskedRecipe
from hmar_jax.families.hmar.spec import HmarSpec
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
    is_masked = np.zeros((2, 65), bool)
    is_masked[:, z["idx_to_mask"]] = True
    return MaskedTransformer(config, 2), stage1, params, is_masked, z, load_golden("tokenizer")


def test_logits(case):
    model, stage1, params, is_masked, z, tokenizer = case
    scale_inputs, features = tokenizer["ns_input"], tokenizer["mask_input"]
    inputs = jax.jit(model.embed_inputs)(stage1, params, scale_inputs, features, is_masked)
    assert relative(inputs, z["input_embed"]) < 1e-5
    logits = jax.jit(model.logits)(stage1, params, z["labels"], scale_inputs, features, is_masked)
    assert relative(logits, z["logits"]) < 1e-5
    scales = model.config.scale_list
    scale_logits = jax.jit(model.scale_logits, static_argnames="k")
    for k in (1, 3):
        part = slice(scales.offsets[k] - 1, scales.offsets[k + 1] - 1)
        rows = (x[:, part] for x in (scale_inputs, features, is_masked))
        logits = scale_logits(stage1, params, z["labels"], *rows, k=k)
        assert relative(logits, z["logits"][:, scales.slice(k)]) < 1e-5


def published_stage2_names(params, config):
    """Stage 2's own parameters (or gradients) as {published name: array, published layout}."""
    # published_names takes all parameters of M blocks; those that stage 2 lacks are dropped again.
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
    own = {n: x for n, x in names.items() if n.startswith(("blocks", "head"))}
    return own | {"mask_embed.weight": params["mask_embed"][None]}


@pytest.mark.parametrize(
    "tag, kind, smoothing",
    [("mask_unweighted_ls0", "unweighted", 0), ("equal_ls0.1", "equal_published", 0.1)],
)
def test_gradients(case, load_golden, tag, kind, smoothing):
    model, stage1, params, is_masked, z, tokenizer = case
    tokens = load_golden("next_scale")["tokens_BL"]
    task = make_task(model, tokenizer, kind, smoothing)
    frozen = {"transformer": stage1}
    batch = {
        "label": z["labels"],
        "tokens": jnp.asarray(tokens),
        "is_masked": jnp.asarray(is_masked),
        "ratio": jnp.full(2, 0.5),
    }
    loss = lambda params: task.loss(params, frozen, batch)[0]
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
                expected = z[f"grad_{tag}/{part}/{name}"]
                error = np.linalg.norm(values.ravel() - expected.ravel())
                # Entries near zero are compared with the typical entry of the tensor.
                typical = norm * (values.size / grad.size) ** 0.5
                assert error <= 1e-4 * max(np.linalg.norm(values), typical), (name, part)


def make_task(model, tokenizer, kind, smoothing):
    """A task whose tokenizer returns the recorded inputs instead of computing them."""
    recorded = {
        "tokens_to_f_hats": None,
        "next_scale_inputs": jnp.asarray(tokenizer["ns_input"]),
        "token_features": jnp.asarray(tokenizer["mask_input"]),
    }

    class RecordedInputs(MaskedTask):
        def apply_tokenizer(self, frozen, *args, method):
            return recorded[method]

    config = model.config
    autoencoder = TokenizerConfig(
        scales=config.scales, vocab_size=config.vocab_size, z_channels=config.z_channels
    )
    return RecordedInputs(
        spec=HmarSpec(autoencoder, config, masked_depth=2),
        recipe=MaskedRecipe(loss_weights=kind, label_smoothing=smoothing),
        steps=1,
        batch_size=2,
    )


def test_other_parameters_are_frozen(case):
    """The trained parameters are the published ones; with stage 1's they are all published ones."""
    model, stage1, params, _, z, _ = case
    trained = set(published_stage2_names(params, model.config))
    whole = {
        n.replace("word_embed.bias", "word_embed_bias")
        for n in published_names(stage1, model.config)
    }
    assert trained == {str(n) for n in z["trainable"]}
    assert (whole | {"mask_embed.weight"}) - trained == {str(n) for n in z["frozen"]}


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
    model, _, _, is_masked, z, _ = case
    scales, positions = model.config.scale_list, z["idx_to_mask"]
    weights = np.asarray(masked_weights(scales, kind, jnp.asarray(is_masked)))
    np.testing.assert_allclose(
        weights[:, positions], np.stack([z[f"weights_{recorded}"]] * 2), rtol=1e-5
    )
    assert np.count_nonzero(weights) == 2 * len(positions)
    tokens = load_golden("next_scale")["tokens_BL"][:, 1:]
    ce = cross_entropy(jnp.asarray(z["logits"][:, 1:]), jnp.asarray(tokens), smoothing)
    assert relative(ce[:, positions], z[f"ce_ls{smoothing}"]) < 1e-5
    assert relative((weights * ce).sum(-1).mean(), z[f"loss_{recorded}_ls{smoothing}"]) < 1e-5


def test_weights_belong_to_the_position_itself():
    """Unlike the published ones, which are those of the position l_0 places before."""
    scales = ScaleList((1, 2, 3))
    is_masked = jnp.array([[True, False, False, True] + [False] * 8 + [True]])
    for kind in ("lognorm", "equal"):
        expected = position_weights(scales, kind)[1:]
        weights = np.asarray(masked_weights(scales, kind, is_masked))[0]
        assert np.isclose(weights.sum(), 1) and np.count_nonzero(weights) == 3
        assert np.isclose(weights[12] / weights[0], expected[12] / expected[0])
    with pytest.raises(InputError) as error:
        masked_weights(scales, "plain", is_masked)
    assert str(error.value) == (
        "loss_weights of masked prediction must be one of unweighted, lognorm, equal, "
        "lognorm_published, equal_published; got 'plain'"
    )


def test_starts_as_a_copy_of_stage_1(case):
    model, stage1, *_ = case
    params = model.init(jax.random.key(0), stage1)
    kernel = lambda tree: tree["blocks"]["block"]["fc1"]["kernel"]
    assert np.array_equal(kernel(params), kernel(stage1)[2:])
    assert params["mask_embed"].shape == (128,)
