"""The checkpoints of a run, stored with Orbax.

A run keeps its last few checkpoints in `workdir/checkpoints/STEP`: `state` (arrays) and `extra`
(JSON metadata: the position of the data loader, and what else the caller wants to restore). Orbax
commits a checkpoint by renaming it. So a process that is killed at any moment leaves complete
checkpoints and, at worst, a temporary folder, which the next start removes. Files that are lost or
shortened later are found on restoring, and the previous checkpoint is used instead; all processes
skip a checkpoint that one of them cannot read after several attempts. Flipped bits in a file of the
right length are not always found: Orbax writes no checksums of array data.
"""

import base64
import contextlib
import functools
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from hmar_jax.errors import InputError
from hmar_jax.io import arrays, stored_states
from hmar_jax.io.arrays import DamagedFilesError
from hmar_jax.io.files import absolute, read_json, write_atomically
from hmar_jax.parallel import processes

_log = logging.getLogger(__name__)
_STATE = "state"
_METADATA = "extra"  # the folder keeps the name it has in checkpoints of the first version
_EMA = "ema_params"  # in a state
_LOSS = "validation_loss"
_RESUME_HINT = (
    "; earlier checkpoints are kept. Free some space and rerun the same command to resume"
)


class Restored(NamedTuple):
    """A checkpoint that `RunCheckpoints.restore_latest` has read."""

    step: int
    state: Any  # a tree like the abstract state, of jax arrays; see also `parts_may_differ`
    metadata: dict[str, Any]  # what `save` got by name, and `data_state`: bytes, JSON or None


