"""Stage 2 against the published code's recorded numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax import convert
from hmar_jax.models.masked import MaskedTransformer
from hmar_jax.training.losses import cross_entropy
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
            stage1, params, k, z["labels"], codes[:, part], own[:, part], masked[:, part])
        assert relative(one, z["logits"][:, scales.slice(k)]) < 1e-5


def test_unweighted_loss_and_gradients(case, load_golden):
    model, stage1, params, masked, z, tokenizer = case
    targets = load_golden("next_scale")["tokens_BL"]
    positions = z["idx_to_mask"] + 1

    def loss(params):
        logits = model.logits(stage1, params, z["labels"], tokenizer["ns_input"], tokenizer["mask_input"], masked)
        ce = cross_entropy(logits[:, positions], jnp.asarray(targets[:, positions]))
        return ce.mean(), ce

    (value, ce), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert relative(ce, z["ce_ls0"]) < 1e-5 and relative(value, z["loss_mask_unweighted_ls0"]) < 1e-5
    # published_names wants a whole tree; what stage 2 does not have is dropped again
    tail = dataclasses.replace(model.config, depth=2)
    names = published_names({"embed": stage1["embed"], "blocks": grads["blocks"], "head": grads["head"]}, tail)
    renamed = {n.replace("blocks.1", "blocks.3").replace("blocks.0", "blocks.2"): g for n, g in names.items()}
    trainable = {n: g for n, g in renamed.items() if n.startswith(("blocks", "head"))} | {"mask_embed.weight": grads["mask_embed"]}
    assert set(trainable) == {str(n) for n in z["trainable"]}
    for name, grad in trainable.items():
        norm = float(z[f"grad_mask_unweighted_ls0/norm/{name}"])
        assert abs(np.linalg.norm(np.asarray(grad)) - norm) <= 1e-4 * norm, name


def test_starts_as_a_copy_of_stage_1(case):
    model, stage1, *_ = case
    params = model.init(jax.random.key(0), stage1)
    assert np.array_equal(params["blocks"]["block"]["fc1"]["kernel"], stage1["blocks"]["block"]["fc1"]["kernel"][2:])
    assert params["mask_embed"].shape == (128,)
