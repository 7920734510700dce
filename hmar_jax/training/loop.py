"""A training run, top to bottom: directory, starting point, loop, checkpoints, previews.

A run starts from the latest good checkpoint of its directory, or from scratch where there is none.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hmar_jax.data.agreement import check_same_data
from hmar_jax.data.decode_errors import DecodeErrorLog
from hmar_jax.data.loader import restore_loader_state
from hmar_jax.errors import InputError
from hmar_jax.interruption import Interrupted, Interruptions
from hmar_jax.io import files, runs
from hmar_jax.io.checkpoints import RunCheckpoints
from hmar_jax.io.locks import DirectoryLock, MovedDirectoryError, lock_together
from hmar_jax.io.models import save_model
from hmar_jax.parallel import processes, sharding
from hmar_jax.parallel.chips import peak_flops
from hmar_jax.progress import announce
from hmar_jax.training.after_step import AfterStep, OwedWork
from hmar_jax.training.batches import STEPS_TO_AGREE, Batches
from hmar_jax.training.compiled_steps import compile_steps
from hmar_jax.training.experiment import Experiment
from hmar_jax.training.metrics import LOGGER, log_to_file
from hmar_jax.training.reporting import Meter, Reporter, log_first_step, report_decode_errors


def run(
    config: ConfigDict,
    experiment: Experiment,
    workdir: str,
    interruptions: Interruptions | None = None,
    lock: DirectoryLock | None = None,
    *,
    allow_data_change: bool = False,
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

    Returns:
      The last state.

    Raises:
      InputError: the directory cannot be written, is no run directory, is in use by another
        process, or belongs to a run with another config, model or data set; or the hosts see
        different data sets.
      Interrupted: by a signal before the first step.
      FloatingPointError: loss or gradient was not finite for MAX_SKIPPED_IN_ROW steps in a row.
    """
    again = functools.partial(run, config, experiment, workdir, allow_data_change=allow_data_change)
    if interruptions is None:
        with Interruptions(only_noted=True) as own:
            return again(own, lock)
    if lock is None:
        with lock_together(workdir, "workdir") as own_lock:
            return again(interruptions, own_lock)
    with interruptions.deferred():  # no exception in the middle of a computation or a save
        stop = processes.StopRequest(interruptions)
        _check_same_errors(experiment.decode_errors)
        directory, change = _prepare_together(workdir, config, experiment, allow_data_change)
        with contextlib.ExitStack() as closing:
            if processes.is_primary():
                closing.enter_context(log_to_file(directory))
            if change is not None:
                LOGGER.warning(
                    "this run resumes on other images, recorded in config.json: %s", change
                )
            checkpoints = closing.enter_context(
                RunCheckpoints(directory, config.keep_checkpoints, config.keep_best)
            )
            return _run(config, experiment, directory, checkpoints, stop, lock)


