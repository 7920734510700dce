"""The state of a run: what every kind of training saves to resume exactly."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TrainState:
    """Everything a run must save to resume exactly. Frozen parameters lie in the run directory."""

    step: jax.Array  # () int32, steps done, skipped ones included
    params: Any  # the trained ones
    opt_state: Any
    ema_params: Any  # exponential moving average of params, or {} where none is kept
    skipped: jax.Array  # () int32, steps whose loss or gradient was not finite
    skipped_in_row: jax.Array  # () int32, the latest ones of them without one between

    @classmethod
    def start(cls, params, opt_state, **more) -> "TrainState":
        """The state before the first step."""
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
        """The parameters for evaluation and sampling: the average where one is kept."""
        return self.ema_params or self.params
