"""The state of a run: what every kind of training has, and the step around a task's own that keeps it sound.

A step whose loss or gradient is not finite changes nothing but the count of steps, so that the next one has other images
and other random numbers. Beside the parameters an exponential moving average of them may be kept (Polyak and Juditsky, 1992).
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from hmar_jax.training.metrics import Mean

MAX_SKIPPED_IN_ROW = 10  # then the run stops


@flax.struct.dataclass
class TrainState:
    """Everything a run must save to go on exactly. What is frozen lies beside it in the run directory."""

    step: jax.Array  # () int32, steps done, skipped ones too
    params: Any  # the trained ones
    opt_state: Any
    ema_params: Any  # moving average of params, or {} where none is kept
    skipped: jax.Array  # () int32, steps that were not finite
    skipped_in_row: jax.Array  # () int32, the last ones of them

    @classmethod
    def start(cls, params, opt_state, **more) -> "TrainState":
        """Before the first step."""
        zero = jnp.zeros((), jnp.int32)
        return cls(
            step=zero,
            params=params,
            opt_state=opt_state,
            ema_params={},
            skipped=zero,
            skipped_in_row=zero,
            **more,
        )

    @property
    def eval_params(self) -> Any:
        """What is evaluated and sampled with: the average where one is kept."""
        return self.ema_params or self.params


def init(task, rng: jax.Array, *extra, ema_decay: float = 0.0) -> TrainState:
    """The task's state before the first step, with an average where ema_decay is not 0."""
    state = task.init(rng, *extra)
    return state.replace(ema_params=jax.tree.map(jnp.copy, state.params)) if ema_decay else state


def train_step(
    task, state: TrainState, batch, rng: jax.Array, *extra, ema_decay: float = 0.0
) -> tuple[TrainState, dict[str, Any]]:
    """The task's step, or where one of its metrics is not finite, none.

    Args:
      task: has train_step(state, batch, rng, *extra) -> (state, metrics).
      ema_decay: of the average, near 1; it is less over the first steps, (1 + step) / (10 + step), so that the average
        soon forgets the initial parameters. 0: no average.

    Returns:
      The next state, and the metrics with "skipped": 0 or 1, and "skipped_in_row".
    """
    new, metrics = task.train_step(state, batch, rng, *extra)
    finite = jnp.array(True)
    for value in metrics.values():
        if not isinstance(value, Mean):
            finite &= jnp.isfinite(value)
    if ema_decay:
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        new = new.replace(
            ema_params=jax.tree.map(
                lambda e, p: decay * e + (1 - decay) * p, state.ema_params, new.params
            )
        )
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    bad = 1 - finite.astype(jnp.int32)
    kept = kept.replace(
        step=state.step + 1,
        skipped=state.skipped + bad,
        skipped_in_row=bad * (state.skipped_in_row + 1),
    )
    return kept, metrics | {"skipped": bad, "skipped_in_row": kept.skipped_in_row}
