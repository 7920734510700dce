"""Several processes, on one host or on many, that train together: how they meet, and how they agree.

Every process runs the same program and makes the same calls. JAX finds the others by itself on SLURM, Cloud TPU, GKE, Open MPI and
Kubernetes; elsewhere three flags say where they meet. Only the first process writes to the run directory, Orbax apart.
"""

import signal

import jax
import numpy as np
from jax.experimental import multihost_utils

from hmar_jax.errors import InputError

_LONGEST_MESSAGE = 1000  # bytes, of what one process sends to the others


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_devices: tuple[int, ...] | None = None,
) -> None:
    """Meets the other processes, if there are any. Call it before anything is computed.

    Args:
      coordinator: HOST:PORT of the first process. With the other two it takes the place of what the cluster says.
      num_processes: of them all; 1 stays alone, whatever the cluster says.
      process_id: of this one, from 0.
      local_devices: numbers of the GPUs of this host that this process takes. None: on SLURM and Open MPI one, that of the
        process's number on the host; elsewhere all.

    Raises:
      InputError: the flags are incomplete or out of range, or the others could not be met.
    """
    if num_processes == 1 or jax.distributed.is_initialized():
        return
    flags = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in flags.items() if value is None]
    if len(missing) not in (0, 3):
        raise InputError(
            f"{' and '.join(missing)} missing: --coordinator, --num_processes and --process_id go together"
        )
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise InputError(
                f"--coordinator {coordinator!r}: HOST:PORT is wanted, such as 10.0.0.1:8476"
            )
        if not 0 <= process_id < num_processes:
            raise InputError(
                f"--process_id {process_id}: from 0 to {num_processes - 1} is wanted (--num_processes {num_processes})"
            )
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, local_device_ids=local_devices
        )
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):
            raise InputError(f"the processes could not meet: {error}") from error
        # JAX knows no cluster here: this process is alone.
    except RuntimeError as error:
        if "before" in str(error) and coordinator is None:
            return  # a notebook or a test, which has computed already: it is alone
        raise InputError(
            f"the processes could not meet: {' '.join(str(error).split())[:300]}"
        ) from error


def is_primary() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def gather_messages(message: str) -> list[str]:
    """The messages of all processes, in their order; every process must call it.

    Args:
      message: of this process, "" for none. What is longer than _LONGEST_MESSAGE bytes is cut off.
    """
    if jax.process_count() == 1:
        return [message]
    text = message.encode()[:_LONGEST_MESSAGE]
    mine = np.zeros(_LONGEST_MESSAGE, np.uint8)
    mine[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(mine)
    return [bytes(row[row != 0]).decode(errors="replace") for row in rows]


def raise_on_all_processes(error: Exception | None) -> None:
    """Raises on every process where one of them has an error; every process must call it.

    Args:
      error: of this process, or None.

    Raises:
      The error of the first process that has one: on that process itself, elsewhere an error with
      its message, which is an InputError if that is one, and otherwise a RuntimeError.
    """
    report = ""
    if error is not None:
        kind = "" if isinstance(error, InputError) else type(error).__name__
        report = f"{kind}: {error}"
    for process, found in enumerate(gather_messages(report)):
        if not found:
            continue
        if process == jax.process_index() and error is not None:
            raise error
        kind, _, text = found.partition(": ")
        if not kind:
            raise InputError(text)
        raise RuntimeError(f"process {process} failed with {kind}: {text}")


def broadcast_from_primary(value: int) -> int:
    """The value that the primary process has; every process must call it."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def wait_for_all(name: str) -> None:
    """Returns when every process has called it with this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class StopRequest:
    """Whether SIGTERM came, to this process or, for all at the same step, to any of them: the run saves and ends well."""

    def __init__(self):
        self._asked = False
        # Among several processes JAX's own handler, installed when they met, tells the others and settles the step.
        self._together = jax.process_count() > 1
        self._previous = None if self._together else signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_):
        self._asked = True

    def asked(self, step: int) -> bool:
        """After every step, in every process; True in all of them after the same one."""
        if self._together and not self._asked:
            self._asked = multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def restore(self) -> None:
        if not self._together:
            signal.signal(signal.SIGTERM, self._previous)
