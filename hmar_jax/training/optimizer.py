"""AdamW with the published schedules of learning rate and weight decay.

HMAR (arXiv 2506.04421) trains with VAR's recipe. The schedules are those of the published code,
whose recorded numbers are a test. `it` counts steps from 0.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hmar_jax.errors import InputError
from hmar_jax.settings import Settings, setting

SCHEDULES = ("cos", "lin", "lin0", "lin00", "lin<T>", "exp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings):
    """AdamW and its schedules. Steps are counted from 0."""

    learning_rate: float = setting(1e-3, "Peak learning rate.", at_least=0)
    schedule: str = setting("lin0", f"Learning-rate schedule: {', '.join(SCHEDULES)}, 0 < T < 1.")
    warmup_steps: int = setting(20, "Steps of linear warm-up.", at_least=0, share_of_run=0.05)
    start_ratio: float = setting(0.005, "First learning rate, relative to the peak.", at_least=0)
    end_ratio: float = setting(0.1, "Last learning rate, relative to the peak.", at_least=0)
    weight_decay: float = setting(0.05, "Decoupled weight decay at the first step.", at_least=0)
    weight_decay_end: float | None = setting(
        None, "Weight decay at the last step; None: the same as at the first.", at_least=0
    )
    b1: float = setting(0.9, "Decay of Adam's first moment.", at_least=0, below=1)
    b2: float = setting(0.95, "Decay of Adam's second moment.", at_least=0, below=1)
    clip: float = setting(2.0, "Largest global norm of a gradient; 0: no clipping.", at_least=0)

    def learning_rates(self, steps: int) -> Callable:
        """The learning rate at each of so many steps."""
        return lr_schedule(
            self.schedule,
            peak=self.learning_rate,
            warmup=self.warmup_steps,
            total=steps,
            start_ratio=self.start_ratio,
            end_ratio=self.end_ratio,
        )

    def make(self, steps: int, decay_mask: Callable[[Any], Any]) -> optax.GradientTransformation:
        """The optimizer of a run of so many steps; `decay_mask(params)` is a tree of bool."""
        end = self.weight_decay if self.weight_decay_end is None else self.weight_decay_end
        decay = wd_schedule(start=self.weight_decay, end=end, total=steps)
        return adamw(
            self.learning_rates(steps), decay, decay_mask, b1=self.b1, b2=self.b2, clip=self.clip
        )


def lr_schedule(
    kind: str,
    *,
    peak: float,
    warmup: int,
    total: int,
    start_ratio: float = 0.005,
    end_ratio: float = 0.1,
) -> Callable:
    """The learning rate at each step.

    Args:
      kind: "cos"; "lin" and "lin0" hold the peak for 15 % and 5 % of what follows the warm-up, then
        fall linearly; "lin00" falls at once; "lin<T>", such as "lin0.3", falls slowly until T, then
        fast; "exp" holds for 15 %.
      peak: learning rate after the warm-up.
      warmup, total: steps.
      start_ratio, end_ratio: first and last learning rate, relative to the peak (wp0 and wpe in the
        published code).

    Raises:
      InputError: unknown kind.
    """
    after = _after_warmup(kind, end_ratio)

    def schedule(it):
        rising = start_ratio + (1 - start_ratio) * it / max(warmup, 1)
        progress = (it - warmup) / max(total - 1 - warmup, 1)
        return peak * jnp.where(it < warmup, rising, after(jnp.clip(progress, 0, 1)))

    return schedule


def _after_warmup(kind: str, end: float) -> Callable:
    """The ratio to the peak as a function of progress p in [0, 1]."""
    hold = {"lin": 0.15, "lin0": 0.05, "lin00": 0.0}
    if kind == "cos":
        return lambda p: end + (1 - end) * (0.5 + 0.5 * jnp.cos(jnp.pi * p))
    if kind in hold:
        flat = hold[kind]
        return lambda p: jnp.where(p < flat, 1.0, end + (1 - end) * (1 - p) / (1 - flat))
    if kind == "exp":
        flat = 0.15
        return lambda p: jnp.where(p < flat, 1.0, jnp.exp((p - flat) / (1 - flat) * jnp.log(end)))
    try:
        turn = float(kind.removeprefix("lin")) if kind.startswith("lin") else -1.0
    except ValueError:
        turn = -1.0
    if not 0 < turn < 1:
        raise InputError(
            f"schedule must be one of {', '.join(SCHEDULES)} with 0 < T < 1; got {kind!r}"
        )
    middle = (1 + end + (1 - end) * (1 - turn)) / 2
    return lambda p: jnp.where(
        p < turn, 1 + (middle - 1) * p / turn, end + (middle - end) * (1 - p) / (1 - turn)
    )


def wd_schedule(*, start: float, end: float, total: int) -> Callable:
    """Weight decay at each step: a cosine from start to end over the run, warm-up included."""
    return lambda it: end + (start - end) * (0.5 + 0.5 * jnp.cos(jnp.pi * it / max(total - 1, 1)))


def leaves_named(*names: str) -> Callable[[Any], Any]:
    """A decay mask: True for the leaves of these names, whatever the modules around them."""
    return lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) in names, params
    )


kernels = leaves_named("kernel")  # every other leaf is a bias, a norm or a scale


def adamw(
    learning_rate: Callable,
    weight_decay: Callable,
    decay_mask: Callable[[Any], Any] = kernels,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    clip: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101): decoupled decay, times the learning rate.

    Args:
      learning_rate, weight_decay: functions of the step.
      decay_mask: from parameters to a tree of bool, the leaves that decay.
      clip: largest global norm of the gradient; 0 is off.
    """
    steps = [optax.clip_by_global_norm(clip)] if clip else []
    steps += [
        optax.scale_by_adam(b1, b2, eps),
        _scheduled_decay(weight_decay, decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    ]
    return optax.chain(*steps)


def _scheduled_decay(weight_decay: Callable, decay_mask: Callable) -> optax.GradientTransformation:
    """Adds weight_decay(step) times the parameter to the update of each leaf that decays.

    optax.add_decayed_weights takes a number, not a schedule that advances with the steps.
    """

    def update(updates, state, params):
        rate = weight_decay(state.count)
        updates = jax.tree.map(
            lambda u, p, decays: u + rate * p if decays else u,
            updates,
            params,
            decay_mask(params),
        )
        return updates, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(
        lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update
    )
