"""A training run, top to bottom: directory, starting point, loop, checkpoints, previews.

A run starts from the latest good checkpoint of its directory, or from scratch where there is none.
"""

import contextlib
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hmar_jax.data.agreement import check_same_data
from hmar_jax.data.decode_errors import DecodeErrorLog
from hmar_jax.data.loader import loader_state_to_bytes, restore_loader_state
from hmar_jax.errors import InputError
from hmar_jax.interruption import Interrupted, Interruptions
from hmar_jax.io import files, runs
from hmar_jax.io.checkpoints import RunCheckpoints
from hmar_jax.io.locks import DirectoryLock, lock_together
from hmar_jax.io.models import save_model
from hmar_jax.parallel import processes, sharding
from hmar_jax.parallel.chips import peak_flops
from hmar_jax.progress import Progress, announce
from hmar_jax.training.after_step import AfterStep, OwedWork
from hmar_jax.training.compiled_steps import compile_steps
from hmar_jax.training.experiment import Experiment
from hmar_jax.training.metrics import LOGGER, MetricsWriter, average, log_to_file
from hmar_jax.training.step import MAX_SKIPPED_IN_ROW

_IN_FLIGHT = 2  # steps the device may lag behind: it stays busy, and errors are known soon


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
            batches = iter(experiment.loader())
        closing.callback(batches.close)
        if restored is not None:
            restore_loader_state(batches, restored.metadata["data_state"])
        reporter = _Reporter(directory, start, task.steps, config.task) if primary else None
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
        num_reported = _report_decode_errors(experiment.decode_errors, 0)
        # Those of the last evaluation. A lambda: the last count counts.
        closing.callback(lambda: _report_decode_errors(experiment.decode_errors, num_reported))
        meter = _Meter(config.batch_size, _peak_images_per_second(task, mesh))
        while step < task.steps and not stop.stopped:
            step += 1
            first, last = step == start + 1, step == task.steps
            if first:
                announce("reading the first images")
            with meter.time("data"):
                batch = sharding.global_batch(mesh, next(batches), config.batch_size)
            if first:
                announce("compiling the training step")
            with stop.immediate() if first else contextlib.nullcontext():
                state, metrics = steps.train_step(state, frozen, batch, run_key)
            meter.add(step, metrics)
            if first:
                _log_first_step(step, task.steps, metrics)

            if reporter is not None:
                reporter.advance()
            if step % config.log_every == 0 or last:
                report(step, meter.read())
                num_reported = _report_decode_errors(experiment.decode_errors, num_reported)
            with meter.time("excluded"):
                lock.check()
                stopped = stop.requested(step)
                has_work = any(_due_after(step, config, experiment))
                if has_work or last or stopped or step % config.checkpoint_every == 0:
                    meter.check()
                    if reporter is not None:
                        reporter.sync()  # lines before the checkpoint are not written again
                    if has_work:
                        owed.note(step)
                    position = loader_state_to_bytes(batches)
                    checkpoints.save(step, state, position, steps_of_run=task.steps)
                if has_work and not stopped:
                    checkpoints.wait()  # on disk, whatever happens in the evaluation
                    finish_step()
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


# What the run reports


@dataclasses.dataclass
class _Reporter:
    """Writes metrics to files and, in short, to the terminal."""

    directory: epath.Path
    start: int
    steps: int
    name: str

    def __post_init__(self):
        self._failed: set[str] = set()
        self._writer = MetricsWriter(self.directory, self.start)
        self._progress = Progress(
            self.name, self.steps, "step", start=self.start, opening=False, line_seconds=120
        )

    def _try(self, what: str, do: Callable[[], object]) -> None:
        """Nothing that is reported is worth a training step; a failure is named once."""
        try:
            do()
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                LOGGER.warning("%s failed, training continues: %s", what, error)

    def advance(self) -> None:
        self._try("showing the progress", self._progress.advance)

    def report(self, step: int, means: dict[str, float]) -> None:
        if not means:
            return
        self._try("writing metrics", lambda: self._writer.write(step, means))
        short = ("loss", "accuracy", "psnr", "usage/any", "images_per_second")
        words = [
            f"{name} {value:.4g}"
            for name, value in means.items()
            if name.removeprefix("validation/") in short
        ]
        self._try("showing the progress", lambda: self._progress.show(", ".join(words)))
        if left := self._progress.time_left():
            words.append(f"{left} left")
        LOGGER.info("step %d of %d: %s", step, self.steps, ", ".join(words))

    def sync(self) -> None:
        self._try("writing metrics", self._writer.sync)

    def close(self) -> None:
        self._try("showing the progress", self._progress.close)
        self._try("writing metrics", self._writer.close)


