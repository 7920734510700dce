"""A training run, top to bottom: directory, starting point, loop, checkpoints, previews.

A run starts from the latest good checkpoint of its directory, or from scratch where there is none.
"""

import contextlib
import dataclasses
import time
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from hmar_jax.data.decode_errors import DecodeErrorLog
from hmar_jax.data.loader import loader_state_to_bytes, restore_loader_state
from hmar_jax.errors import InputError
from hmar_jax.io import files, images, runs
from hmar_jax.io.checkpoints import RunCheckpoints
from hmar_jax.io.models import save_model
from hmar_jax.parallel import processes, sharding
from hmar_jax.parallel.chips import peak_flops
from hmar_jax.training.compiled_steps import CompiledSteps, compile_steps
from hmar_jax.training.experiment import Experiment
from hmar_jax.training.metrics import LOGGER, MetricsWriter, average, log_to_file
from hmar_jax.training.step import MAX_SKIPPED_IN_ROW

_IN_FLIGHT = 2  # steps the device may lag behind: it stays busy, and errors are known soon


def run(config: ConfigDict, experiment: Experiment, workdir: str) -> Any:
    """Trains until the task's last step, from the latest good checkpoint where there is one.

    Every process of a run calls it; the first one writes what is written once.

    Args:
      config: the whole config; config.json keeps it.
      experiment: as built from the config.
      workdir: the run's directory, local (and seen by all hosts) or gs://. A second call resumes
        where the first ended or was killed, on any mesh and any number of hosts.

    Returns:
      The last state.

    Raises:
      InputError: the directory cannot be written, is no run directory, or belongs to a run with
        another config.
      FloatingPointError: loss or gradient was not finite for MAX_SKIPPED_IN_ROW steps in a row.
    """
    directory = _prepare_together(workdir, config, experiment)
    with log_to_file(directory) if processes.is_primary() else contextlib.nullcontext():
        with RunCheckpoints(directory, config.keep_checkpoints, config.keep_best) as checkpoints:
            return _run(config, experiment, directory, checkpoints)


def _run(
    config: ConfigDict, experiment: Experiment, directory: epath.Path, checkpoints: RunCheckpoints
) -> Any:
    task, mesh = experiment.task, experiment.mesh
    keys = jax.random.split(jax.random.key(config.seed), 3)
    init_key, run_key, preview_key = (sharding.place_key(key, mesh) for key in keys)
    steps = compile_steps(task, mesh, experiment.frozen, config.ema_decay)
    restored = checkpoints.restore_latest(steps.state)
    if restored is not None and restored.step >= task.steps:
        LOGGER.info("this run is complete: step %d of %d", restored.step, task.steps)
        return restored.state
    if experiment.data_summary:
        LOGGER.info(experiment.data_summary)
    frozen = sharding.place(experiment.frozen, jax.tree.map(lambda x: x.sharding, steps.frozen))
    if restored is None:
        state, start = steps.init(init_key, frozen), 0
    else:
        state, start = restored.state, restored.step
        LOGGER.info("resuming from step %d", start)
    overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    LOGGER.debug("parameters\n%s", overview)
    LOGGER.debug("mesh %s of %s", dict(mesh.shape), mesh.devices.flat[0].device_kind)

    batches = iter(experiment.loader())
    if restored is not None:
        restore_loader_state(batches, restored.metadata["data_state"])
    primary = processes.is_primary()
    reporter = _Reporter(directory, start, task.steps, config.task) if primary else None
    meter = _Meter(config.batch_size, _peak_images_per_second(task, mesh))
    stop = processes.StopRequest()
    # Images that could not be decoded and have been named: also those of crops that were cached.
    num_reported = _report_decode_errors(experiment.decode_errors, 0)
    try:
        for step in range(start + 1, task.steps + 1):
            with meter.time("data"):
                batch = sharding.global_batch(mesh, next(batches), config.batch_size)
            state, metrics = steps.train_step(state, frozen, batch, run_key)
            meter.add(step, metrics)
            last = step == task.steps

            if reporter is not None:
                reporter.advance()
            if step % config.log_every == 0 or last:
                means = meter.read()
                if reporter is not None:
                    reporter.report(step, means)
                num_reported = _report_decode_errors(experiment.decode_errors, num_reported)
            with meter.time("excluded"):
                loss = None
                if step % config.eval_every == 0 or last:
                    means = evaluate(steps, state, frozen, experiment)
                    loss = means.get("validation/loss")
                    if reporter is not None:
                        reporter.report(step, means)
                if step % config.sample_every == 0 or last:
                    rows = steps.preview(state, frozen, experiment.preview_images, preview_key)
                    if primary:
                        _save_preview(np.asarray(rows), task.preview_labels(), directory, step)
                stopped = stop.requested(step)
                due = step % config.checkpoint_every == 0 or (loss is not None and config.keep_best)
                if due or last or stopped:
                    meter.check()
                    if reporter is not None:
                        reporter.sync()  # lines before the checkpoint are not written again
                    position = loader_state_to_bytes(batches)
                    checkpoints.save(step, state, position, validation_loss=loss)
            if stopped and not last:
                LOGGER.info("stopped by a signal after step %d; rerun the command to resume", step)
                break
    finally:
        _report_decode_errors(experiment.decode_errors, num_reported)  # of the last evaluation
        batches.close()
        if reporter is not None:
            reporter.close()
        stop.restore()
    return state