class RunCheckpoints:
    """Saves the state of a run in the background and restores the newest readable checkpoint.

    Use it in a `with` block: Python does not wait for a save in flight when it exits, so without
    `close` the last checkpoint is lost. All processes of a multi-host program must make the same
    calls and see the same files.
    """

    def __init__(self, workdir: os.PathLike | str, max_to_keep: int = 3, keep_best: int = 0):
        """Opens, or creates, the checkpoint directory of a run.

        Args:
          workdir: the run directory, local or gs://.
          max_to_keep: how many of the newest checkpoints are kept.
          keep_best: how many more are kept, those of lowest validation loss among the ones saved
            with a loss.

        Raises:
          InputError: the directory cannot be created.
        """
        self.directory = absolute(workdir) / "checkpoints"
        self._max_to_keep, self._keep_best = max_to_keep, keep_best
        keep: list[policies.PreservationPolicy] = [policies.LatestN(max_to_keep)]
        best_fn = None
        if keep_best:
            best_fn = _validation_loss
            keep.append(
                policies.BestN(
                    get_metric_fn=best_fn,
                    reverse=True,
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            best_fn=best_fn,
            best_mode="min",
            cleanup_tmp_directories=True,
        )
        if self.directory.exists() and not self.directory.is_dir():  # Orbax finds it when it saves
            raise InputError(f"{self.directory} must be a directory; it is a file")
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"cannot store checkpoints in {self.directory}: {reason}") from error

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: Any,
        data_state: bytes | dict | None = None,
        *,
        validation_loss: float | None = None,
        **metadata: Any,
    ) -> bool:
        """Starts saving; returns once the arrays are copied to the host.

        The arrays may then be donated or changed. It first waits for a save still in flight, and
        raises here if that one failed.

        Args:
          step: number of the checkpoint.
          state: tree of arrays. Random keys must be raw (`jax.random.key_data`).
          data_state: position of the data loader.
          validation_loss: of the state, where it has been evaluated; it decides whether the
            checkpoint is among the best.
          **metadata: anything that JSON can store.

        Returns:
          False, with nothing done, if the step has been saved before.

        Raises:
          InputError: the disk is full.
        """
        if step in self._manager.all_steps():
            return False
        arrays.check_leaves(state, _STATE)
        # As text and back: what is not JSON raises here and not in a thread, and the caller may
        # change its dicts.
        metadata = json.loads(json.dumps({**metadata, "data_state": _encode(data_state)}))
        arrays.check_free_space(
            self.directory, state, f"the checkpoint of step {step}", _RESUME_HINT
        )
        items = {_STATE: ocp.args.PyTreeSave(state), _METADATA: ocp.args.JsonSave(metadata)}
        metrics = {} if validation_loss is None else {_LOSS: float(validation_loss)}
        with self._unusable_disk_is_an_input_error():
            # force: without it, Orbax silently skips a step below the newest on disk.
            return self._manager.save(
                step, args=ocp.args.Composite(**items), metrics=metrics, force=True
            )

    def record_validation_loss(self, step: int, loss: float) -> None:
        """Stores the validation loss of a step that was saved without one.

        Then older checkpoints that are neither among the newest nor among the best are deleted. It
        waits for a save in flight.
        """
        self.wait()
        if processes.is_primary():
            file = self.directory / str(step) / "metrics" / "metrics"
            write_atomically(file, json.dumps({_LOSS: float(loss)}))
        processes.wait_for_all(f"hmar_jax recorded the loss of step {step}")
        self._manager.reload()
        steps = self.steps()
        losses = {step: _saved_loss(self.directory / str(step)) for step in steps}
        measured = [step for step in steps if losses[step] < math.inf]
        best = sorted(measured, key=losses.__getitem__)[: self._keep_best]
        superseded = [step for step in steps[: -self._max_to_keep] if step not in best]
        # The first process decides: others may still see an old file.
        decided = processes.gather_messages(" ".join(map(str, superseded)))[0]
        for old in map(int, decided.split()):
            self._manager.delete(old)

    def wait(self) -> None:
        """Returns when the save in flight is on disk; raises if it failed."""
        with self._unusable_disk_is_an_input_error():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save in flight and ends the threads."""
        with self._unusable_disk_is_an_input_error():
            self._manager.close()

    @contextlib.contextmanager
    def _unusable_disk_is_an_input_error(self):
        """Orbax reports a full or failing disk in many lines, and TensorStore as a ValueError."""
        try:
            yield
        except (OSError, ValueError) as error:
            text = arrays.one_line(error)
            full = ("No space left", "RESOURCE_EXHAUSTED", "quota exceeded")
            unusable = ("Read-only file system", "Permission denied", "Input/output error")
            signs = (*full, *unusable, "File too large")
            if not any(sign in text for sign in signs):
                raise
            hint = _RESUME_HINT
            if not any(sign in text for sign in full):
                hint = (
                    "; earlier checkpoints are kept; rerun the same command when that is repaired"
                )
            raise InputError(
                f"cannot write a checkpoint to {self.directory}: {text}{hint}"
            ) from error

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending, the one in flight included."""
        return sorted(self._manager.all_steps())

    def restore_latest(
        self,
        abstract_state: Any,
        former_names: Mapping[str, str] | None = None,
        *,
        parts_may_differ: bool = False,
    ) -> Restored | None:
        """Restores the newest checkpoint that can be read.

        Damaged checkpoints newer than that one are reported and renamed to
        `checkpoints/damaged_STEP`, so that their steps can be saved again.

        Args:
          abstract_state: tree of arrays or of jax.ShapeDtypeStruct. The restored arrays have its
            types and, where given, its shardings; an array without one goes to the first device of
            this process.
          former_names: former name -> present name of a field of the state. Where the checkpoint
            has no array of the present name, the one of the former name is restored. None: the
            names of the first version.
          parts_may_differ: for a run whose config was changed, see stored_states.match. Parts of
            the state that the checkpoint lacks stay abstract.

        Returns:
          None if there is no checkpoint at all.

        Raises:
          InputError: every checkpoint is damaged (then none is renamed), or one does not match the
            abstract state.
        """
        if former_names is None:
            former_names = stored_states.first_version_names()
        match = functools.partial(
            stored_states.match, former_names=former_names, parts_may_differ=parts_may_differ
        )
        self.wait()
        self._manager.reload()
        damaged: list[int] = []
        while (step := self._newest_step(damaged)) is not None:
            try:
                restored = self._restore(step, abstract_state, match)
            except DamagedFilesError as error:
                _log.warning(
                    "checkpoint of step %d in %s is damaged: %s", step, self.directory, error
                )
                damaged.append(step)
                continue
            for bad in damaged:
                self._rename_damaged(bad)
            self._manager.reload()
            return restored
        if damaged:
            raise InputError(_none_readable(self.directory, damaged))
        return None

    def _newest_step(self, excluded: list[int]) -> int | None:
        """The newest step but those excluded, as the first process sees the directory."""
        step = max((step for step in self.steps() if step not in excluded), default=-1)
        step = processes.broadcast_from_primary(step)
        return None if step < 0 else step

    def _restore(
        self, step: int, abstract_state: Any, match: Callable[..., stored_states.Match]
    ) -> Restored:
        """Restores a step on all processes, or raises the same kind of error on all of them.

        Raises:
          DamagedFilesError: some process finds the files damaged, and none has another error.
          InputError: the checkpoint does not match the abstract state.
        """
        restored, damage, error = None, "", None
        try:
            restored = self._restore_alone(step, abstract_state, match)
        except DamagedFilesError as e:
            damage = str(e)
        except Exception as e:
            error = e
        # Other errors come first: no checkpoint must be given up because of them.
        processes.raise_on_all_processes(error)
        damages = [text for text in processes.gather_messages(damage) if text]
        if damages:
            raise DamagedFilesError(damages[0])
        assert restored is not None
        return restored

    def _restore_alone(
        self, step: int, abstract_state: Any, match: Callable[..., stored_states.Match]
    ) -> Restored:
        """Restores what this process holds of a step, without waiting for others."""
        folder = self.directory / str(step)

        def read_metadata():
            metadata = ocp.JsonCheckpointHandler().restore(folder / _METADATA)
            metadata = {**metadata, "data_state": _decode(metadata["data_state"])}
            return arrays.read_metadata(folder / _STATE), metadata

        stored, metadata = arrays.read_with_retries(read_metadata)
        what = f"checkpoint of step {step} in {self.directory}"
        found = match(stored, abstract_state, what)
        needed, names = found.stored, found.names
        leaves = arrays.leaves_by_name(abstract_state)
        wanted = {stored_name: leaves[name] for name, stored_name in names.items()}
        try:
            state = arrays.read_with_retries(
                lambda: arrays.read_on_devices(folder / _STATE, needed, wanted)
            )
        except DamagedFilesError as error:
            # A full device or a wrong sharding fails here too. Then reading into host memory works.
            arrays.read_with_retries(lambda: arrays.read_as_numpy(folder / _STATE, needed))
            raise (error.__cause__ or error) from None

        def restored_leaf(path, leaf):
            name = arrays.path_name(path)
            return state[names[name]] if name in names else leaf

        tree = jax.tree_util.tree_map_with_path(restored_leaf, abstract_state)
        return Restored(step, tree, metadata)

    def _rename_damaged(self, step: int) -> None:
        if processes.is_primary():
            target, n = self.directory / f"damaged_{step}", 1
            while target.exists():
                n += 1
                target = self.directory / f"damaged_{step}_{n}"
            (self.directory / str(step)).rename(target)
        processes.wait_for_all(f"hmar_jax renamed damaged checkpoint {step}")


