"""The step around a task's own: skipped steps, the moving average; and a run in which they happen."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hmar_jax.cli import main as cli
from hmar_jax.families.hmar import flops
from hmar_jax.families.hmar.next_scale_task import NextScaleTask
from hmar_jax.io import checkpoints
from hmar_jax.pipeline import load_spec_and_params
from hmar_jax.training import loop, state
from hmar_jax.training.metrics import Mean
from tests import tiny


def tiny_transformer(run):
    return load_spec_and_params(str(run))[0].transformer


class Task:
    """Descends a parabola; the batch is the loss's factor."""

    optimizer = optax.adam(0.1)

    def init(self, rng):
        params = {"w": jnp.float32(3)}
        return state.TrainState.start(params, self.optimizer.init(params))

    def train_step(self, s, batch, rng):
        loss, grads = jax.value_and_grad(lambda p: batch * p["w"] ** 2)(s.params)
        updates, opt_state = self.optimizer.update(grads, s.opt_state)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "rare": Mean(jnp.float32(jnp.nan), jnp.float32(0)),
        }
        return s.replace(
            step=s.step + 1, params=optax.apply_updates(s.params, updates), opt_state=opt_state
        ), metrics


@pytest.mark.parametrize(
    "bad", [np.nan, np.inf, 1e38]
)  # of the last, the loss overflows in the gradient's square
def test_a_step_that_is_not_finite_changes_nothing(bad):
    task, key = Task(), jax.random.key(0)
    s = state.init(task, key, ema_decay=0.9)
    s, metrics = state.train_step(task, s, 1.0, key, ema_decay=0.9)
    assert metrics["skipped"] == 0 and s.params["w"] < 3
    before = s
    for n in (1, 2, 3):
        s, metrics = state.train_step(task, s, jnp.float32(bad), key, ema_decay=0.9)
        assert (
            metrics["skipped"] == 1
            and metrics["skipped_in_row"] == n == s.skipped
            and s.step == 1 + n
        )
    for part in ("params", "opt_state", "ema_params"):
        jax.tree.map(np.testing.assert_array_equal, getattr(s, part), getattr(before, part))
    s, metrics = state.train_step(task, s, 1.0, key, ema_decay=0.9)
    assert (
        metrics["skipped"] == 0 == s.skipped_in_row
        and s.skipped == 3
        and s.params["w"] < before.params["w"]
    )


def test_the_moving_average():
    task, key = Task(), jax.random.key(0)
    s = state.init(task, key, ema_decay=0.5)
    average = 3.0
    for step in range(6):
        s, _ = state.train_step(task, s, 1.0, key, ema_decay=0.5)
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * float(s.params["w"])
        assert np.isclose(s.ema_params["w"], average) and s.eval_params is s.ema_params
    assert state.init(task, key).ema_params == {} and state.init(task, key).eval_params == {"w": 3}


def test_a_run_skips_what_is_not_finite_and_stops_after_ten_in_a_row(tmp_path, monkeypatch, capfd):
    step = NextScaleTask.train_step

    def now_and_then(self, s, *more):
        new, metrics = step(self, s, *more)
        bad = (s.step == 4) | (s.step == 5) | (s.step >= 42)
        return new, metrics | {"loss": jnp.where(bad, jnp.nan, metrics["loss"])}

    monkeypatch.setattr(NextScaleTask, "train_step", now_and_then)
    monkeypatch.setattr(loop, "peak_flops", lambda device: 1e12)
    with tiny.cached():
        assert (
            cli.main(tiny.train(tmp_path / "run", ema_decay=0.9, keep_best=1, keep_checkpoints=1))
            == 1
        )
    said = capfd.readouterr().err
    assert "nothing changed: step 5, 6" in said
    assert (
        "hmar train: loss or gradient was not finite in the last 10 steps, up to step 52: the run stops"
        in said
    )
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [x["skipped"] for x in lines if "lr" in x] == [2, 0, 0, 0, 8] and np.isfinite(
        lines[-1]["loss"]
    )
    for line in lines:
        if "lr" in line:
            work = (
                flops.next_scale_step(tiny_transformer(tmp_path / "run"))
                * line["images_per_second"]
            )
            assert (
                np.isclose(line["mfu"], work / 1e12)
                and min(line["device_seconds"], line["host_wait_seconds"]) > 0
            )

    step, saved = checkpoints.load_params_of_run(tmp_path / "run", "ema_params", "skipped")
    assert step == 40 and saved["skipped"] == 2
    _, parts = load_spec_and_params(str(tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, parts["transformer"], saved["ema_params"])
    losses = {x["step"]: x["validation/loss"] for x in lines if "validation/loss" in x}
    best, found = checkpoints.load_params_of_run(tmp_path / "run", averaged=True, checkpoint="best")
    assert losses[best] == min(losses.values())
    _, parts = load_spec_and_params(str(tmp_path / "run"), "best")
    jax.tree.map(np.testing.assert_array_equal, parts["transformer"], found["params"])
    assert not np.array_equal(
        saved["params"]["head"]["kernel"], saved["ema_params"]["head"]["kernel"]
    )


def test_flops_counted_by_hand():
    """Against XLA's own count of an unrolled forward pass of matrix products."""
    from hmar_jax.families.hmar.transformer import NextScaleTransformer, TransformerConfig

    config = TransformerConfig(
        scales=(1, 2, 3, 4),
        vocab_size=512,
        width=128,
        heads=2,
        depth=1,
        z_channels=32,
        attention="xla",
    )
    model = NextScaleTransformer(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    codes = jax.ShapeDtypeStruct((1, 29, 32), jnp.float32)
    counted = (
        jax.jit(model.logits)
        .lower(params, jax.ShapeDtypeStruct((1,), jnp.int32), codes)
        .cost_analysis()["flops"]
    )
    products, attention = flops.block_forward(config)
    by_hand = products + attention + sum(flops.ends_forward(config))
    assert by_hand < counted < 1.1 * by_hand  # XLA also counts norms and softmax
    d16 = TransformerConfig(scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    assert flops.attention_cells(d16) == sum(s**4 for s in d16.scales)
    assert np.isclose(flops.next_scale_step(d16), 0.865e12, rtol=1e-3)
    causal = TransformerConfig(scales=(1, 2, 3), pattern="causal")
    assert flops.attention_cells(causal) == 1 + 4 * 5 + 9 * 14
    assert (
        flops.masked_step(d16, 16)
        > 0.97 * flops.next_scale_step(d16)
        > flops.masked_step(d16, 8)
        > 0.5 * flops.next_scale_step(d16)
    )
