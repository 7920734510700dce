"""A training run, top to bottom: directory, start, loop, checkpoints, what is shown.

How a run chooses its starting point: the latest good checkpoint of its directory, otherwise scratch.
"""

import contextlib
import io
import json
import pathlib
import signal
import time
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict
from tqdm import tqdm

from hmar_jax import configs
from hmar_jax.checkpoints import RunCheckpoints, save_model
from hmar_jax.data.pipeline import BrokenLog, restore_state, state_to_bytes
from hmar_jax.errors import InputError
from hmar_jax.files import read_json, write_by_rename
from hmar_jax.sampling.pipeline import run_config
from hmar_jax.training.experiments import Experiment
from hmar_jax.training.metrics import LOGGER, MetricsWriter, average, log_to_file


def run(config: ConfigDict, experiment: Experiment, workdir: str) -> Any:
    """Trains until the config's last step, from the latest good checkpoint on where there is one.

    Args:
      config: the whole config; config.json keeps it.
      experiment: as built from the config.
      workdir: the run's directory. A second call goes on where the first ended or was killed.

    Returns:
      The last state.

    Raises:
      InputError: the directory cannot be written, is no run directory, or belongs to a run with another config.
      FloatingPointError: the loss or the gradient is no longer finite.
    """
    directory = _prepare(pathlib.Path(workdir), config, experiment)
    handler = log_to_file(directory)
    try:
        with RunCheckpoints(directory, config.keep_checkpoints) as checkpoints:
            return _run(config, experiment, directory, checkpoints)
    finally:
        LOGGER.removeHandler(handler)
        handler.close()


def _run(config: ConfigDict, experiment: Experiment, directory: pathlib.Path, checkpoints: RunCheckpoints) -> Any:
    task = experiment.task
    init_key, run_key, sample_key = jax.random.split(jax.random.key(config.seed), 3)
    restored = checkpoints.restore_latest(jax.eval_shape(task.init, init_key, *experiment.extra))
    if restored is None:
        state, start = jax.jit(task.init)(init_key, *experiment.extra), 0
    else:
        state, start = restored.state, restored.step
        LOGGER.info("resuming from step %d", start)
    if start >= task.steps:
        LOGGER.info("this run is done: step %d of %d", start, task.steps)
        return state
    LOGGER.debug("parameters\n%s", parameter_overview.get_parameter_overview(state.params, include_stats=False))

    batches = iter(experiment.loader())
    if restored is not None:
        restore_state(batches, restored.extra["data_state"])
    train_step = jax.jit(task.train_step, donate_argnums=0)
    eval_step = jax.jit(task.eval_step)
    writer, meter, stop = MetricsWriter(directory, start), _Meter(config.batch_size), _StopSignal()
    bar = tqdm(total=task.steps, initial=start, desc=config.task, unit="step", disable=None, dynamic_ncols=True)
    told = 0  # broken pictures already named
    try:
        for step in range(start + 1, task.steps + 1):
            with meter.time("waited"):
                batch = next(batches)
            state, metrics = train_step(state, batch, run_key, *experiment.extra)
            meter.add(step, metrics)
            bar.update()
            last = step == task.steps

            if step % config.log_every == 0 or last:
                _report(writer, bar, step, task.steps, meter.read())
                told = _report_broken(experiment.broken, told)
            with meter.time("aside"):
                if step % config.eval_every == 0 or last:
                    _report(writer, bar, step, task.steps, evaluate(eval_step, state, experiment))
                if step % config.sample_every == 0 or last:
                    _save_picture(experiment.picture(state, sample_key), directory / "samples" / f"step_{step:06d}.png")
                if step % config.checkpoint_every == 0 or last or stop.asked:
                    meter.check_finite()
                    checkpoints.save(step, state, state_to_bytes(batches))
            if stop.asked and not last:
                LOGGER.info("stopped by a signal after step %d; the same command goes on from there", step)
                break
    finally:
        bar.close()
        writer.close()
        stop.restore()
    return state


