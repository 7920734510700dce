"""The steps of a run, one after another, and what is due after each."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hmar_jax.errors import InputError
from hmar_jax.interruption import Interrupted
from hmar_jax.io.checkpoints import RunCheckpoints
from hmar_jax.io.locks import DirectoryLock, MovedDirectoryError
from hmar_jax.parallel import processes, sharding
from hmar_jax.parallel.chips import peak_flops
from hmar_jax.progress import phase
from hmar_jax.training.after_step import AfterStep, OwedWork
from hmar_jax.training.batches import Batches
from hmar_jax.training.compiled_steps import CompiledSteps
from hmar_jax.training.experiment import Experiment
from hmar_jax.training.metrics import LOGGER
from hmar_jax.training.reporting import Meter, Reporter, log_first_step, report_decode_errors


@dataclasses.dataclass
class Session:
    """A run from the step that it starts from: its state, and what belongs to each step.

    Attributes:
      step: the last one that is done.
    """

    config: ConfigDict
    experiment: Experiment
    directory: epath.Path
    checkpoints: RunCheckpoints
    stop: processes.StopRequest
    lock: DirectoryLock
    steps: CompiledSteps
    frozen: Any
    run_key: jax.Array
    preview_key: jax.Array
    batches: Batches
    reporter: Reporter | None  # of the first process
    owed: OwedWork
    state: Any
    start: int

    def __post_init__(self):
        task = self.experiment.task
        self.step, self._total = self.start, task.steps
        self._num_reported = 0  # images that could not be decoded and have been named
        peak = _peak_images_per_second(task, self.experiment.mesh)
        self._meter = Meter(self.config.batch_size, peak)
        self._after_step = AfterStep(
            self.steps,
            self.frozen,
            self.experiment,
            self.directory,
            self.preview_key,
            self.report,
            self._store_loss,
            self.stop.check,
        )

    def train(self) -> None:
        """Trains until the last step, or until a signal or unreadable data stop the run.

        Raises:
          InputError: no more batches can be read; the steps done are saved.
        """
        self.report_decode_errors()  # also those of cached crops
        if self.step < self._total:
            with phase("reading the first images", at_once=True):
                self.batches.fill()
            processes.raise_on_all_processes(self.batches.failure)
        while self.step < self._total and not self.stop.stopped:
            with self._meter.time("data"):
                batch = self.batches.take()
                if batch is None:
                    break
                batch = sharding.global_batch(self.experiment.mesh, batch, self.config.batch_size)
            self._train_step(batch)
            with self._meter.time("excluded"):
                self._save_and_evaluate()
        self._end()

    def _train_step(self, batch: Any) -> None:
        self.step += 1
        first = self.step == self.start + 1
        with self._compiling() if first else contextlib.nullcontext():
            self.state, metrics = self.steps.train_step(
                self.state, self.frozen, batch, self.run_key
            )
        self._meter.add(self.step, metrics)
        if first:
            log_first_step(self.step, self._total, metrics)
        if self.reporter is not None:
            self.reporter.advance()
        if self.step % self.config.log_every == 0 or self.step == self._total:
            self.report(self.step, self._meter.read())
            self.report_decode_errors()

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        with phase("compiling the training step", at_once=True), self.stop.immediate():
            yield

    def _save_and_evaluate(self) -> None:
        """What is due after the step; a checkpoint is on disk before an evaluation begins."""
        self.lock.check()
        stopped = self.stop.requested(self.step)
        has_work = any(self._due())
        is_due = self.step % self.config.checkpoint_every == 0 or self.step == self._total
        if has_work or stopped or is_due:
            self._save(has_work)
        if has_work and not stopped:
            self.checkpoints.wait()
            self.finish_step()

    def _due(self) -> tuple[bool, bool]:
        """Whether a validation and a preview are due after the step."""
        step, config, experiment = self.step, self.config, self.experiment
        # A run that was extended may still owe what was due after its former last step.
        last = step == self._total or (step == self.start and experiment.history.was_last(step))
        evaluates = experiment.validation is not None and (step % config.eval_every == 0 or last)
        can_preview = (
            not experiment.task.num_preview_images or experiment.preview_images is not None
        )
        return evaluates, can_preview and (step % config.sample_every == 0 or last)

    def finish_step(self) -> None:
        """Evaluation and preview, where they are due; the step has been saved."""
        with _stops(self.stop):
            self._after_step.run(self.step, self.state, *self._due())

    def _end(self) -> None:
        failure, stop = self.batches.failure, self.stop
        if failure is not None and not stop.stopped and self.step < self._total:
            if jax.process_count() > 1:
                raise failure  # too late: the others compute a step without this process
            if self.step > self.start:
                self._save()
        if self.step < self._total:
            _raise_if_no_data(failure, self.checkpoints, self.step, self.step > self.start)
        if stop.stopped and (self.step < self._total or self.owed.is_owed(self.step)):
            LOGGER.info("stopped by a signal after step %d; rerun the command to resume", self.step)
        else:
            stop.ignore()

    def _save(self, has_work: bool = False) -> None:
        self.lock.check(look=True)
        self._meter.check()
        if self.reporter is not None:
            self.reporter.sync()  # lines before the checkpoint are not written again
        if has_work:
            self.owed.note(self.step)
        self._save_with(self.checkpoints)

    def _save_with(self, checkpoints: RunCheckpoints) -> None:
        checkpoints.save(self.step, self.state, self.batches.position, steps_of_run=self._total)

    def save_to(self, directory: epath.Path) -> int:
        """Saves to where the run's directory has been moved; returns the step."""
        keep = self.config.keep_checkpoints, self.config.keep_best
        with RunCheckpoints(directory, *keep) as moved:
            self._save_with(moved)
        return self.step

    def report(self, step: int, means: dict[str, float]) -> None:
        """Writes metrics, in the first process."""
        if self.reporter is not None:
            self.reporter.report(step, means)

    def report_decode_errors(self) -> None:
        """Names the images that could not be decoded since the last call."""
        self._num_reported = report_decode_errors(self.experiment.decode_errors, self._num_reported)

    def _store_loss(self, step: int, loss: float) -> None:
        if self.config.keep_best:
            self.checkpoints.record_validation_loss(step, loss)

    def wait_for_device(self) -> None:
        with contextlib.suppress(Exception):  # it has been raised where it happened
            jax.block_until_ready(self.state)


@contextlib.contextmanager
def _stops(stop: processes.StopRequest) -> Iterator[None]:
    """A signal between the batches of an evaluation is a request to stop."""
    try:
        yield
    except Interrupted:
        stop.stopped = True


@contextlib.contextmanager
def follow_moved_run(save: Callable[[epath.Path], int]) -> Iterator[None]:
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


def _peak_images_per_second(task, mesh: Mesh) -> float | None:
    """The rate at which the devices would do nothing but the counted work; None if not known."""
    peaks = [peak_flops(device) for device in mesh.devices.flat]
    known = task.flops_per_image is not None and None not in peaks
    return sum(peaks) / task.flops_per_image if known else None
