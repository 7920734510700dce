"""Model directories: `config.json`, `params/` (stored with Orbax) and `README.md`."""

import json
import os
import pathlib
import secrets
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from hmar_jax.errors import InputError, keyword
from hmar_jax.io import arrays
from hmar_jax.io.files import absolute, is_local, read_json, write_atomically

_FILES = {"config.json", "params", "README.md"}  # of a model directory


def check_new_model(directory: os.PathLike | str, overwrite: bool = False) -> None:
    """Raises InputError now if `save_model(directory, ...)` would refuse later.

    Creates the parent folders.
    """
    target = absolute(directory) if not is_local(directory) else epath.Path(_real(directory))
    if is_local(directory) and os.path.lexists(target) and not os.path.isdir(target):
        raise InputError(f"cannot write a model to {directory}: it is a file")
    _check_replaceable(directory, target, overwrite)
    if not is_local(directory):
        return
    for folder in pathlib.Path(target).parents:
        if {"config.json", "params"} <= set(_listing(folder)):
            raise InputError(
                f"{directory} lies inside the model {folder}, which must hold nothing else; choose "
                "another directory"
            )
        if os.path.lexists(folder) and not os.path.isdir(folder):
            raise InputError(f"cannot write a model to {directory}: {folder} is a file")
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.rmdir(_create_temporary_directory(os.fspath(target)))
    except OSError as error:
        raise InputError(f"cannot write a model to {directory}: {error.strerror}") from error


def _listing(folder: pathlib.Path) -> list[str]:
    """Names in a folder; none if it is missing or may not be read."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _real(directory: os.PathLike | str) -> str:
    """The path without symbolic links: a link to a model stays a link when the model changes."""
    return os.path.realpath(directory)


def _check_replaceable(directory: os.PathLike | str, target: epath.Path, overwrite: bool) -> None:
    """Refuses a directory with contents, except that a model may replace a model if asked to."""
    contents = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if not contents:
        return
    is_run = "checkpoints" in contents
    is_model = "config.json" in contents and contents <= _FILES
    if not overwrite:
        what = "contains a run" if is_run else "is not empty"
        cure = f", or replace the model in it with {keyword('overwrite', True)}" if is_model else ""
        raise InputError(f"{directory} {what}: choose another directory{cure}", overwrite=True)
    # An object store shows what a killed process left half-written: that may be replaced.
    if is_run or (is_local(directory) and not is_model):
        other = "a run" if is_run else sorted(contents - _FILES or contents)[0]
        raise InputError(
            f"{directory} contains {other}: only a directory with nothing but a model may be "
            "overwritten; choose another one"
        )


def save_model(
    directory: os.PathLike | str,
    config: dict[str, Any],
    params: Any,
    readme: str,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a model directory, which appears, or replaces an old one, only when it is complete.

    Nothing can be renamed in an object store (gs://): there config.json, without which a directory
    is no model, is written last. Call it in one process.

    Args:
      directory: local, or gs://.
      config: the content of config.json.
      params: nested dicts of arrays that this process holds whole, of any floating-point type;
        float16 halves the files and is read as float32.
      readme: the content of README.md.
      overwrite: replace the model that the directory contains.

    Raises:
      InputError: the directory has contents that it must not replace, cannot be written, or has not
        enough space.
    """
    check_new_model(directory, overwrite)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    params = jax.tree.map(np.asarray, params)
    arrays.check_leaves(params, "params")
    arrays.check_free_space(directory, params, "the model")
    if not is_local(directory):
        _write_model(absolute(directory), text, params, readme)
        return
    target = _real(directory)
    temporary = _create_temporary_directory(target)
    try:
        _write_model(absolute(temporary), text, params, readme)
        _replace_directory(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_model(directory: epath.Path, config: str, params: Any, readme: str) -> None:
    # By default Orbax waits until all processes of a multi-host program save together.
    this_process = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"model_{jax.process_index()}",
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=this_process)
    with ocp.Checkpointer(handler, multiprocessing_options=this_process) as checkpointer:
        # force: replaces what a killed process left. A local directory is new and empty.
        checkpointer.save(directory / "params", args=ocp.args.PyTreeSave(params), force=True)
    write_atomically(directory / "README.md", readme)
    write_atomically(directory / "config.json", config)


def load_model(directory: os.PathLike | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a model directory. The devices may differ from those that saved it.

    Returns:
      The configuration, and the parameters: nested dicts of numpy arrays on the host. Arrays stored
      as float16 become float32; all others keep their type.

    Raises:
      InputError: there is no such directory, it is not a model, or its files are damaged.
    """
    path = absolute(directory)
    if not path.is_dir():
        raise InputError(f"model directory {directory} does not exist")
    missing = [name for name in ("config.json", "params") if not (path / name).exists()]
    if missing:
        hint = " (it is a run directory)" if (path / "checkpoints").exists() else ""
        raise InputError(
            f"{directory} is not a model directory: it has no {' and no '.join(missing)}{hint}"
        )
    config = read_json(path / "config.json", f"the configuration of the model {directory}")
    folder = path / "params"
    try:
        params = arrays.read_with_retries(
            lambda: arrays.read_as_numpy(folder, arrays.read_metadata(folder))
        )
    except arrays.DamagedFilesError as error:
        raise InputError(f"the parameters of the model {directory} are damaged: {error}") from error
    return config, params


def check_shapes(expected: Any, params: Any, failure: str) -> None:
    """Refuses parameters that are not those of a model.

    Args:
      expected: nested dicts of arrays, or of what jax.eval_shape has in their place.
      params: the same, as they were read.
      failure: begins the error.

    Raises:
      InputError: a parameter is missing, is one too many, or has another shape.
    """
    shapes = [
        {jax.tree_util.keystr(path, simple=True, separator="."): np.shape(x) for path, x in leaves}
        for leaves in map(jax.tree.leaves_with_path, (expected, params))
    ]
    for name in sorted(shapes[0] | shapes[1]):
        wanted, got = (
            f"shape {found[name]}" if name in found else "nothing of this name" for found in shapes
        )
        if wanted != got:
            raise InputError(f"{failure}: {name} must have {wanted}; got {got}")


# Renaming directories


def _create_temporary_directory(target: str) -> str:
    """A new directory next to the target: renaming is one step only within a file system."""
    temporary = os.path.join(
        os.path.dirname(target), f".{os.path.basename(target)[:64]}.{secrets.token_hex(4)}.tmp"
    )
    os.mkdir(temporary)
    return temporary


def _replace_directory(new: str, target: str) -> None:
    if not os.path.isdir(target) or not os.listdir(target):
        os.replace(new, target)  # also over an empty directory
        return
    # A directory with contents cannot be replaced in one step: for a moment the old one has a
    # temporary name.
    old = _create_temporary_directory(target)
    os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
