"""AdamW with the published schedules of learning rate and weight decay.

HMAR (arXiv 2506.04421) trains with VAR's recipe; the schedules are those of the published code, of which the recorded numbers
are a test. `it` counts steps from 0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from hmar_jax.errors import InputError

SCHEDULES = ("cos", "lin", "lin0", "lin00", "lin<T>", "exp")
_DECAYED = (
    "kernel",
    "class_emb",
    "mask_embed",
)  # every other leaf is a bias, a norm, a position or a scale


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
      kind: "cos"; "lin" and "lin0" hold the peak for 15 % and 5 % of what follows the warm-up, then fall linearly;
        "lin00" falls at once; "lin<T>", such as "lin0.3", falls slowly until T, then fast; "exp" holds for 15 %.
      peak: learning rate after the warm-up.
      warmup, total: steps.
      start_ratio, end_ratio: first and last learning rate, of the peak (wp0 and wpe in the published code).

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
        raise InputError(f"schedule={kind!r}: known are {', '.join(SCHEDULES)} with 0 < T < 1")
    middle = (1 + end + (1 - end) * (1 - turn)) / 2
    return lambda p: jnp.where(
        p < turn, 1 + (middle - 1) * p / turn, end + (middle - end) * (1 - p) / (1 - turn)
    )


def wd_schedule(*, start: float, end: float, total: int) -> Callable:
    """Weight decay at each step: a cosine from start to end over the whole run, warm-up included."""
    return lambda it: end + (start - end) * (0.5 + 0.5 * jnp.cos(jnp.pi * it / max(total - 1, 1)))


def decay_mask(params):
    """True for the leaves that weight decay acts on: weight matrices, class embeddings and the mask embedding."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path[-1]) in _DECAYED, params)


def _name(key) -> str:
    return str(getattr(key, "key", getattr(key, "name", key)))


def adamw(
    learning_rate: Callable, weight_decay: Callable, *, b1=0.9, b2=0.95, eps=1e-8, clip: float = 0.0
) -> optax.GradientTransformation:
    """AdamW (decoupled, decay times learning rate) after clipping by the global norm; clip 0 is off."""
    steps = [optax.clip_by_global_norm(clip)] if clip else []
    steps += [
        optax.scale_by_adam(b1, b2, eps),
        _scheduled_decay(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    ]
    return optax.chain(*steps)


def _scheduled_decay(weight_decay: Callable) -> optax.GradientTransformation:
    """Adds weight_decay(step) times the parameter to the update of each decayed leaf."""

    def update(updates, state, params):
        rate = weight_decay(state.count)
        updates = jax.tree.map(
            lambda u, p, decayed: u + rate * p if decayed else u,
            updates,
            params,
            decay_mask(params),
        )
        return updates, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(
        lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update
    )
