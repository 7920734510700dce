"""A training run, top to bottom: directory, start, loop, checkpoints, what is shown.

How a run chooses its starting point: the latest good checkpoint of its directory, otherwise scratch.
"""

import contextlib
import io
import json
import time
from typing import Any

import jax
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from hmar_jax import config_files
from hmar_jax.data.loader import DecodeErrorLog, loader_state_to_bytes, restore_loader_state
from hmar_jax.errors import InputError
from hmar_jax.experiment import Experiment
from hmar_jax.families.hmar.flops import peak_flops
from hmar_jax.io import files
from hmar_jax.io.checkpoints import RunCheckpoints, save_model
from hmar_jax.parallel import processes, sharding
from hmar_jax.pipeline import run_config
from hmar_jax.training import compiled_steps
from hmar_jax.training.metrics import LOGGER, MetricsWriter, average, log_to_file
from hmar_jax.training.state import MAX_SKIPPED_IN_ROW

_IN_FLIGHT = 2  # steps that the device may be behind: enough to keep it busy, and what is wrong is known soon


def run(config: ConfigDict, experiment: Experiment, workdir: str) -> Any:
    """Trains until the config's last step, from the latest good checkpoint on where there is one.

    Every process of a run calls it; the first one writes what is written once.

    Args:
      config: the whole config; config.json keeps it.
      experiment: as built from the config.
      workdir: the run's directory, local (and seen by all hosts) or gs://. A second call goes on where the first ended or
        was killed, on any mesh and any number of hosts.

    Returns:
      The last state.

    Raises:
      InputError: the directory cannot be written, is no run directory, or belongs to a run with another config.
      FloatingPointError: the loss or the gradient was not finite for MAX_SKIPPED_IN_ROW steps.
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
    init_key, run_key, sample_key = (sharding.place_key(key, mesh) for key in keys)
    made = compiled_steps.build(task, mesh, experiment.extra, config.ema_decay)
    restored = checkpoints.restore_latest(made.state)
    if restored is not None and restored.step >= task.steps:
        LOGGER.info("this run is done: step %d of %d", restored.step, task.steps)
        return restored.state
    extra = sharding.place(experiment.extra, jax.tree.map(lambda x: x.sharding, made.extra))
    if restored is None:
        state, start = made.init(init_key, *extra), 0
    else:
        state, start = restored.state, restored.step
        LOGGER.info("resuming from step %d", start)
    LOGGER.debug(
        "parameters\n%s",
        parameter_overview.get_parameter_overview(state.params, include_stats=False),
    )
    LOGGER.debug("mesh %s of %s", dict(mesh.shape), mesh.devices.flat[0].device_kind)

    batches = iter(experiment.loader())
    if restored is not None:
        restore_loader_state(batches, restored.extra["data_state"])
    writer = MetricsWriter(directory, start) if processes.is_primary() else None
    meter, stop = (
        _Meter(config.batch_size, _peak_images_per_second(task, mesh)),
        processes.StopRequest(),
    )
    bar = tqdm(
        total=task.steps,
        initial=start,
        desc=config.task,
        unit="step",
        disable=None if processes.is_primary() else True,
        dynamic_ncols=True,
    )
    told = 0  # broken images already named
    try:
        for step in range(start + 1, task.steps + 1):
            with meter.time("waited"):
                batch = sharding.global_batch(mesh, next(batches), config.batch_size)
            state, metrics = made.train_step(state, batch, run_key, *extra)
            meter.add(step, metrics)
            bar.update()
            last = step == task.steps

            if step % config.log_every == 0 or last:
                _report(writer, bar, step, task.steps, meter.read())
                told = _report_broken(experiment.broken, told)
            with meter.time("aside"):
                loss = None
                if step % config.eval_every == 0 or last:
                    figures = evaluate(made.eval_step, state, experiment, extra)
                    loss = figures.get("validation/loss")
                    _report(writer, bar, step, task.steps, figures)
                if step % config.sample_every == 0 or last:
                    image = experiment.image(state, sample_key, extra)
                    if processes.is_primary():
                        _save_image(image, directory / "samples" / f"step_{step:06d}.png")
                stopped = stop.asked(step)
                if (
                    step % config.checkpoint_every == 0
                    or last
                    or stopped
                    or (loss is not None and config.keep_best)
                ):
                    meter.check()
                    if writer is not None:
                        writer.sync()  # what is before the checkpoint will not be written again
                    checkpoints.save(
                        step, state, loader_state_to_bytes(batches), validation_loss=loss
                    )
            if stopped and not last:
                LOGGER.info(
                    "stopped by a signal after step %d; the same command goes on from there", step
                )
                break
    finally:
        bar.close()
        batches.close()
        if writer is not None:
            writer.close()
        stop.restore()
    return state


def _peak_images_per_second(task, mesh: Mesh) -> float | None:
    """Images a second at which the devices would do nothing but the step's counted work; None where it is not known."""
    peaks = [peak_flops(device) for device in mesh.devices.flat]
    return (
        None if task.flops_per_image is None or None in peaks else sum(peaks) / task.flops_per_image
    )


