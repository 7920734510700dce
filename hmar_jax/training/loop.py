"""A training run, top to bottom: directory, starting point, loop, checkpoints, previews.

A run starts from the latest good checkpoint of its directory, or from scratch where there is none.
"""

import contextlib
import functools
import hashlib
from typing import Any

import jax
from clu import parameter_overview
from etils import epath
from ml_collections import ConfigDict

from hmar_jax.config_files import to_dict
from hmar_jax.data.agreement import check_same_data
from hmar_jax.data.decode_errors import DecodeErrorLog
from hmar_jax.data.loader import restore_loader_state
from hmar_jax.errors import InputError
from hmar_jax.interruption import Interruptions
from hmar_jax.io import files, runs
from hmar_jax.io.checkpoints import RunCheckpoints, check_fits
from hmar_jax.io.history import History
from hmar_jax.io.locks import DirectoryLock, lock_together
from hmar_jax.io.models import save_model
from hmar_jax.parallel import processes, sharding
from hmar_jax.progress import phase
from hmar_jax.training import extension, weights_and_biases
from hmar_jax.training.after_step import OwedWork
from hmar_jax.training.batches import STEPS_TO_AGREE, Batches
from hmar_jax.training.compiled_steps import CompiledSteps, compile_steps
from hmar_jax.training.experiment import Experiment
from hmar_jax.training.metrics import LOGGER, log_to_file
from hmar_jax.training.reporting import Reporter
from hmar_jax.training.session import Session, follow_moved_run
from hmar_jax.training.state import TrainState
from hmar_jax.training.trainable import InitialParams
from hmar_jax.training.weights_and_biases import WandbRun


def run(
    config: ConfigDict,
    experiment: Experiment,
    workdir: str,
    interruptions: Interruptions | None = None,
    lock: DirectoryLock | None = None,
    *,
    allow_data_change: bool = False,
    extend: bool = False,
) -> Any:
    """Trains until the task's last step, from the latest good checkpoint where there is one.

    Every process of a run calls it; the first one writes what is written once.

    Args:
      config: the whole config; config.json keeps it.
      experiment: as built from the config.
      workdir: the run's directory, local (and seen by all hosts) or gs://. A second call resumes
        where the first ended or was killed, on any mesh and any number of hosts.
      interruptions: of the command. Ctrl-C, SIGHUP and SIGTERM save a checkpoint and end the run
        after the present step; `received` says so. None: they are handled here.
      lock: of the directory, held by the first process. None: it is taken here.
      allow_data_change: resume also on other images than those that the run was trained on.
      extend: resume also where the config or the images changed; see training/extension.py.

    Returns:
      The last state.

    Raises:
      InputError: the directory cannot be written, is no run directory, is in use by another
        process, or belongs to a run with another config, model or data set, or one that cannot be
        extended to these; or the hosts see different data sets.
      Interrupted: by a signal before the first step.
      FloatingPointError: loss or gradient was not finite for MAX_SKIPPED_IN_ROW steps in a row.
    """
    accepted = dict(allow_data_change=allow_data_change, extend=extend)
    again = functools.partial(run, config, experiment, workdir, **accepted)
    if interruptions is None:
        with Interruptions(only_noted=True) as own:
            return again(own, lock)
    if lock is None:
        with lock_together(workdir, "workdir") as own_lock:
            return again(interruptions, own_lock)
    with interruptions.deferred():  # no exception in the middle of a computation or a save
        stop = processes.StopRequest(interruptions)
        _check_same_errors(experiment.decode_errors)
        steps = compile_steps(experiment.task, experiment.mesh, experiment.frozen, config.ema_decay)
        directory, images = _prepare_together(workdir, config, experiment, steps, **accepted)
        with contextlib.ExitStack() as closing:
            if processes.is_primary():
                closing.enter_context(log_to_file(directory))
            if extend:
                _log_extension(experiment.history)
            elif images is not None:
                LOGGER.warning(
                    "this run resumes on other images, recorded in config.json: %s", images
                )
            checkpoints = closing.enter_context(
                RunCheckpoints(directory, config.keep_checkpoints, config.keep_best)
            )
            return _run(config, experiment, directory, steps, checkpoints, stop, lock)