def _peak_images_per_second(task, mesh: Mesh) -> float | None:
    """The rate at which the devices would do nothing but the counted work; None if not known."""
    peaks = [peak_flops(device) for device in mesh.devices.flat]
    known = task.flops_per_image is not None and None not in peaks
    return sum(peaks) / task.flops_per_image if known else None


def evaluate(
    steps: CompiledSteps, state: Any, frozen: Any, experiment: Experiment
) -> dict[str, float]:
    """Means over the validation images, names prefixed with "validation/"."""
    held_out = experiment.validation
    if held_out is None:
        return {}
    batches = (
        sharding.global_batch(experiment.mesh, batch, held_out.batch_size)
        for batch in held_out.loader
    )
    means = average(jax.device_get(steps.eval_step(state, frozen, batch)) for batch in batches)
    return {f"validation/{name}": value for name, value in means.items()}


# The run directory


def _prepare_together(workdir: str, config: ConfigDict, experiment: Experiment) -> epath.Path:
    """The first process prepares the directory; if it cannot, or one does not see it, all raise."""
    directory, error = files.absolute(workdir), None
    if processes.is_primary():
        try:
            runs.prepare(workdir, config, experiment.spec.to_json(), experiment.schema)
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
    return directory


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
        self._writer = MetricsWriter(self.directory, self.start)
        self._bar = tqdm(
            total=self.steps,
            initial=self.start,
            desc=self.name,
            unit="step",
            disable=None,
            dynamic_ncols=True,
        )

    def advance(self) -> None:
        self._bar.update()

    def report(self, step: int, means: dict[str, float]) -> None:
        if not means:
            return
        self._writer.write(step, means)
        short = ("loss", "accuracy", "psnr", "usage/any", "images_per_second")
        words = [
            f"{name} {value:.4g}"
            for name, value in means.items()
            if name.removeprefix("validation/") in short
        ]
        LOGGER.info("step %d of %d: %s", step, self.steps, ", ".join(words))
        if not self._bar.disable:
            self._bar.set_postfix_str(", ".join(words))

    def sync(self) -> None:
        self._writer.sync()

    def close(self) -> None:
        self._bar.close()
        self._writer.close()


def _report_decode_errors(errors: DecodeErrorLog, num_reported: int) -> int:
    """Names the images that could not be decoded since the last call; returns how many by now."""
    items = errors.items
    for path, reason in items[num_reported:]:
        LOGGER.warning("skipped %s: %s", path, reason)
    if len(items) > num_reported:
        LOGGER.warning("images that could not be decoded: %d", len(items))
    return len(items)


def _save_preview(rows: np.ndarray, labels: list[str], directory: epath.Path, step: int) -> None:
    """rows: (rows, columns, h, w, 3) in [0, 1]."""
    grid = images.make_grid(rows.reshape(-1, *rows.shape[2:]), columns=rows.shape[1], labels=labels)
    images.save_image(directory / "samples" / f"step_{step:06d}.png", grid)


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