def load_params_of_run(
    workdir: os.PathLike | str, *more: str, averaged: bool = False, checkpoint: int | str = "latest"
) -> tuple[int, dict[str, Any]]:
    """Reads the parameters of a run, without its optimizer state, as numpy arrays on the host.

    The abstract state need not be known. Nothing in the run directory is changed, so the run may be
    training.

    Args:
      workdir: the run directory.
      *more: other top-level parts of the state to read, such as "opt_state".
      averaged: read the moving average of the parameters in their place, where the run keeps one.
      checkpoint: "latest" (the newest readable one), "best" (of lowest validation loss among those
        kept) or a step.

    Returns:
      The step, and {"params": …, and each part in `more`}.

    Raises:
      InputError: there is no such run or checkpoint, it has no such part, or none can be read.
    """
    directory = absolute(workdir) / "checkpoints"
    if not absolute(workdir).is_dir():
        raise InputError(f"run directory {workdir} does not exist")
    damaged = []
    steps = (
        _steps_from_newest(directory)
        if checkpoint == "latest"
        else [_step_of(directory, checkpoint)]
    )
    for step in steps:
        folder = directory / str(step) / _STATE
        where = f"checkpoint of step {step} in {directory}"
        try:
            found = arrays.read_with_retries(
                functools.partial(_read_parts, folder, more, averaged, where)
            )
        except DamagedFilesError as error:
            if not folder.exists():
                continue  # The run has removed it meanwhile: it keeps only its last few.
            _log.warning("%s is damaged: %s", where, error)
            damaged.append(step)
            continue
        if damaged:
            _log.warning("using the last readable checkpoint, of step %d", step)
        return step, found
    if damaged:
        raise InputError(_none_readable(directory, damaged))
    raise InputError(
        f"{workdir} has no checkpoints"
        if checkpoint == "latest"
        else f"checkpoint {checkpoint} of {workdir} no longer exists"
    )


