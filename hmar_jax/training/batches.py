"""The batches that a run trains on: a failure to read them costs none of the steps before."""

import collections
from collections.abc import Callable, Iterator
from typing import Any

from hmar_jax.data.loader import loader_state_to_bytes
from hmar_jax.errors import InputError
from hmar_jax.training.metrics import LOGGER

# Processes that train together stop after the same step, which they agree on. The others are two
# steps ahead at most (reporting.Meter) when one of them asks for it, and the agreement takes two.
STEPS_TO_AGREE = 6


class Batches:
    """Hands out batches, and knows where the loader stands after each.

    Attributes:
      position: of the loader, before the next batch; for a checkpoint.
      failure: why no more batches can be read; None while they can.
    """

    def __init__(
        self, iterator: Iterator[Any], count: int, ahead: int, on_failure: Callable[[], None]
    ):
        """Reads nothing yet.

        Args:
          iterator: of a loader, in the state to start from.
          count: batches that the run still needs.
          ahead: batches to read before they are needed. A process of several still has them when it
            can read no more, while all are asked to stop.
          on_failure: called once, if `take` finds the failure.
        """
        self.position, self.failure = loader_state_to_bytes(iterator), None
        self._iterator, self._left = iterator, count
        self._ahead, self._on_failure = ahead, on_failure
        self._read: collections.deque[tuple[Any, bytes]] = collections.deque()

    def fill(self) -> None:
        """Reads ahead; a failure is noted."""
        for _ in range(self._ahead):
            self._read_one()

    def take(self) -> Any:
        """The next batch; None if there is none because of the failure."""
        could_read = self.failure is None
        self._read_one()
        if could_read and self.failure is not None:
            self._on_failure()
        if not self._read:
            return None
        batch, self.position = self._read.popleft()
        return batch

    def _read_one(self) -> None:
        if self.failure is not None or not self._left:
            return
        try:
            batch = next(self._iterator)
            self._left -= 1
            self._read.append((batch, loader_state_to_bytes(self._iterator)))
            return
        except InputError as error:
            self.failure = error
        except (OSError, RuntimeError) as error:  # of a file system; of a worker process that died
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            self.failure = InputError(f"the training data cannot be read: {reason[:500]}")
            self.failure.__cause__ = error
        except Exception as error:
            self.failure = error
        LOGGER.debug("the training data cannot be read", exc_info=self.failure)
