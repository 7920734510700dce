"""Schedules and weight decay against the published code's, and the update rule against its definition."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.errors import InputError
from hmar_jax.families.hmar import convert
from hmar_jax.training.optimizer import adamw, decay_mask, lr_schedule, wd_schedule
from tests.test_transformer import published_names


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
    np.testing.assert_allclose(
        jax.vmap(schedule)(z["iterations"]), z[f"lr/{kind}/wpe{end}"], rtol=2e-5
    )


@pytest.mark.parametrize("end", [0.05, 0.08])
def test_weight_decay(load_golden, end):
    z = load_golden("schedules")
    schedule = wd_schedule(start=float(z["wd"]), end=end, total=int(z["max_it"]))
    np.testing.assert_allclose(
        jax.vmap(schedule)(z["iterations"]), z[f"wd/decay/wdend{end}"], rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["linear", "lin1.5", "linx", ""])
def test_unknown_schedule(kind):
    with pytest.raises(InputError, match="known are cos"):
        lr_schedule(kind, peak=1, warmup=1, total=10)


@pytest.mark.parametrize(
    "weights,tag", [("next_scale", "stage1"), ("next_scale_shared_aln", "stage1_shared_aln")]
)
def test_which_parameters_decay(golden, golden_state, weights, tag):
    lists = json.loads((golden / "schedules.json").read_text())[tag]
    config, params = convert.transformer_from_state(
        golden_state(weights, "transformer"), (1, 2, 3, 4, 6)
    )
    mask = jax.tree.map(lambda p, decayed: np.full(p.shape, decayed), params, decay_mask(params))
    names = published_names(mask, config)
    assert {name for name, m in names.items() if m.all()} == set(lists["decay"])
    assert {name for name, m in names.items() if not m.any()} == set(lists["no_decay"])


def test_one_step_by_hand():
    params = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}
    tx = adamw(lambda it: 0.1, lambda it: 0.5, clip=1.0)
    grads = {"kernel": jnp.array([3.0]), "bias": jnp.array([4.0])}  # norm 5, clipped to 0.6 and 0.8
    updates, _ = tx.update(grads, tx.init(params), params)
    # Adam's first step is the sign of the gradient; the decay adds 0.5 * 2
    np.testing.assert_allclose(updates["kernel"], -0.1 * (1 + 0.5 * 2), rtol=1e-5)
    np.testing.assert_allclose(updates["bias"], -0.1, rtol=1e-5)