def check_fits(workdir: os.PathLike | str, step: int, abstract_state: Any) -> None:
    """Raises InputError where the checkpoint of a step could not be restored by a changed run.

    Its arrays are not read. Nothing is raised where it is damaged or missing: `restore_latest`
    decides what then.

    Args:
      abstract_state: see `RunCheckpoints.restore_latest`.
    """
    directory = absolute(workdir) / "checkpoints"
    try:
        stored = arrays.read_with_retries(
            functools.partial(arrays.read_metadata, directory / str(step) / _STATE, "step")
        )
    except DamagedFilesError:
        return
    stored_states.match(
        stored, abstract_state, f"checkpoint of step {step} in {directory}", parts_may_differ=True
    )


def steps_of_run(workdir: os.PathLike | str) -> list[int]:
    """The steps of a run's checkpoints, ascending, damaged ones included."""
    return sorted(_steps_from_newest(absolute(workdir) / "checkpoints"))


def metadata_of_run(workdir: os.PathLike | str, step: int) -> dict[str, Any]:
    """What `RunCheckpoints.save` got by name for a step; {} where it cannot be read."""
    file = absolute(workdir) / "checkpoints" / str(step) / _METADATA / "metadata"
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_parts(
    folder: epath.Path, more: tuple[str, ...], averaged: bool, where: str
) -> dict[str, Any]:
    """The parameters, or their moving average, and more parts of a stored state."""
    stored = arrays.read_metadata(folder, "params", *more, *([_EMA] if averaged else []))
    stored = stored if isinstance(stored, dict) else {}
    params = _EMA if averaged and stored.get(_EMA) else "params"
    for key in (params, *more):
        if key not in stored:
            raise InputError(f"{where} has no {key!r}")
    found = arrays.read_as_numpy(folder, {key: stored[key] for key in (params, *more)})
    found["params"] = found.pop(params)
    return found


def _step_of(directory: epath.Path, checkpoint: int | str) -> int:
    """The step of the checkpoint "best", or of that number."""
    steps = sorted(_steps_from_newest(directory))
    known = f"known steps: {', '.join(map(str, steps)) or 'none'}"
    if checkpoint == "best":
        losses = {step: _saved_loss(directory / str(step)) for step in steps}
        best = min(losses, key=losses.__getitem__, default=None)
        if best is None or losses[best] == math.inf:
            raise InputError(
                f"no checkpoint in {directory} was saved with a validation loss; {known}"
            )
        _log.info(
            "the best checkpoint in %s is of step %d, validation loss %.4g",
            directory,
            best,
            losses[best],
        )
        return best
    if checkpoint not in steps:
        raise InputError(f"no checkpoint {checkpoint!r} in {directory}; {known}, or latest or best")
    return checkpoint


def _saved_loss(folder: epath.Path) -> float:
    """The validation loss that a checkpoint was saved with, inf without one."""
    file = folder / "metrics" / "metrics"  # as CheckpointManager writes it
    return (
        _validation_loss(read_json(file, "the validation loss of a checkpoint"))
        if file.exists()
        else math.inf
    )


def _validation_loss(metrics: dict[str, float]) -> float:
    """The loss in a checkpoint's metrics; a missing one or NaN is worse than all others."""
    value = metrics.get(_LOSS, math.inf)
    return math.inf if math.isnan(value) else value


def _steps_from_newest(directory: epath.Path) -> Iterator[int]:
    """Steps on disk, newest first, listed again each time: a run in training changes them."""
    tried = set()
    while True:
        found = (
            ocp.path.step.standard_name_format().find_all(directory) if directory.is_dir() else ()
        )
        steps = {entry.step for entry in found} - tried
        if not steps:
            return
        tried.add(max(steps))
        yield max(steps)


def _encode(data_state: Any) -> Any:
    """Grain's iterator states are bytes or dicts; JSON has no bytes."""
    return (
        {"base64": base64.b64encode(data_state).decode()}
        if isinstance(data_state, bytes)
        else {"json": data_state}
    )


def _decode(encoded: dict[str, Any]) -> Any:
    return base64.b64decode(encoded["base64"]) if "base64" in encoded else encoded["json"]


def _none_readable(directory: epath.Path, damaged: list[int]) -> str:
    steps = ", ".join(map(str, sorted(damaged)))
    return (
        f"no checkpoint in {directory} can be read (steps {steps}): "
        "restore the files from a backup, or use another workdir"
    )