def _prepare(directory: pathlib.Path, config: ConfigDict, experiment: Experiment) -> pathlib.Path:
    """Makes the run directory, or checks that it is this run's."""
    ours = run_config(experiment.spec, configs.to_dict(config))
    saved = directory / "config.json"
    if saved.is_file():
        theirs = read_json(saved, "the config of a run")
        if not isinstance(theirs, dict) or theirs.get("format") != ours["format"]:
            raise InputError(f"{directory} has a config.json that is not a run's: take another --workdir")
        difference = configs.first_difference(theirs.get("config", {}), ours["config"])
        if difference:
            raise InputError(f"{directory} holds a run with another config: {difference}; take another --workdir, or that config")
    elif directory.is_dir() and any(not p.name.endswith(".tmp") for p in directory.iterdir()):  # files of a kill midway
        raise InputError(f"{directory} is neither empty nor a run directory (no config.json): take another --workdir")
    elif directory.is_file():
        raise InputError(f"workdir {directory} is a file: name a directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_by_rename(saved, json.dumps(ours, indent=1, sort_keys=True))  # first: it makes this a run directory
        (directory / "samples").mkdir(exist_ok=True)
        frozen = experiment.frozen
        if frozen is not None and not (directory / frozen.folder).exists():
            save_model(
                directory / frozen.folder, frozen.spec.to_json(), frozen.params,
                "The frozen model that this run was trained on top of.\n")
    except OSError as e:
        raise InputError(f"workdir {directory} cannot be written: {e.strerror or e}") from None
    return directory


def _report(writer: MetricsWriter, bar: tqdm, step: int, steps: int, figures: dict[str, float]) -> None:
    """To the files and, in short, to the terminal: on the bar, or as a line where there is no terminal."""
    if not figures:
        return
    writer.write(step, figures)
    short = ("loss", "accuracy", "psnr", "usage/any", "images_per_second")
    words = [f"{name} {value:.4g}" for name, value in figures.items() if name.removeprefix("validation/") in short]
    LOGGER.info("step %d of %d: %s", step, steps, ", ".join(words))
    if not bar.disable:
        bar.set_postfix_str(", ".join(words))


def _report_broken(broken: BrokenLog, told: int) -> int:
    """Names the pictures that could not be read since the last call; returns how many have been named."""
    items = broken.items
    for path, reason in items[told:]:
        LOGGER.warning("skipped %s: %s", path, reason)
    return len(items)


def _save_picture(picture, path: pathlib.Path) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_by_rename(path, buffer.getvalue())


def evaluate(eval_step, state, experiment: Experiment) -> dict[str, float]:
    """Means over the validation pictures, names prefixed with "validation/"."""
    if experiment.validation is None:
        return {}
    figures = average(jax.device_get(eval_step(state, batch, *experiment.extra)) for batch in experiment.validation)
    return {f"validation/{name}": value for name, value in figures.items()}


class _Meter:
    """The steps since the last line of metrics.jsonl: means of their metrics, and where the time went."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._restart()

    def _restart(self):
        self._metrics, self._steps = [], []
        self._started, self._seconds = time.perf_counter(), {"waited": 0.0, "aside": 0.0}

    def add(self, step: int, metrics) -> None:
        self._steps.append(step)
        self._metrics.append(metrics)

    @contextlib.contextmanager
    def time(self, purpose: str):
        """Counts the time inside as "waited" for data, or as spent "aside" of training."""
        start = time.perf_counter()
        yield
        self._seconds[purpose] += time.perf_counter() - start

    def check_finite(self) -> None:
        """Waits for the device. Raises FloatingPointError, with the step, where loss or gradient are not finite."""
        self._metrics = jax.device_get(self._metrics)
        for step, metrics in zip(self._steps, self._metrics):
            for name in ("loss", "grad_norm"):
                if not np.isfinite(metrics[name]):
                    raise FloatingPointError(f"{name} is {metrics[name]} at step {step}; the run stops, its last checkpoint is good")

    def read(self) -> dict[str, float]:
        """The means and the times, and begins anew."""
        self.check_finite()
        seconds = time.perf_counter() - self._started - self._seconds["aside"]
        figures = average(self._metrics)
        figures |= {
            "time": time.time(), "images_per_second": len(self._metrics) * self._batch_size / seconds,
            "device_seconds": seconds - self._seconds["waited"], "host_wait_seconds": self._seconds["waited"]}
        self._restart()
        return figures


class _StopSignal:
    """Whether SIGTERM came: the run saves and ends well."""

    def __init__(self):
        self.asked = False
        self._previous = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_):
        self.asked = True

    def restore(self):
        signal.signal(signal.SIGTERM, self._previous)