def _log_first_step(step: int, steps: int, metrics: dict) -> None:
    """At once: what is wrong from the start need not run until the first log line."""
    loss = jax.device_get(metrics).get("loss")
    if loss is not None:
        LOGGER.info("step %d of %d: loss %.4g", step, steps, float(loss))


def _report_decode_errors(errors: DecodeErrorLog, num_reported: int) -> int:
    """Names the images that could not be decoded since the last call; returns how many by now."""
    items = errors.items
    for path, reason in items[num_reported:]:
        LOGGER.warning("skipped %s: %s", path, reason)
    if len(items) > num_reported:
        LOGGER.warning("images that could not be decoded: %d", len(items))
    return len(items)


class _Meter:
    """Means of the metrics since the last report, and where the time was spent."""

    def __init__(self, batch_size: int, peak_images_per_second: float | None = None):
        self._batch_size, self._peak = batch_size, peak_images_per_second
        self._restart()

    def _restart(self):
        self._metrics, self._steps = [], []
        self._started, self._seconds = time.perf_counter(), {"data": 0.0, "excluded": 0.0}

    def add(self, step: int, metrics) -> None:
        """Takes a step's metrics, which may still be in computation; waits for an earlier step."""
        self._steps.append(step)
        self._metrics.append(metrics)
        if len(self._steps) > _IN_FLIGHT:
            self._check_row(-1 - _IN_FLIGHT)

    @contextlib.contextmanager
    def time(self, purpose: str):
        """Counts the time inside as waiting for "data", or as "excluded" from training."""
        start = time.perf_counter()
        yield
        self._seconds[purpose] += time.perf_counter() - start

    def _check_row(self, row: int) -> None:
        in_row = int(self._metrics[row]["skipped_in_row"])
        if in_row >= MAX_SKIPPED_IN_ROW:
            raise FloatingPointError(
                f"loss or gradient was not finite in the last {in_row} steps, up to step "
                f"{self._steps[row]}: the run stops. Those steps changed nothing and the last "
                "checkpoint is good; try a lower learning rate or stronger clipping"
            )

    def check(self) -> None:
        """Waits for the device. Raises FloatingPointError after too many skipped steps in a row."""
        for row in range(len(self._steps)):
            self._check_row(row)

    def read(self) -> dict[str, float]:
        """Means over the finite steps, the number of the others, and times; then it restarts."""
        self.check()
        self._metrics = jax.device_get(self._metrics)
        seconds = time.perf_counter() - self._started - self._seconds["excluded"]
        finite = [row for row in self._metrics if not row["skipped"]]
        pairs = zip(self._steps, self._metrics, strict=True)
        skipped = [step for step, row in pairs if row["skipped"]]
        if skipped:
            LOGGER.warning(
                "loss or gradient was not finite, nothing changed: step %s",
                ", ".join(map(str, skipped)),
            )
        counters = ("skipped", "skipped_in_row")
        means = average({n: v for n, v in row.items() if n not in counters} for row in finite)
        rate = len(self._metrics) * self._batch_size / seconds
        means |= {
            "skipped": len(skipped),
            "time": time.time(),
            "images_per_second": rate,
            "device_seconds": seconds - self._seconds["data"],
            "host_wait_seconds": self._seconds["data"],
        }
        if self._peak is not None:
            means["mfu"] = rate / self._peak
        self._restart()
        return means
