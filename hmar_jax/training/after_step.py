"""Evaluation and previews: what a run does after some steps, and what must never cost it any.

A checkpoint is saved first. Then a failure is logged and training continues. If the process ends in
the middle, the next start does the work again, unless the process has ended there twice: then the
work is the likely cause, and a run that repeats it never gets on.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from hmar_jax.errors import InputError
from hmar_jax.interruption import Interrupted
from hmar_jax.io import files, images
from hmar_jax.parallel import processes, sharding
from hmar_jax.progress import phase
from hmar_jax.training.compiled_steps import CompiledSteps
from hmar_jax.training.experiment import Experiment
from hmar_jax.training.metrics import LOGGER, average

_MAX_ATTEMPTS = 2


@contextlib.contextmanager
def failure_is_logged(what: str) -> Iterator[None]:
    """Logs an exception in the block in place of raising it; the traceback goes to log.txt."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        LOGGER.warning("%s failed, training continues: %s", what, reason)
        LOGGER.debug("%s failed", what, exc_info=True)


class OwedWork:
    """Remembers in the run directory that the work after a step has not been done yet.

    Only the first process writes; all must make the same calls.
    """

    def __init__(self, directory: epath.Path):
        self._path = directory / "after_step.json"

    def note(self, step: int) -> None:
        """The work after a step is owed from now on. Call it before the step is saved."""
        self._write(step, 0)

    def begin(self, step: int) -> None:
        """The work begins."""
        self._write(step, self._attempts(step) + 1)

    def evaluated(self, step: int) -> None:
        """Only the preview is still owed."""
        self._write(step, self._attempts(step), evaluated=True)

    def is_evaluated(self, step: int) -> bool:
        """Whether an earlier start has done the evaluation after a step."""
        found = bool(processes.is_primary() and self._read(step).get("evaluated"))
        return bool(processes.broadcast_from_primary(int(found)))

    def done(self) -> None:
        with failure_is_logged(f"removing {self._path}"):
            if processes.is_primary():
                self._path.unlink(missing_ok=True)

    def is_owed(self, step: int) -> bool:
        """Whether the work after a step is to be done on resuming from it."""
        attempts = self._attempts(step, missing=-1) if processes.is_primary() else -1
        attempts = processes.broadcast_from_primary(attempts)
        if attempts >= _MAX_ATTEMPTS:
            LOGGER.warning(
                "the run ended %d times in the evaluation or preview after step %d: it is skipped",
                attempts,
                step,
            )
            self.done()
        return 0 <= attempts < _MAX_ATTEMPTS

    def _attempts(self, step: int, missing: int = 0) -> int:
        attempts = self._read(step).get("attempts")
        return attempts if isinstance(attempts, int) else missing

    def _read(self, step: int) -> dict[str, Any]:
        """What is stored about a step."""
        try:
            found = files.read_json(self._path, "what is owed after a step")
        except InputError:
            return {}
        return found if isinstance(found, dict) and found.get("step") == step else {}

    def _write(self, step: int, attempts: int, **more: Any) -> None:
        with failure_is_logged(f"writing {self._path}"):
            if processes.is_primary():
                text = json.dumps({"step": step, "attempts": attempts, **more})
                files.write_atomically(self._path, text)


@dataclasses.dataclass(frozen=True)
class AfterStep:
    """The evaluation and the preview of a run."""

    steps: CompiledSteps
    frozen: Any
    experiment: Experiment
    directory: epath.Path
    preview_key: jax.Array
    report: Callable[[int, dict[str, float]], None]
    store_loss: Callable[[int, float], None]
    check: Callable[[], None]  # raises Interrupted between batches

    def run(self, step: int, state: Any, evaluates: bool, previews: bool) -> None:
        """Evaluates and saves a preview, where they are due; failures are logged.

        Raises:
          Interrupted: by a signal. The rest of the work is still owed then.
        """
        owed = OwedWork(self.directory)
        owed.begin(step)
        if evaluates and not owed.is_evaluated(step):
            try:
                what = f"the evaluation after step {step}"
                with failure_is_logged(what), phase(what):
                    self._evaluate(step, state)
            except Interrupted:
                owed.note(step)
                raise
            if previews:
                owed.evaluated(step)
        if previews:
            what = f"the preview after step {step}"
            with failure_is_logged(what), phase(what):
                self._preview(step, state)
        owed.done()

    def _evaluate(self, step: int, state: Any) -> None:
        means = evaluate(self.steps, state, self.frozen, self.experiment, self.check)
        self.report(step, means)
        if (loss := means.get("validation/loss")) is not None:
            self.store_loss(step, loss)

    def _preview(self, step: int, state: Any) -> None:
        images_ = self.experiment.preview_images
        rows = self.steps.preview(state, self.frozen, images_, self.preview_key)
        rows = np.asarray(rows)  # (rows, columns, h, w, 3) in [0, 1]
        if processes.is_primary():
            labels = self.experiment.task.preview_labels()
            grid = images.make_grid(
                rows.reshape(-1, *rows.shape[2:]),
                columns=rows.shape[1],
                labels=labels,
                substitutes=list(map(str, range(len(labels)))),
            )
            images.save_image(self.directory / "samples" / f"step_{step:06d}.png", grid)


def evaluate(
    steps: CompiledSteps,
    state: Any,
    frozen: Any,
    experiment: Experiment,
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Means over the validation images, names prefixed with "validation/".

    Args:
      check: called before each batch.

    Raises:
      InputError: too many images cannot be read, in any of the processes.
    """
    held_out = experiment.validation
    if held_out is None:
        return {}
    with contextlib.closing(iter(held_out.loader)) as batches:
        rows = []
        while (batch := _next_on_all(batches, check)) is not None:
            placed = sharding.global_batch(experiment.mesh, batch, held_out.batch_size)
            rows.append(jax.device_get(steps.eval_step(state, frozen, placed)))
    return {f"validation/{name}": value for name, value in average(rows).items()}


def _next_on_all(batches: Iterator[Any], check: Callable[[], None]) -> Any:
    """The next batch of this process, or None; an error in one process is raised on all."""
    check()
    batch, error = None, None
    try:
        batch = next(batches, None)
    except Exception as e:
        error = e
    processes.raise_on_all_processes(error)
    return batch