def _run(
    config: ConfigDict,
    experiment: Experiment,
    directory: epath.Path,
    steps: CompiledSteps,
    checkpoints: RunCheckpoints,
    stop: processes.StopRequest,
    lock: DirectoryLock,
) -> Any:
    task, mesh = experiment.task, experiment.mesh
    LOGGER.info("%s", experiment.overview)
    for text in experiment.warnings if processes.is_primary() else ():
        LOGGER.warning("%s", text)
    keys = jax.random.split(jax.random.key(config.seed), 3)
    init_key, run_key, preview_key = (sharding.place_key(key, mesh) for key in keys)
    steps = compile_steps(task, mesh, experiment.frozen, config.ema_decay)
    was_changed = any(experiment.history)
    with phase("reading the latest checkpoint"):
        restored = checkpoints.restore_latest(steps.state, parts_may_differ=was_changed)
    start = 0 if restored is None else restored.step
    _check_reached(experiment.history.segment.from_step, start)
    owed = OwedWork(directory)
    resumes_work = restored is not None and owed.is_owed(start)
    if restored is not None and start >= task.steps and not resumes_work:
        LOGGER.info("this run is complete: step %d of %d", restored.step, task.steps)
        return restored.state
    stop.check()
    frozen = sharding.place(experiment.frozen, jax.tree.map(lambda x: x.sharding, steps.frozen))
    if restored is None:
        # Nothing is lost, and compilation takes long.
        with phase("compiling the initialization", at_once=True), stop.immediate():
            state = steps.init(init_key, frozen)
        if experiment.initial is not None:
            state = _start_from(experiment.initial(), state)
    else:
        state = extension.begin_new_parts(restored.state, steps, init_key, frozen)
        LOGGER.info("resuming from step %d", start)
    overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    LOGGER.debug("parameters\n%s", overview)
    LOGGER.debug("mesh %s of %s", dict(mesh.shape), mesh.devices.flat[0].device_kind)
    stop.check()
    with stop.immediate():  # waits for the network
        wandb = _start_wandb(config, directory)

    with contextlib.ExitStack() as closing:
        with stop.immediate():  # may encode all images
            iterator = iter(experiment.loader())
        closing.callback(iterator.close)
        if restored is not None:
            restore_loader_state(iterator, restored.metadata["data_state"])
        several = jax.process_count() > 1
        ahead = STEPS_TO_AGREE if several else 0
        batches = Batches(iterator, task.steps - start, ahead, stop.ask)
        reporter = None
        if processes.is_primary():
            reporter = Reporter(directory, start, task.steps, config.task, wandb)
            closing.callback(reporter.close)
        session = Session(
            config,
            experiment,
            directory,
            checkpoints,
            stop,
            lock,
            steps,
            frozen,
            run_key,
            preview_key,
            batches,
            reporter,
            owed,
            state,
            start,
        )
        # Whatever ends the loop, the device is idle afterwards: a process that ends during a
        # computation crashes.
        closing.callback(session.wait_for_device)
        if resumes_work:
            session.finish_step()
        closing.callback(session.report_decode_errors)  # of the last evaluation
        if not several:
            closing.enter_context(follow_moved_run(session.save_to))
        session.train()
    return session.state


def _start_from(initial: InitialParams, state: TrainState) -> TrainState:
    for note in initial.notes:
        LOGGER.info("%s", note)
    places = jax.tree.map(lambda x: x.sharding, state.params)
    return state.starting_from(lambda: sharding.place(initial.params, places))