def _run(
    config: ConfigDict,
    experiment: Experiment,
    directory: epath.Path,
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
    restored = checkpoints.restore_latest(steps.state)
    start = 0 if restored is None else restored.step
    owed = OwedWork(directory)
    resumes_work = restored is not None and owed.is_owed(start)
    if restored is not None and start >= task.steps and not resumes_work:
        LOGGER.info("this run is complete: step %d of %d", restored.step, task.steps)
        return restored.state
    stop.check()
    frozen = sharding.place(experiment.frozen, jax.tree.map(lambda x: x.sharding, steps.frozen))
    if restored is None:
        announce("compiling the initialization")
        with stop.immediate():  # nothing is lost, and compilation takes long
            state = steps.init(init_key, frozen)
    else:
        state = restored.state
        LOGGER.info("resuming from step %d", start)
    overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    LOGGER.debug("parameters\n%s", overview)
    LOGGER.debug("mesh %s of %s", dict(mesh.shape), mesh.devices.flat[0].device_kind)
    stop.check()

    primary = processes.is_primary()
    with contextlib.ExitStack() as closing:
        with stop.immediate():  # may encode all images
            iterator = iter(experiment.loader())
        closing.callback(iterator.close)
        if restored is not None:
            restore_loader_state(iterator, restored.metadata["data_state"])
        several = jax.process_count() > 1
        ahead = STEPS_TO_AGREE if several else 0
        batches = Batches(iterator, task.steps - start, ahead, stop.ask)
        reporter = Reporter(directory, start, task.steps, config.task) if primary else None
        if reporter is not None:
            closing.callback(reporter.close)
        report = reporter.report if reporter is not None else lambda step, means: None
        store_loss = checkpoints.record_validation_loss if config.keep_best else lambda *_: None
        after_step = AfterStep(
            steps, frozen, experiment, directory, preview_key, report, store_loss, stop.check
        )
        step = start
        # Whatever ends the loop, the device is idle afterwards: a process that ends during a
        # computation crashes. A lambda: the last state counts.
        closing.callback(lambda: _wait_for_device(state))

        def finish_step() -> None:
            """Evaluation and preview, where they are due; the step has been saved."""
            with _stops(stop):
                after_step.run(step, state, *_due_after(step, config, experiment))

        if resumes_work:
            finish_step()
        # Images that could not be decoded and have been named: also those of cached crops.
        num_reported = report_decode_errors(experiment.decode_errors, 0)
        # Those of the last evaluation. A lambda: the last count counts.
        closing.callback(lambda: report_decode_errors(experiment.decode_errors, num_reported))
        meter = Meter(config.batch_size, _peak_images_per_second(task, mesh))

        def save(has_work: bool = False) -> None:
            lock.check(look=True)
            meter.check()
            if reporter is not None:
                reporter.sync()  # lines before the checkpoint are not written again
            if has_work:
                owed.note(step)
            checkpoints.save(step, state, batches.position, steps_of_run=task.steps)

        def save_elsewhere(directory: epath.Path) -> int:
            with RunCheckpoints(directory, config.keep_checkpoints, config.keep_best) as moved:
                moved.save(step, state, batches.position, steps_of_run=task.steps)
            return step

        if not several:
            closing.enter_context(_follows(save_elsewhere))
        if step < task.steps:
            announce("reading the first images")
            batches.fill()
            processes.raise_on_all_processes(batches.failure)
        while step < task.steps and not stop.stopped:
            with meter.time("data"):
                batch = batches.take()
                if batch is None:
                    break
                batch = sharding.global_batch(mesh, batch, config.batch_size)
            step += 1
            first, last = step == start + 1, step == task.steps
            if first:
                announce("compiling the training step")
            with stop.immediate() if first else contextlib.nullcontext():
                state, metrics = steps.train_step(state, frozen, batch, run_key)
            meter.add(step, metrics)
            if first:
                log_first_step(step, task.steps, metrics)

            if reporter is not None:
                reporter.advance()
            if step % config.log_every == 0 or last:
                report(step, meter.read())
                num_reported = report_decode_errors(experiment.decode_errors, num_reported)
            with meter.time("excluded"):
                lock.check()
                stopped = stop.requested(step)
                has_work = any(_due_after(step, config, experiment))
                if has_work or last or stopped or step % config.checkpoint_every == 0:
                    save(has_work)
                if has_work and not stopped:
                    checkpoints.wait()  # on disk, whatever happens in the evaluation
                    finish_step()
        if batches.failure is not None and not stop.stopped and step < task.steps:
            if several:  # too late: the others compute a step that this process has no part of
                raise batches.failure
            if step > start:
                save()
        if step < task.steps:
            _raise_if_no_data(batches.failure, checkpoints, step, step > start)
        if stop.stopped and (step < task.steps or owed.is_owed(step)):
            LOGGER.info("stopped by a signal after step %d; rerun the command to resume", step)
        else:
            stop.ignore()
    return state


def _due_after(step: int, config: ConfigDict, experiment: Experiment) -> tuple[bool, bool]:
    """Whether a validation and a preview are due after a step."""
    last, task = step == experiment.task.steps, experiment.task
    evaluates = experiment.validation is not None and (step % config.eval_every == 0 or last)
    can_preview = not task.num_preview_images or experiment.preview_images is not None
    return evaluates, can_preview and (step % config.sample_every == 0 or last)


@contextlib.contextmanager
def _stops(stop: processes.StopRequest) -> Iterator[None]:
    """A signal between the batches of an evaluation is a request to stop."""
    try:
        yield
    except Interrupted:
        stop.stopped = True


@contextlib.contextmanager
def _follows(save: Callable[[epath.Path], int]) -> Iterator[None]:
    """Saves a run whose directory was moved, where it is now, and raises what to do."""
    try:
        yield
    except MovedDirectoryError as error:
        if error.place is None:
            raise
        step = save(error.place)
        raise InputError(
            f"{error}; step {step} is saved there: rerun the command with --workdir={error.place}"
        ) from error


def _raise_if_no_data(
    failure: Exception | None, checkpoints: RunCheckpoints, step: int, is_saved: bool
) -> None:
    """Raises a failure to read the training data, of any process, once the steps are on disk."""
    try:
        processes.raise_on_all_processes(failure)
    except Exception:
        if is_saved:
            checkpoints.wait()
            LOGGER.info("stopped after step %d, which is saved; rerun the command to resume", step)
        raise


def _wait_for_device(state: Any) -> None:
    with contextlib.suppress(Exception):  # it has been raised where it happened
        jax.block_until_ready(state)


def _peak_images_per_second(task, mesh: Mesh) -> float | None:
    """The rate at which the devices would do nothing but the counted work; None if not known."""
    peaks = [peak_flops(device) for device in mesh.devices.flat]
    known = task.flops_per_image is not None and None not in peaks
    return sum(peaks) / task.flops_per_image if known else None


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
    workdir: str, config: ConfigDict, experiment: Experiment, allow_data_change: bool
) -> tuple[epath.Path, str | None]:
    """The first process prepares the directory; if it cannot, or one does not see it, all raise.

    Returns:
      The directory, and in the first process how the run's images changed, if they did.
    """
    directory, change, error = files.absolute(workdir), None, None
    check_same_data(experiment.inputs.data)
    if processes.is_primary():
        try:
            change = runs.prepare(
                workdir,
                config,
                experiment.spec.to_json(),
                experiment.schema,
                experiment.inputs,
                allow_data_change,
            )
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
    return directory, change


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
