"""Model directories and the checkpoints of a run, both stored with Orbax.

A model directory holds `config.json`, `params/` and `README.md`, and appears whole or not at all. A run keeps its last
few checkpoints in `workdir/checkpoints/STEP`: `state` (arrays) and `extra` (JSON: where the data loader stands, and
what else the caller wants back). Orbax commits a checkpoint by renaming it, so a process killed at any moment leaves
whole checkpoints and, at worst, a temporary folder that the next start removes. What a disk loses later (missing or
shortened files) is found on restoring, and the checkpoint before takes its place. Bits that flip inside a file of the
right length are not all found: Orbax writes no checksums of the array data.
"""

import base64
import contextlib
import json
import logging
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from hmar_jax.errors import InputError
from hmar_jax.io.files import absolute, is_local, read_json, write_atomically

_log = logging.getLogger(__name__)
_STATE, _EXTRA = "state", "extra"
_AVERAGE = "ema_params"  # in a state
_LOSS = "validation_loss"


# Model directories


def check_new_model(directory: os.PathLike | str, overwrite: bool = False) -> None:
    """Raises InputError now if `save_model(directory, ...)` would refuse later. Creates the parent folders."""
    if not is_local(directory):
        if (absolute(directory) / "config.json").exists() and not overwrite:
            raise InputError(
                f"{directory} holds a model or a run: name another directory, or allow overwriting"
            )
        return
    target = os.path.realpath(directory)
    if os.path.lexists(target) and not os.path.isdir(target):
        raise InputError(f"cannot write a model to {directory}: it is a file")
    if os.path.isdir(target) and os.listdir(target) and not overwrite:
        raise InputError(
            f"{directory} exists and is not empty: name another directory, or allow overwriting"
        )
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.rmdir(_temporary_beside(target))
    except OSError as error:
        raise InputError(f"cannot write a model to {directory}: {error.strerror}") from error


