"""The training step of every task: skipped steps, moving average, random choices; FLOP counts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.autoencoders.vq import Tokenizer, TokenizerConfig
from hmar_jax.cli import main as cli
from hmar_jax.families.hmar import flops
from hmar_jax.families.hmar.masked_task import MaskedTask
from hmar_jax.families.hmar.next_scale_task import NextScaleTask
from hmar_jax.families.hmar.recipe import MaskedRecipe, NextScaleRecipe
from hmar_jax.families.hmar.spec import HmarSpec
from hmar_jax.families.hmar.transformer import NextScaleTransformer, TransformerConfig
from hmar_jax.io import checkpoints
from hmar_jax.loading import load_spec_and_params
from hmar_jax.training import session, step
from hmar_jax.training.metrics import Mean
from hmar_jax.training.optimizer import OptimizerConfig
from hmar_jax.training.task import TaskDefaults
from tests import tiny

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Parabola(TaskDefaults):
    """Minimizes factor * w^2; the factor comes with the batch."""

    steps = 100
    batch_size = 1
    partition_rules = ()
    optimizer = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.0, clip=0.0)

    def init_params(self, rng, frozen):
        return {"w": jnp.float32(3)}

    def loss(self, params, frozen, batch, rng, step):
        loss = batch["factor"] * params["w"] ** 2
        return loss, {"loss": loss, "rare": Mean(jnp.float32(jnp.nan), jnp.float32(0))}


class OwnUpdate(Parabola):
    """The same with an update of its own, see CustomUpdateTask."""

    def init_state(self, rng, frozen):
        return step.init_state(Parabola(), rng, frozen)

    def train_step(self, state, frozen, batch, rng):
        return step.gradient_step(Parabola())(state, frozen, batch, rng)


def take_step(task, state, factor, ema_decay):
    batch = {"factor": jnp.float32(factor)}
    return step.train_step(task, state, {}, batch, KEY, ema_decay=ema_decay)


@pytest.mark.parametrize("task", [Parabola(), OwnUpdate()], ids=["gradient", "own update"])
# With 1e38 the loss overflows, with 1e37 only the square in the gradient's norm.
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38, 1e37])
def test_a_step_that_is_not_finite_changes_nothing(task, bad):
    state = step.init_state(task, KEY, {}, ema_decay=0.9)
    state, metrics = take_step(task, state, 1.0, 0.9)
    assert metrics["skipped"] == 0 and state.params["w"] < 3
    before = state
    for n in (1, 2, 3):
        state, metrics = take_step(task, state, bad, 0.9)
        assert metrics["skipped"] == 1 and metrics["skipped_in_row"] == n == state.skipped
        assert state.step == 1 + n
        assert bool(np.isfinite(metrics["loss"])) == (bad == 1e37)
    for part in ("params", "opt_state", "ema_params"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, part), getattr(before, part))
    state, metrics = take_step(task, state, 1.0, 0.9)
    assert metrics["skipped"] == 0 == state.skipped_in_row and state.skipped == 3
    assert state.params["w"] < before.params["w"]


def test_moving_average():
    task = Parabola()
    state = step.init_state(task, KEY, {}, ema_decay=0.5)
    average = 3.0
    for n in range(6):
        state, _ = take_step(task, state, 1.0, 0.5)
        decay = min(0.5, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * float(state.params["w"])
        assert np.isclose(state.ema_params["w"], average)
        assert state.eval_params is state.ema_params
    without = step.init_state(task, KEY, {})
    assert without.ema_params == {} and without.eval_params == {"w": 3}


def test_a_run_skips_steps_and_stops_after_ten_in_a_row(tmp_path, monkeypatch, capfd):
    loss_of = NextScaleTask.loss

    def sometimes_nan(self, params, frozen, batch, rng=None, step=None):
        loss, metrics = loss_of(self, params, frozen, batch, rng, step)
        bad = (step == 4) | (step == 5) | (step >= 42)
        return loss, metrics | {"loss": jnp.where(bad, jnp.nan, metrics["loss"])}

    monkeypatch.setattr(NextScaleTask, "loss", sometimes_nan)
    monkeypatch.setattr(session, "peak_flops", lambda device: 1e12)
    run = tmp_path / "run"
    with tiny.cached():
        assert cli.main(tiny.train(run, ema_decay=0.9, keep_best=1, keep_checkpoints=1)) == 1
    err = capfd.readouterr().err
    assert "nothing changed: step 5, 6" in err
    assert (
        "hmar train: loss or gradient was not finite in the last 10 steps, up to step 52: "
        "the run stops" in err
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [x for x in lines if "lr" in x]
    assert [x["skipped"] for x in training] == [2, 0, 0, 0, 8] and np.isfinite(lines[-1]["loss"])
    work = flops.next_scale_step(load_spec_and_params(str(run))[0].transformer)
    for line in training:
        assert np.isclose(line["mfu"], work * line["images_per_second"] / 1e12)
        assert min(line["device_seconds"], line["host_wait_seconds"]) > 0

    last, saved = checkpoints.load_params_of_run(run, "ema_params", "skipped")
    assert last == 40 and saved["skipped"] == 2
    _, params = load_spec_and_params(str(run))
    jax.tree.map(np.testing.assert_array_equal, params["transformer"], saved["ema_params"])
    losses = {x["step"]: x["validation/loss"] for x in lines if "validation/loss" in x}
    best, found = checkpoints.load_params_of_run(run, averaged=True, checkpoint="best")
    assert losses[best] == min(losses.values())
    _, params = load_spec_and_params(str(run), "best")
    jax.tree.map(np.testing.assert_array_equal, params["transformer"], found["params"])
    kernel = lambda part: saved[part]["head"]["kernel"]
    assert not np.array_equal(kernel("params"), kernel("ema_params"))


# Random choices for the images of a batch

TOKENIZER = TokenizerConfig(
    scales=(1, 2, 3),
    vocab_size=16,
    z_channels=4,
    channels=8,
    channel_multipliers=(1,),
    groups=2,
    num_res_blocks=0,
)
TRANSFORMER = TransformerConfig(
    TOKENIZER.scales, vocab_size=16, z_channels=4, num_classes=5, depth=1, width=16, heads=2
)
BATCH = {
    "label": jnp.arange(12) % 5,
    "tokens": jax.random.randint(jax.random.key(1), (12, 14), 0, 16),
}


@pytest.fixture(scope="module")
def frozen():
    """Parameters of the tokenizer and of stage 1."""
    image = jnp.zeros((1, TOKENIZER.image_side, TOKENIZER.image_side, 3))
    return {
        "tokenizer": jax.jit(Tokenizer(TOKENIZER).init)(KEY, image)["params"],
        "transformer": jax.jit(NextScaleTransformer(TRANSFORMER).init)(KEY),
    }


def make_task(stage: str, grad_accum_steps: int = 1, **changes):
    common = dict(steps=10, batch_size=12, grad_accum_steps=grad_accum_steps)
    # Without clipping, and with large initial gates: every parameter has a gradient.
    recipe = dict(class_dropout=0.5, clip=0.0) | changes
    model = dataclasses.replace(TRANSFORMER, init_adaln_gamma=0.5, init_head=1.0)
    if stage == "stage1":
        spec = HmarSpec(TOKENIZER, model)
        return NextScaleTask(spec=spec, recipe=NextScaleRecipe(**recipe), **common)
    spec = HmarSpec(TOKENIZER, model, masked_depth=1)
    return MaskedTask(spec=spec, recipe=MaskedRecipe(**recipe), **common)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_accumulation_does_not_change_random_choices(stage, frozen):
    """Class dropout and masks are sampled before the batch is cut into microbatches."""
    results = []
    for count in (1, 2, 4):
        task = make_task(stage, count)
        state = step.init_state(task, jax.random.key(2), frozen)
        update = jax.jit(lambda *args, task=task: step.train_step(task, *args))
        results.append(update(state, frozen, BATCH, KEY))
    state, metrics = results[0]
    assert metrics["grad_norm"] > 0.01 and metrics["skipped"] == 0
    moments = lambda state: jax.tree.leaves(state.opt_state[0].mu)
    largest = max(float(abs(g).max()) for g in moments(state))
    for other, found in results[1:]:
        assert found.keys() == metrics.keys()
        for name in metrics:
            np.testing.assert_allclose(found[name], metrics[name], rtol=1e-5, err_msg=name)
        for a, b in zip(moments(other), moments(state), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * largest)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_prepared_batches(stage):
    task = make_task(stage)
    batch, rng = task.prepare_batch(BATCH, KEY)
    again, _ = task.prepare_batch(BATCH, KEY)
    other, _ = task.prepare_batch(BATCH, jax.random.key(5))
    jax.tree.map(np.testing.assert_array_equal, batch, again)
    assert not np.array_equal(batch["label"], other["label"])
    dropped = batch["label"] == task.spec.null_class
    assert 0 < dropped.sum() < 12
    assert np.array_equal(batch["label"][~dropped], BATCH["label"][~dropped])
    assert np.array_equal(batch["tokens"], BATCH["tokens"])
    assert not np.array_equal(jax.random.key_data(rng), jax.random.key_data(KEY))

    kept, _ = make_task(stage, class_dropout=0.0).prepare_batch(BATCH, KEY)
    assert np.array_equal(kept["label"], BATCH["label"])
    null, _ = make_task(stage, class_dropout=1.0).prepare_batch(BATCH, KEY)
    assert (null["label"] == task.spec.null_class).all()


def test_flops_counted_by_hand():
    """Against XLA's own count of an unrolled forward pass of matrix products."""
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
    class_ids = jax.ShapeDtypeStruct((1,), jnp.int32)
    scale_inputs = jax.ShapeDtypeStruct((1, 29, 32), jnp.float32)
    lowered = jax.jit(model.logits).lower(params, class_ids, scale_inputs)
    counted = lowered.cost_analysis()["flops"]
    products, attention = flops.block_forward(config)
    by_hand = products + attention + sum(flops.ends_forward(config))
    assert by_hand < counted < 1.1 * by_hand  # XLA also counts norms and softmax
    d16 = TransformerConfig(scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    assert flops.attention_cells(d16) == sum(s**4 for s in d16.scales)
    assert np.isclose(flops.next_scale_step(d16), 0.865e12, rtol=1e-3)
    causal = TransformerConfig(scales=(1, 2, 3), pattern="causal")
    assert flops.attention_cells(causal) == 1 + 4 * 5 + 9 * 14
    next_scale = flops.next_scale_step(d16)
    assert flops.masked_step(d16, 16) > 0.97 * next_scale
    assert 0.97 * next_scale > flops.masked_step(d16, 8) > 0.5 * next_scale
