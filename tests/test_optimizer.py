"""AdamW and its schedules: the published code's numbers, and the update rule by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.autoencoders.vq import TokenizerConfig
from hmar_jax.errors import InputError
from hmar_jax.families.hmar import convert
from hmar_jax.families.hmar.masked_task import MaskedTask
from hmar_jax.families.hmar.next_scale_task import NextScaleTask
from hmar_jax.families.hmar.recipe import NextScaleRecipe
from hmar_jax.families.hmar.spec import HmarSpec
from hmar_jax.training.optimizer import (
    OptimizerConfig,
    adamw,
    kernels,
    leaves_named,
    lr_schedule,
    wd_schedule,
)
from tests.test_masked import published_stage2_names
from tests.test_transformer import SIDES, published_names


@pytest.mark.parametrize("kind", ["cos", "lin", "lin0", "lin00", "lin0.3", "exp"])
@pytest.mark.parametrize("end", [0.01, 0.1])
def test_learning_rates(load_golden, kind, end):
    z = load_golden("schedules")
    schedule = lr_schedule(
        kind,
        peak=float(z["peak_lr"]),
        warmup=int(z["warmup_it"]),
        total=int(z["max_it"]),
        start_ratio=float(z["wp0"]),
        end_ratio=end,
    )
    found = jax.vmap(schedule)(z["iterations"])
    np.testing.assert_allclose(found, z[f"lr/{kind}/wpe{end}"], rtol=2e-5)


@pytest.mark.parametrize("end", [0.05, 0.08])
def test_weight_decay(load_golden, end):
    z = load_golden("schedules")
    schedule = wd_schedule(start=float(z["wd"]), end=end, total=int(z["max_it"]))
    found = jax.vmap(schedule)(z["iterations"])
    np.testing.assert_allclose(found, z[f"wd/decay/wdend{end}"], rtol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "lin1.5", "linx", ""])
def test_unknown_schedule(kind):
    with pytest.raises(InputError) as error:
        lr_schedule(kind, peak=1, warmup=1, total=10)
    assert str(error.value) == (
        f"schedule must be one of cos, lin, lin0, lin00, lin<T>, exp with 0 < T < 1; got {kind!r}"
    )


@pytest.mark.parametrize(
    "weights, tag",
    [
        ("next_scale", "stage1"),
        ("next_scale_shared_aln", "stage1_shared_aln"),
        ("masked", "stage2"),
    ],
)
def test_parameters_that_decay(golden, golden_state, weights, tag):
    lists = json.loads((golden / "schedules.json").read_text())[tag]
    state = golden_state(weights, "transformer")
    config, params = convert.transformer_from_state(state, SIDES)
    tokenizer = TokenizerConfig(
        scales=SIDES, vocab_size=config.vocab_size, z_channels=config.z_channels
    )
    if tag == "stage2":
        params = convert.masked_from_state(state, config, ["blocks.2", "blocks.3"], "head")
        spec = HmarSpec(tokenizer, config, masked_depth=2)
        task, published = MaskedTask(spec=spec, steps=1, batch_size=1), published_stage2_names
    else:
        spec = HmarSpec(tokenizer, config)
        task, published = NextScaleTask(spec=spec, steps=1, batch_size=1), published_names
    mask = task.decay_mask(params)
    mask = jax.tree.map(lambda p, decays: np.full(p.shape, decays), params, mask)
    names = published(mask, config)
    assert {name for name, m in names.items() if m.all()} == set(lists["decay"])
    assert {name for name, m in names.items() if not m.any()} == set(lists["no_decay"])


def test_leaves_by_name():
    tree = {"mask_embed": 0, "a": {"kernel": 0, "bias": 0}, "kernel": {"scale": 0}}
    assert leaves_named("kernel", "mask_embed")(tree) == {
        "mask_embed": True,
        "a": {"kernel": True, "bias": False},
        "kernel": {"scale": False},  # the name of the leaf counts, not of a module
    }
    assert kernels(tree) == leaves_named("kernel")(tree)


PARAMS = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}
GRADS = {"kernel": jnp.array([3.0]), "bias": jnp.array([4.0])}  # norm 5


def check_first_update(updates):
    # Adam's first step is the sign of the gradient; weight decay adds 0.5 * 2.
    np.testing.assert_allclose(updates["kernel"], -0.1 * (1 + 0.5 * 2), rtol=1e-5)
    np.testing.assert_allclose(updates["bias"], -0.1, rtol=1e-5)


def test_one_step_by_hand():
    tx = adamw(lambda it: 0.1, lambda it: 0.5, clip=1.0)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    check_first_update(updates)


def test_optimizer_of_a_config():
    config = OptimizerConfig(
        learning_rate=0.1, warmup_steps=0, weight_decay=0.5, schedule="lin00", end_ratio=0.0
    )
    tx = config.make(11, kernels)
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    check_first_update(updates)
    rates = jax.vmap(config.learning_rates(11))(jnp.arange(11))
    np.testing.assert_allclose(rates, np.linspace(0.1, 0, 11), atol=1e-7)
    # The second step: Adam's direction is the same, the rate lower, the decay constant.
    updates, _ = tx.update(GRADS, state, PARAMS)
    np.testing.assert_allclose(updates["kernel"], -0.09 * (1 + 0.5 * 2), rtol=1e-4)
    # A last weight decay of its own: half a cosine from 0.5 to 0.
    tx = OptimizerConfig(
        learning_rate=0.1, warmup_steps=0, weight_decay=0.5, weight_decay_end=0.0
    ).make(2, kernels)
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    updates, _ = tx.update(GRADS, state, PARAMS)
    np.testing.assert_allclose(updates["kernel"], updates["bias"], rtol=1e-4)


@pytest.mark.parametrize(
    "option, value, rule",
    [
        ("learning_rate", -1.0, "a number of at least 0"),
        ("warmup_steps", 0.5, "an integer of at least 0"),
        ("b2", 1.0, "a number in [0, 1)"),
        ("clip", None, "a number of at least 0"),
        ("weight_decay_end", -0.1, "a number of at least 0"),
    ],
)
def test_invalid_recipes(option, value, rule):
    with pytest.raises(InputError) as error:
        NextScaleRecipe(**{option: value})
    assert str(error.value) == f"{option} must be {rule}; got {value!r}"