def save_model(
    directory: os.PathLike | str,
    config: dict[str, Any],
    params: Any,
    readme: str,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a model directory; it appears, or replaces an old one, only when complete.

    In an object store (gs://) nothing can be renamed: there config.json, without which it is no model, is written last.

    Call it in one process, with parameters that this process holds whole. They may have any floating-point type;
    float16 halves the files and comes back as float32.
    """
    check_new_model(directory, overwrite)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    params = jax.tree.map(np.asarray, params)
    _check_leaves(params, "params")
    _check_room(directory, params, "the model")
    if not is_local(directory):
        _write_model(absolute(directory), text, params, readme)
        return
    target = os.path.realpath(directory)
    temporary = _temporary_beside(target)
    try:
        _write_model(absolute(temporary), text, params, readme)
        _replace_directory(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_model(directory: epath.Path, config: str, params: Any, readme: str) -> None:
    # This process alone: by default Orbax waits for all the processes of a multi-host program to save together.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"model_{jax.process_index()}",
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        # force: over what a process left that was killed here; in a local directory there is nothing yet
        checkpointer.save(directory / "params", args=ocp.args.PyTreeSave(params), force=True)
    write_atomically(directory / "README.md", readme)
    write_atomically(directory / "config.json", config)


def load_model(directory: os.PathLike | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration and the parameters (nested dicts of numpy arrays on the host) of a model directory.

    Nothing needs to be known beforehand, and the devices need not be those that saved it. Leaves stored as float16
    come back as float32; all others as they were saved.
    """
    path = absolute(directory)
    if not path.is_dir():
        raise InputError(f"there is no model directory {directory}")
    missing = [name for name in ("config.json", "params") if not (path / name).exists()]
    if missing:
        hint = ": it is a run directory" if (path / "checkpoints").exists() else ""
        raise InputError(
            f"{directory} is not a model directory, it has no {' and no '.join(missing)}{hint}"
        )
    config = read_json(path / "config.json", f"the configuration of the model {directory}")
    try:
        return config, _read_as_numpy(path / "params", _metadata(path / "params"))
    except Exception as error:  # Orbax and tensorstore raise many kinds.
        raise InputError(
            f"the parameters of the model {directory} are damaged: {_one_line(error)}"
        ) from error


# The checkpoints of a run


class Restored(NamedTuple):
    """What `RunCheckpoints.restore_latest` found."""

    step: int
    state: Any  # A tree like the abstract state, of jax arrays.
    extra: dict[str, Any]  # What `save` was given by name, and `data_state`: bytes, JSON or None.


class RunCheckpoints:
    """Saves the state of a run in the background and finds the last good checkpoint again.

    Use it in a `with` block: Python does not wait for a save in flight when it exits, so without `close` the last
    checkpoint is lost. All processes of a multi-host program must make the same calls and see the same files: of
    damage that only some of them find, the others know nothing and wait for them.
    """

    def __init__(self, workdir: os.PathLike | str, max_to_keep: int = 3, keep_best: int = 0):
        """Keeps the newest `max_to_keep`, and the `keep_best` of least validation loss among those saved with one."""
        self.directory = absolute(workdir) / "checkpoints"
        keep, better = [policies.LatestN(max_to_keep)], None
        if keep_best:
            better = _validation_loss
            keep.append(
                policies.BestN(
                    get_metric_fn=better,
                    reverse=True,
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            best_fn=better,
            best_mode="min",
            cleanup_tmp_directories=True,
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise InputError(
                f"cannot keep checkpoints in {self.directory}: {error.strerror or error}"
            ) from error

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
        **extra: Any,
    ) -> bool:
        """Starts saving and returns once the arrays are copied to the host, so they may be donated or changed then.

        A save still in flight is waited for first, and raises here if it failed. Random keys must be raw
        (`jax.random.key_data`). `extra` is anything that JSON takes. `validation_loss`, where the state has been
        evaluated, decides whether the checkpoint is among the best. Returns False, and does nothing, if the step is saved
        already.
        """
        if step in self._manager.all_steps():
            return False
        _check_leaves(state, _STATE)
        # As text and back: what is not JSON is found here and not in a thread, and the caller may change its dicts.
        extra = json.loads(json.dumps({**extra, "data_state": _encode(data_state)}))
        _check_room(
            self.directory,
            state,
            f"the checkpoint of step {step}",
            "; those before it are kept, and the same command goes on",
        )
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), extra=ocp.args.JsonSave(extra))
        # force: Orbax would skip, without a word, a step below the newest on disk.
        metrics = {} if validation_loss is None else {_LOSS: float(validation_loss)}
        with self._no_room_is_an_input_error():
            return self._manager.save(step, args=args, metrics=metrics, force=True)

    def wait(self) -> None:
        """Returns when the save in flight is on disk; raises if it failed."""
        with self._no_room_is_an_input_error():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save in flight and ends the threads."""
        with self._no_room_is_an_input_error():
            self._manager.close()

    @contextlib.contextmanager
    def _no_room_is_an_input_error(self):
        """Of a full disk Orbax tells in many lines, and TensorStore as a ValueError."""
        try:
            yield
        except (OSError, ValueError) as error:
            text = _one_line(error)
            if not any(
                sign in text for sign in ("No space left", "RESOURCE_EXHAUSTED", "quota exceeded")
            ):
                raise
            raise InputError(
                f"a checkpoint cannot be written to {self.directory}: {text}; the ones before it are kept, and where there is "
                "room the same command goes on"
            ) from error

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending, the one in flight included."""
        return sorted(self._manager.all_steps())

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """The newest checkpoint that can be read, or None if there is none at all.

        `abstract_state` is a tree of arrays or of jax.ShapeDtypeStruct; the restored arrays take its types and, where
        given, its shardings (without: this process's first device). Damaged checkpoints newer than the one returned
        are reported and renamed to `checkpoints/damaged_STEP`, so that their steps can be saved again. InputError if
        every checkpoint is damaged (nothing is renamed then), or if one is of a model of another shape.
        """
        self.wait()
        self._manager.reload()
        damaged = []
        for step in reversed(self.steps()):
            try:
                restored = self._restore(step, abstract_state)
            except _Damaged as error:
                _log.warning(
                    "checkpoint of step %d in %s is damaged: %s", step, self.directory, error
                )
                damaged.append(step)
                continue
            for bad in damaged:
                self._move_aside(bad)
            self._manager.reload()
            return restored
        if damaged:
            raise InputError(_none_readable(self.directory, damaged))
        return None

    def _restore(self, step: int, abstract_state: Any) -> Restored:
        folder = self.directory / str(step)
        try:
            metadata = _metadata(folder / _STATE)
            extra = ocp.JsonCheckpointHandler().restore(folder / _EXTRA)
            extra = {**extra, "data_state": _decode(extra["data_state"])}
        except Exception as error:
            raise _Damaged(_one_line(error)) from error
        _check_same_tree(metadata, abstract_state, f"checkpoint of step {step} in {self.directory}")

        abstract = jax.tree.map(_with_sharding, abstract_state)
        args = ocp.args.PyTreeRestore(
            item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
        )
        try:
            state = self._manager.restore(step, args=ocp.args.Composite(state=args))[_STATE]
        except Exception:
            # A second opinion, because a full device or a wrong sharding fails here too and is no damage.
            try:
                _read_as_numpy(folder / _STATE, metadata)
            except Exception as error:
                raise _Damaged(_one_line(error)) from error
            raise
        return Restored(step, state, extra)

    def _move_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            target, n = self.directory / f"damaged_{step}", 1
            while target.exists():
                n += 1
                target = self.directory / f"damaged_{step}_{n}"
            (self.directory / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"hmar_jax checkpoint {step} moved aside")


def load_params_of_run(
    workdir: os.PathLike | str, *more: str, averaged: bool = False, checkpoint: int | str = "latest"
) -> tuple[int, dict[str, Any]]:
    """The step and {"params": ..., and each key named} of a checkpoint, as numpy arrays on the host.

    `checkpoint` is "latest" (the latest good one), "best" (of least validation loss among those kept) or a step. With
    `averaged`, "params" is the moving average of the parameters, where the run keeps one.

    Only these parts of the state are read: no optimizer state in memory, and no need to know the optimizer. Nothing
    in the run directory is changed, so the run may be training meanwhile.
    """
    directory = absolute(workdir) / "checkpoints"
    if not absolute(workdir).is_dir():
        raise InputError(f"there is no run directory {workdir}")
    damaged = []
    for step in (
        _steps_from_newest(directory)
        if checkpoint == "latest"
        else [_step_of(directory, checkpoint)]
    ):
        folder = directory / str(step) / _STATE
        try:
            metadata = _metadata(folder, "params", *more, *([_AVERAGE] if averaged else []))
            params = (
                _AVERAGE
                if averaged and isinstance(metadata, dict) and metadata.get(_AVERAGE)
                else "params"
            )
            for key in (params, *more):
                if not isinstance(metadata, dict) or key not in metadata:
                    raise InputError(f"checkpoint of step {step} in {directory} has no {key!r}")
            found = _read_as_numpy(folder, {key: metadata[key] for key in (params, *more)})
            found["params"] = found.pop(params)
            if damaged:
                _log.warning("using the last good checkpoint, of step %d", step)
            return step, found
        except InputError:
            raise
        except Exception as error:
            if not folder.exists():
                continue  # The run has removed it since: it keeps its last few only.
            _log.warning(
                "checkpoint of step %d in %s is damaged: %s", step, directory, _one_line(error)
            )
            damaged.append(step)
    if damaged:
        raise InputError(_none_readable(directory, damaged))
    raise InputError(
        f"{workdir} has no checkpoints"
        if checkpoint == "latest"
        else f"checkpoint {checkpoint} of {workdir} is gone"
    )


def _step_of(directory: epath.Path, checkpoint: int | str) -> int:
    """The step of the checkpoint "best", or of that number."""
    steps = sorted(_steps_from_newest(directory))
    there = f"there are those of steps {', '.join(map(str, steps))}" if steps else "there are none"
    if checkpoint == "best":
        losses = {step: _saved_loss(directory / str(step)) for step in steps}
        best = min(losses, key=losses.get, default=None)
        if best is None or losses[best] == math.inf:
            raise InputError(
                f"no checkpoint in {directory} was saved with a validation loss; {there}"
            )
        _log.info(
            "the best checkpoint in %s is of step %d, validation loss %.4g",
            directory,
            best,
            losses[best],
        )
        return best
    if checkpoint not in steps:
        raise InputError(
            f"no checkpoint {checkpoint!r} in {directory}; {there}, and latest and best"
        )
    return checkpoint


def _saved_loss(folder: epath.Path) -> float:
    """The validation loss that a checkpoint was saved with, inf for none."""
    file = folder / "metrics" / "metrics"  # as CheckpointManager writes it
    return (
        _validation_loss(read_json(file, "the validation loss of a checkpoint"))
        if file.exists()
        else math.inf
    )


def _validation_loss(metrics: dict[str, float]) -> float:
    """Of a checkpoint; without one it is worse than every other."""
    value = metrics.get(_LOSS, math.inf)
    return math.inf if math.isnan(value) else value


# Reading with Orbax


class _Damaged(Exception):
    """A checkpoint that cannot be read; the message is the reason, on one line."""


def _metadata(folder: epath.Path, *parts: str) -> Any:
    """Shapes and types of the arrays stored in a folder, in nested dicts and lists; raises if files are damaged.

    Only the arrays under the top-level names `parts` are looked at, or all of them.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    # Orbax opens and reads all arrays at once, and when files are damaged leaves a traceback of each on stderr. So look
    # first at what Orbax will read: listing the keys reads the whole index in one call, and reading a value shows
    # whether its file is there and long enough. That takes a third of the time of restoring; elsewhere than on a local
    # disk, or on many hosts, the index must do.
    name = f"{os.fspath(folder)}/"
    base = {"driver": "file", "path": name} if is_local(folder) else name
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = store.list().result()
    if not keys:
        raise FileNotFoundError(f"{folder} contains no arrays")
    if is_local(folder) and jax.process_count() == 1:
        for key in keys:
            # Names of arrays are joined with dots: "params.block.w/.zarray".
            if (not parts or key.decode().split("/")[0].split(".")[0] in parts) and not store.read(
                key
            ).result().value:
                raise FileNotFoundError(f"{key.decode()} in {folder} is missing")
    return ocp.PyTreeCheckpointHandler().metadata(folder).tree


def _read_as_numpy(folder: epath.Path, metadata: Any) -> Any:
    """The arrays that `metadata`, all of the stored tree or a part of it, names; float16 widened to float32."""

    def wanted(leaf):
        return ocp.RestoreArgs(
            restore_type=np.ndarray, dtype=np.float32 if leaf.dtype == np.float16 else None
        )

    args = ocp.args.PyTreeRestore(
        item=metadata, restore_args=jax.tree.map(wanted, metadata), partial_restore=True
    )
    return ocp.PyTreeCheckpointHandler().restore(folder, args=args)


def _steps_from_newest(directory: epath.Path) -> Iterator[int]:
    """Steps on disk, newest first, listed anew each time because a running training adds and removes some."""
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


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(
        jax.local_devices()[0]
    )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _leaves_by_name(tree: Any) -> dict[str, Any]:
    """Arrays, or what stands for them, by names such as "opt_state/0/mu/w"; empty nodes and None are left out."""
    flat = ocp.tree.to_flat_dict(ocp.tree.serialize_tree(tree, keep_empty_nodes=True))
    return {"/".join(map(str, path)): leaf for path, leaf in flat.items() if hasattr(leaf, "shape")}


def _check_same_tree(metadata: Any, abstract_state: Any, what: str) -> None:
    """Raises InputError naming the first leaf that the checkpoint lacks, has too many, or has in another shape."""
    stored, wanted = _leaves_by_name(metadata), _leaves_by_name(abstract_state)
    for name in [*wanted, *stored]:
        if name not in stored:
            raise InputError(
                f"{what} is of another model: it has no {name}, which this configuration needs"
            )
        if name not in wanted:
            raise InputError(
                f"{what} is of another model: it has {name}, which this configuration does not"
            )
        if tuple(stored[name].shape) != tuple(wanted[name].shape):
            shapes = f"{tuple(stored[name].shape)} there and {tuple(wanted[name].shape)} in this configuration"
            raise InputError(f"{what} is of another model: {name} has shape {shapes}")


def _check_leaves(tree: Any, what: str) -> None:
    """Raises for leaves that Orbax would refuse midway, or that would not come back as they were."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = what + jax.tree_util.keystr(path)
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise TypeError(f"{name} is {leaf!r}: wanted an array")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{name} is a typed random key: save its jax.random.key_data")
        if leaf.size == 0:
            raise ValueError(
                f"{name} has shape {leaf.shape}: Orbax does not store arrays without elements"
            )


def _check_room(directory: os.PathLike | str, tree: Any, what: str, more: str = "") -> None:
    """Raises InputError where this process's arrays of the tree are larger than what is free on the local disk.

    Orbax finds out midway, and tells it in hundreds of lines.
    """
    if not is_local(directory):
        return
    folder = os.path.realpath(directory)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    arrays = [
        part
        for leaf in jax.tree.leaves(tree)
        for part in (
            [s.data for s in leaf.addressable_shards if s.replica_id == 0]
            if isinstance(leaf, jax.Array)
            else [leaf]
        )
    ]
    wanted, free = sum(x.nbytes for x in arrays), shutil.disk_usage(folder).free
    if wanted > free:
        raise InputError(
            f"there is no room for {what} in {directory}: it has {wanted / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free{more}"
        )


def _encode(data_state: Any) -> Any:
    """Grain's iterator states are bytes or dicts; JSON has no bytes."""
    return (
        {"base64": base64.b64encode(data_state).decode()}
        if isinstance(data_state, bytes)
        else {"json": data_state}
    )


def _decode(encoded: dict[str, Any]) -> Any:
    return base64.b64decode(encoded["base64"]) if "base64" in encoded else encoded["json"]


def _one_line(error: BaseException) -> str:
    """The reason without line breaks and without tensorstore's page of settings."""
    text = " ".join(str(error).split(" [tensorstore_spec")[0].split())
    text = text or type(error).__name__
    return text if len(text) <= 240 else text[:240] + "..."


def _none_readable(directory: epath.Path, damaged: list[int]) -> str:
    steps = ", ".join(map(str, sorted(damaged)))
    return f"no checkpoint in {directory} can be read (steps {steps}): bring back the files or use another workdir"


# Renaming directories


def _temporary_beside(target: str) -> str:
    """A new directory next to the target, on the same file system: only there is renaming one step."""
    temporary = os.path.join(
        os.path.dirname(target), f".{os.path.basename(target)[:64]}.{secrets.token_hex(4)}.tmp"
    )
    os.mkdir(temporary)
    return temporary


def _replace_directory(new: str, target: str) -> None:
    if not os.path.isdir(target) or not os.listdir(target):
        os.replace(new, target)  # Also over an empty directory.
        return
    # A directory with contents cannot be renamed over, so for a moment there is neither; the old one is then beside.
    old = _temporary_beside(target)
    os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
