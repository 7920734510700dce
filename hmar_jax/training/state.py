"""The state of a run: what every kind of training saves to resume exactly."""

from collections.abc import Callable
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

    def starting_from(self, place: Callable[[], Any]) -> "TrainState":
        """The state before the first step with other parameters, and an average that begins there.

        Args:
          place: puts the parameters on the devices; each call makes its own copy, as a step donates
            the buffers of its state.
        """
        return self.replace(params=place(), ema_params=place() if self.ema_params else {})

    @property
    def eval_params(self) -> Any:
        """The parameters for evaluation and sampling: the average where one is kept."""
        return self.ema_params or self.params
