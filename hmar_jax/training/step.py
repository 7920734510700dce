"""One training step, the same for every task: gradients, accumulation, optimizer, average, skips.

A step whose loss or gradient is not finite changes nothing but the count of steps, so the next one
sees other images and other random numbers. (optax.apply_if_finite knows neither the average of the
parameters nor the count of steps.) An exponential moving average of the parameters may be kept
beside them (Polyak and Juditsky, 1992).

Letters: B images of a batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hmar_jax.parallel.sharding import Rules, constrain_batch, constrain_like_params
from hmar_jax.training.metrics import Mean
from hmar_jax.training.state import TrainState
from hmar_jax.training.task import Batch, Loss, Metrics, Params, Task

MAX_SKIPPED_IN_ROW = 10  # then the run stops


def init_state(task: Task, rng: jax.Array, frozen: Params, ema_decay: float = 0.0) -> TrainState:
    """The state before the first step, with a moving average where ema_decay is not 0."""
    if hasattr(task, "init_state"):
        state = task.init_state(rng, frozen)
    else:
        params = task.init_params(rng, frozen)
        state = TrainState.start(params, make_optimizer(task).init(params))
    return state.replace(ema_params=jax.tree.map(jnp.copy, state.params)) if ema_decay else state


def train_step(
    task: Task,
    state: TrainState,
    frozen: Params,
    batch: Batch,
    rng: jax.Array,
    ema_decay: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """One step of any task.

    Args:
      frozen: parameters that the task uses and does not change.
      batch: arrays (B, ...).
      rng: the key of the run; the step's own key is folded from it.
      ema_decay: decay of the moving average, near 1; 0: no average. It is less in the first steps,
        (1 + step) / (10 + step), so that the average soon forgets the initial parameters.

    Returns:
      The next state, and metrics: scalars and Means, with "skipped" (0 or 1) and "skipped_in_row".
    """
    update = task.train_step if hasattr(task, "train_step") else gradient_step(task)
    new, metrics = update(state, frozen, batch, rng)
    finite = jnp.array(True)
    for value in metrics.values():
        if not isinstance(value, Mean):
            finite &= jnp.isfinite(value)
    if ema_decay:
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update(new.params, state.ema_params, 1 - decay)
        new = new.replace(ema_params=average)
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    bad = 1 - finite.astype(jnp.int32)
    kept = kept.replace(
        step=state.step + 1,
        skipped=state.skipped + bad,
        skipped_in_row=bad * (state.skipped_in_row + 1),
    )
    return kept, metrics | {"skipped": bad, "skipped_in_row": kept.skipped_in_row}


def eval_step(task: Task, state: TrainState, frozen: Params, batch: Batch) -> dict[str, Mean]:
    """Means over the images that batch["valid"] marks, with the averaged parameters if any."""
    return task.eval_metrics(state.eval_params, frozen, batch, state.step)


def preview(task: Task, state: TrainState, frozen: Params, images: Any, rng: jax.Array):
    """Rows of images to look at, see Task.preview."""
    return task.preview(state.eval_params, frozen, images, rng, state.step)


def gradient_step(task: Task) -> Callable:
    """The update of a task with one loss: (state, frozen, batch, rng) -> (state, metrics)."""

    def update(state, frozen, batch, rng):
        batch, rng = task.prepare_batch(batch, jax.random.fold_in(rng, state.step))
        loss = lambda params, batch, rng: task.loss(params, frozen, batch, rng, state.step)
        grads, metrics = gradients(
            loss, state.params, batch, rng, task.grad_accum_steps, task.partition_rules
        )
        state, more = apply_gradients(task, state, grads)
        return state, metrics | more

    return update


def make_optimizer(task: Task) -> optax.GradientTransformation:
    """The optimizer of a task's run."""
    return task.optimizer.make(task.steps, task.decay_mask)


def apply_gradients(task: Task, state: TrainState, grads: Params) -> tuple[TrainState, Metrics]:
    """The state after one optimizer step, and the gradient's norm and the learning rate."""
    updates, opt_state = make_optimizer(task).update(grads, state.opt_state, state.params)
    metrics = {
        "grad_norm": optax.tree.norm(grads),
        "lr": task.optimizer.learning_rates(task.steps)(state.step),
    }
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


def gradients(
    loss: Loss,
    params: Params,
    batch: Batch,
    rng: jax.Array,
    num_microbatches: int = 1,
    rules: Rules = (),
) -> tuple[Params, Metrics]:
    """The mean gradient of a loss over a batch, and the means of its metrics.

    Microbatch i takes the rows i, i + num_microbatches, ...: each device keeps its own rows,
    however the batch is divided over devices.

    Args:
      loss: (params, batch, rng) -> mean loss and metrics.
      batch: arrays (B, ...), B a multiple of num_microbatches.
      num_microbatches: how many parts are computed one after another, for less memory.
      rules: how gradients are laid out on a mesh, see parallel/sharding.py.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if num_microbatches == 1:
        (_, metrics), grads = gradient(params, batch, rng)
        return constrain_like_params(grads, rules), metrics

    def cut(x):  # (B, ...) -> (num_microbatches, B / num_microbatches, ...)
        return x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1)

    def add(total, microbatch):
        rows, key = microbatch
        (_, metrics), grads = gradient(params, jax.tree.map(constrain_batch, rows), key)
        return constrain_like_params(jax.tree.map(jnp.add, total, grads), rules), metrics

    zeros = constrain_like_params(jax.tree.map(jnp.zeros_like, params), rules)
    keys = jax.random.split(rng, num_microbatches)
    total, metrics = jax.lax.scan(add, zeros, (jax.tree.map(cut, batch), keys))
    mean = lambda x: jax.tree.map(lambda y: y.sum(0), x) if isinstance(x, Mean) else x.mean(0)
    grads = jax.tree.map(lambda g: g / num_microbatches, total)
    return grads, {name: mean(value) for name, value in metrics.items()}