def _prepare_together(workdir: str, config: ConfigDict, experiment: Experiment) -> epath.Path:
    """The first process prepares the directory; where it cannot, or another does not see it, all say so."""
    directory, error = files.absolute(workdir), None
    if processes.is_primary():
        try:
            _prepare(workdir, config, experiment)
        except InputError as e:
            error = e
    processes.raise_on_all_processes(error)
    if not (directory / "config.json").exists():
        error = InputError(
            f"workdir {workdir} is not seen by host {jax.process_index()}: a directory that all hosts share is wanted, or gs://"
        )
    processes.raise_on_all_processes(error)
    return directory


def _prepare(workdir: str, config: ConfigDict, experiment: Experiment) -> None:
    """Makes the run directory, or checks that it is this run's."""
    directory = files.absolute(workdir)
    ours = run_config(experiment.spec, config_files.to_dict(config))
    saved = directory / "config.json"
    if saved.exists():
        theirs = files.read_json(saved, "the config of a run")
        if not isinstance(theirs, dict) or theirs.get("format") != ours["format"]:
            raise InputError(
                f"{workdir} has a config.json that is not a run's: take another --workdir"
            )
        difference = config_files.first_difference(theirs.get("config", {}), ours["config"])
        if difference:
            raise InputError(
                f"{workdir} holds a run with another config: {difference}; take another --workdir, or that config"
            )
    elif directory.is_dir() and any(
        not p.name.endswith(".tmp") for p in directory.iterdir()
    ):  # files of a kill midway
        raise InputError(
            f"{workdir} is neither empty nor a run directory (no config.json): take another --workdir"
        )
    elif directory.exists() and not directory.is_dir():
        raise InputError(f"workdir {workdir} is a file: name a directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        files.write_atomically(
            saved, json.dumps(ours, indent=1, sort_keys=True)
        )  # first: it makes this a run directory
        (directory / "samples").mkdir(exist_ok=True)
        frozen = experiment.frozen
        if frozen is not None and not (directory / frozen.folder / "config.json").exists():
            save_model(
                directory / frozen.folder,
                frozen.spec.to_json(),
                frozen.params,
                "The frozen model that this run was trained on top of.\n",
                overwrite=True,
            )
    except OSError as e:
        raise InputError(f"workdir {workdir} cannot be written: {e.strerror or e}") from None


def _report(
    writer: MetricsWriter | None, bar: tqdm, step: int, steps: int, figures: dict[str, float]
) -> None:
    """To the files and, in short, to the terminal: on the bar, or as a line where there is no terminal."""
    if not figures or writer is None:
        return
    writer.write(step, figures)
    short = ("loss", "accuracy", "psnr", "usage/any", "images_per_second")
    words = [
        f"{name} {value:.4g}"
        for name, value in figures.items()
        if name.removeprefix("validation/") in short
    ]
    LOGGER.info("step %d of %d: %s", step, steps, ", ".join(words))
    if not bar.disable:
        bar.set_postfix_str(", ".join(words))