def _start_wandb(config: ConfigDict, directory: epath.Path) -> WandbRun | None:
    """In the first process; all raise if it cannot start for a reason that the user can mend."""
    wandb, error = None, None
    if config.get("wandb") and processes.is_primary():
        try:
            wandb = weights_and_biases.start(directory, config.wandb, to_dict(config))
        except InputError as e:
            error = e
    processes.raise_on_all_processes(error)
    return wandb


def _log_extension(found: History) -> None:
    """What the run is extended by; of a rerun, that there is nothing new."""
    change = found.new
    if change is None:
        LOGGER.info("nothing is changed: this command has the run's own config and data")
        for former in found.recorded[-1:]:
            LOGGER.info("it was last changed after step %d: %s", former.from_step, former)
        return
    LOGGER.info("extended from step %d: %s", change.from_step, change)
    for key, (given, own) in change.kept.items():
        LOGGER.warning(
            "config.%s=%s is not used: the run was too short for it, began with %s, and keeps that",
            key,
            given,
            own,
        )


def _check_reached(from_step: int, start: int) -> None:
    """Raises InputError if a run was changed after a step whose checkpoint turns out damaged."""
    if start < from_step:
        raise InputError(
            f"the run was changed after step {from_step}, whose checkpoint is damaged and has been "
            f"set aside; rerun the command, and the change begins after step {start}"
        )


def _check_same_errors(errors: DecodeErrorLog) -> None:
    """Raises InputError unless all processes found the same held-out images unreadable."""
    paths = sorted(path for path, _ in errors.items)
    digests = processes.gather_messages(hashlib.sha256(repr(paths).encode()).hexdigest())
    if len(set(digests)) > 1:
        raise InputError(
            "the hosts must read the same images; some could read held-out images that others "
            "could not; rerun the command if that was a passing error"
        )


# The run directory


def _prepare_together(
    workdir: str,
    config: ConfigDict,
    experiment: Experiment,
    steps: CompiledSteps,
    allow_data_change: bool,
    extend: bool,
) -> tuple[epath.Path, str | None]:
    """The first process prepares the directory; if it cannot, or one does not see it, all raise.

    Returns:
      The directory, and in the first process how the run's images changed, if they did.
    """
    directory, images, error = files.absolute(workdir), None, None
    check_same_data(experiment.inputs.data)
    _check_same_history(experiment.history)
    if processes.is_primary():
        try:
            prepared = runs.compare(
                workdir,
                config,
                experiment.spec.to_json(),
                experiment.schema,
                experiment.inputs,
                allow_data_change,
                experiment.history,
                extend,
            )
            if extend:
                extension.check(experiment.history, experiment.schema)
                if experiment.history.new is not None:
                    check_fits(directory, experiment.history.new.from_step, steps.state)
            prepared.write()
            images = prepared.images
            _keep_parent(directory, experiment)
        except InputError as e:
            error = e
    processes.raise_on_all_processes(error)
    if not (directory / "config.json").exists():
        error = InputError(
            f"workdir {workdir} is not seen by host {jax.process_index()}; "
            "it must be a directory that all hosts share, or gs://"
        )
    processes.raise_on_all_processes(error)
    return directory, images


def _check_same_history(found: History) -> None:
    """Raises InputError unless all processes see the same history and newest checkpoint."""
    digests = processes.gather_messages(hashlib.sha256(repr(found).encode()).hexdigest())
    if len(set(digests)) > 1:
        raise InputError(
            "all processes must see the same run directory; some see other checkpoints or another "
            "config.json than others: rerun the command if that was a passing delay"
        )


def _keep_parent(directory: epath.Path, experiment: Experiment) -> None:
    parent = experiment.parent
    if parent is None or (directory / parent.folder / "config.json").exists():
        return
    try:
        save_model(
            directory / parent.folder,
            parent.spec.to_json(),
            parent.params,
            "The frozen model that this run is trained on top of.\n",
            overwrite=True,
        )
    except OSError as e:
        raise InputError(f"cannot write workdir {directory}: {e.strerror or e}") from None
