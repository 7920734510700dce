"""Processes, on one host or on many, that train together: how they connect and how they agree.

Every process runs the same program and makes the same calls. JAX finds the other processes by
itself on SLURM, Cloud TPU, GKE, Open MPI and Kubernetes; elsewhere three flags say where the first
one is. Only the first process writes to the run directory, except for Orbax.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from hmar_jax.errors import InputError
from hmar_jax.interruption import Interruptions

_log = logging.getLogger(__name__)
_LONGEST_MESSAGE = 1000  # bytes, of what one process sends to the others
_QUIET_SECONDS = 3.0  # before it is said that this process waits for others
_NOTICE_SECONDS = 3.0  # JAX looks for a signal every second
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")


# Connecting


class Cluster(NamedTuple):
    """What started this process, and perhaps others with it."""

    name: str
    num_processes: int | None  # None: only the cluster's own service knows
    evidence: str  # such as "SLURM_NTASKS=4"


def find_cluster(environment: Mapping[str, str] | None = None) -> Cluster | None:
    """Finds the cluster that the environment variables name.

    JAX's own detection (jax._src.clusters) uses a cluster only if all its variables are set, and
    otherwise takes the process for a single one: a SLURM task that srun did not start, a process of
    Open MPI 5, a pod without the Kubernetes client. Here one variable is enough.

    Args:
      environment: None: os.environ.

    Returns:
      The first cluster of several, or of an unknown number of processes; else one of a single
      process; else None.
    """
    variables = os.environ if environment is None else environment
    found = []
    for name, job, count in (
        ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"),
        ("SLURM", "SLURM_JOB_ID", "SLURM_NTASKS"),
    ):
        if job in variables and count in variables:
            found.append(Cluster(name, _to_int(variables[count]), f"{count}={variables[count]}"))
    hosts = next((name for name in _TPU_HOSTS if name in variables), None)
    if hosts is not None:
        count = len(variables[hosts].split(","))
        evidence, slices = f"{hosts}={variables[hosts]}", variables.get("MEGASCALE_NUM_SLICES")
        if slices:
            evidence += f", MEGASCALE_NUM_SLICES={slices}"
            count = count * number if (number := _to_int(slices)) else None
        found.append(Cluster("Cloud TPU", count, evidence))
    elif "KUBERNETES_SERVICE_HOST" in variables and "JOB_COMPLETION_INDEX" in variables:
        # Set in the pods of indexed jobs; JAX connects no others.
        index = variables["JOB_COMPLETION_INDEX"]
        found.append(Cluster("Kubernetes", None, f"JOB_COMPLETION_INDEX={index}"))
    if address := variables.get("JAX_COORDINATOR_ADDRESS"):
        found.append(Cluster("JAX", None, f"JAX_COORDINATOR_ADDRESS={address}"))
    several = [cluster for cluster in found if cluster.num_processes != 1]
    return (several or found or [None])[0]


def _to_int(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _find_tpu_vm() -> Cluster | None:
    """A Cloud TPU VM has no variables: JAX asks the metadata server, on a machine with TPUs."""
    from jax._src.clusters import GceTpuCluster  # JAX has no public name for it

    try:
        if not GceTpuCluster.is_env_present():
            return None
        return Cluster("Cloud TPU", GceTpuCluster.get_process_count(), "metadata of the VM")
    except Exception as error:  # of the request
        raise InputError(_not_connected("Cloud TPU", error)) from error


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_devices: tuple[int, ...] | None = None,
) -> None:
    """Connects this process with the others, if there are any. Call it before any computation.

    Args:
      coordinator: HOST:PORT of the first process. Given with the next two, it replaces what the
        cluster says.
      num_processes: number of all processes; 1: this process is alone, whatever the cluster says.
      process_id: index of this process, from 0.
      local_devices: indices of the GPUs of this host that this process uses. None: on SLURM and
        Open MPI the one of the process's index on the host; elsewhere all.

    Raises:
      InputError: the flags are incomplete or out of range, or the processes cannot connect though
        the flags or the cluster's environment variables name several.
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
            f"{', '.join(flags)} must be given together; missing: {', '.join(missing)}"
        )
    if coordinator is None:
        cluster = find_cluster() or _find_tpu_vm()
        if cluster is None:
            return
        where, alone = f"{cluster.name} ({cluster.evidence})", cluster.num_processes == 1
    else:
        _check_flags(coordinator, num_processes, process_id)
        where, alone = coordinator, False
    # JAX waits for the others for minutes.
    waiting = threading.Timer(
        _QUIET_SECONDS, _log.info, ("waiting for the other processes of %s ...", where)
    )
    waiting.daemon = True
    try:
        if not alone:
            waiting.start()
        jax.distributed.initialize(
            coordinator, num_processes, process_id, local_device_ids=local_devices
        )
    except Exception as error:  # ValueError, RuntimeError, and what the cluster's service raises
        if alone:
            return  # such as a notebook in a job of one task, after its first computation
        raise InputError(_not_connected(where, error)) from error
    finally:
        waiting.cancel()


def _check_flags(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(
            f"--coordinator must be HOST:PORT, such as 10.0.0.1:8476; got {coordinator!r}"
        )
    if num_processes is None or process_id is None or not 0 <= process_id < num_processes:
        raise InputError(
            f"--process_id must be at least 0 and below --num_processes={num_processes}; "
            f"got {process_id}"
        )


def _not_connected(where: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return (
        f"cannot connect to the other processes of {where}: {reason}. Pass --coordinator, "
        "--num_processes and --process_id; or, to use this process alone, --num_processes=1 "
        "(hmar tokenize: --part=0/1)"
    )


# Agreeing


def is_primary() -> bool:
    """Whether this is the first process, which writes what is written once."""
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
    """Whether a run is to save a checkpoint and end, because of a signal to one of its processes.

    With several processes all of them report it after the same step, whichever of them got the
    signal. That is JAX's preemption service, which handles SIGTERM since the processes connected;
    Orbax's `reached_preemption` calls the same function. Ctrl-C and SIGHUP are passed on to it.

    Attributes:
      stopped: whether the run ends after the present step.
    """

    def __init__(self, interruptions: Interruptions):
        self.stopped = False
        self._interruptions, self._several = interruptions, jax.process_count() > 1
        if self._several:
            interruptions.release(signal.SIGTERM)
            interruptions.on_signal = lambda: os.kill(os.getpid(), signal.SIGTERM)
            if interruptions.received is not None:
                interruptions.on_signal()

    def ask(self) -> None:
        """Asks all processes to stop after the same step, if there are several."""
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(_NOTICE_SECONDS)

    def requested(self, step: int) -> bool:
        """Whether to stop after this step. Call it in every process after every step."""
        if self.stopped:
            return True
        if not self._several:
            self.stopped = self._interruptions.received is not None
        elif multihost_utils.reached_preemption_sync_point(step):
            self.stopped = True
            names = [name for name in gather_messages(self._name()) if name]
            self._interruptions.received = signal.Signals[(names or ["SIGTERM"])[0]]
        return self.stopped

    def ignore(self) -> None:
        """Forgets the signals: the run is complete, and there is nothing to resume."""
        self.stopped, self._interruptions.received = False, None

    def _name(self) -> str:
        received = self._interruptions.received
        return "" if received is None else received.name

    def check(self) -> None:
        """Raises Interrupted, if this process is alone: others would wait for it for ever."""
        if not self._several:
            self._interruptions.check()

    def immediate(self) -> contextlib.AbstractContextManager[None]:
        """A context in which a signal raises Interrupted at once, if this process is alone."""
        return contextlib.nullcontext() if self._several else self._interruptions.immediate()