def _report_broken(broken: DecodeErrorLog, told: int) -> int:
    """Names the images that could not be read since the last call; returns how many have been named."""
    items = broken.items
    for path, reason in items[told:]:
        LOGGER.warning("skipped %s: %s", path, reason)
    return len(items)


def _save_image(image, path: epath.Path) -> None:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    files.write_atomically(path, buffer.getvalue())


def evaluate(eval_step, state, experiment: Experiment, extra: tuple) -> dict[str, float]:
    """Means over the validation images, names prefixed with "validation/"."""
    held_out = experiment.validation
    if held_out is None:
        return {}
    batches = (
        sharding.global_batch(experiment.mesh, batch, held_out.batch_size)
        for batch in held_out.loader
    )
    figures = average(jax.device_get(eval_step(state, batch, *extra)) for batch in batches)
    return {f"validation/{name}": value for name, value in figures.items()}


class _Meter:
    """The steps since the last line of metrics.jsonl: means of their metrics, and where the time went."""

    def __init__(self, batch_size: int, peak_images_per_second: float | None = None):
        self._batch_size, self._peak = batch_size, peak_images_per_second
        self._restart()

    def _restart(self):
        self._metrics, self._steps = [], []
        self._started, self._seconds = time.perf_counter(), {"waited": 0.0, "aside": 0.0}

    def add(self, step: int, metrics) -> None:
        """Takes a step's metrics, which the device may still be computing, and waits for the step two before."""
        self._steps.append(step)
        self._metrics.append(metrics)
        if len(self._steps) > _IN_FLIGHT:
            self._check_row(-1 - _IN_FLIGHT)

    @contextlib.contextmanager
    def time(self, purpose: str):
        """Counts the time inside as "waited" for data, or as spent "aside" of training."""
        start = time.perf_counter()
        yield
        self._seconds[purpose] += time.perf_counter() - start

    def _check_row(self, row: int) -> None:
        in_row = int(self._metrics[row]["skipped_in_row"])
        if in_row >= MAX_SKIPPED_IN_ROW:
            raise FloatingPointError(
                f"loss or gradient was not finite in the last {in_row} steps, up to step {self._steps[row]}: the run stops. Those steps "
                "changed nothing, and its last checkpoint is good; a lower learning rate or stronger clipping may get past here"
            )

    def check(self) -> None:
        """Waits for the device. Raises FloatingPointError where too many steps in a row were not finite."""
        for row in range(len(self._steps)):
            self._check_row(row)

    def read(self) -> dict[str, float]:
        """The means over the steps that were finite, the number of the others, and the times; begins anew."""
        self.check()
        self._metrics = jax.device_get(self._metrics)
        seconds = time.perf_counter() - self._started - self._seconds["aside"]
        finite = [row for row in self._metrics if not row["skipped"]]
        skipped = [step for step, row in zip(self._steps, self._metrics) if row["skipped"]]
        if skipped:
            LOGGER.warning(
                "loss or gradient was not finite, nothing changed: step %s",
                ", ".join(map(str, skipped)),
            )
        figures = average(
            {n: v for n, v in row.items() if n not in ("skipped", "skipped_in_row")}
            for row in finite
        )
        rate = len(self._metrics) * self._batch_size / seconds
        figures |= {
            "skipped": len(skipped),
            "time": time.time(),
            "images_per_second": rate,
            "device_seconds": seconds - self._seconds["waited"],
            "host_wait_seconds": self._seconds["waited"],
        }
        if self._peak is not None:
            figures["mfu"] = rate / self._peak
        self._restart()
        return figures
