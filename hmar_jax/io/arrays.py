"""Trees of arrays stored with Orbax: checks before writing, and reading that finds damage.

Orbax and TensorStore raise errors of many types. Files count as damaged only if several attempts to
read them failed: network file systems and object stores also fail for a moment.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from hmar_jax.errors import InputError
from hmar_jax.io.files import is_local

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

RETRY_DELAYS = (1.0, 3.0)  # seconds before each further attempt to read


class DamagedFilesError(Exception):
    """Files are missing, too short or unreadable. The message is the reason, on one line."""


def read_with_retries(read: Callable[[], _T]) -> _T:
    """Calls `read`; where it fails, calls it again after a pause.

    Raises:
      DamagedFilesError: every attempt failed.
      InputError, MemoryError: from the first attempt, since the files are not the cause.
    """
    for delay in (*RETRY_DELAYS, None):
        try:
            return read()
        except (InputError, MemoryError):
            raise
        except Exception as error:
            if delay is None:
                raise DamagedFilesError(one_line(error)) from error
            _log.debug("reading failed, next attempt in %g s: %s", delay, one_line(error))
            time.sleep(delay)
    raise AssertionError("the last attempt returns or raises")


def read_metadata(folder: epath.Path, *parts: str) -> Any:
    """Reads the shapes and types of the arrays stored in a folder.

    Args:
      folder: written by Orbax.
      parts: top-level names; the data of other arrays is not checked. None: check all of them.

    Returns:
      Nested dicts and lists of array metadata, of the whole stored tree.

    Raises:
      Exception: of many types, where files are damaged or cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    # Orbax opens and reads all arrays at once, and for each damaged one it prints a traceback to
    # stderr. So check first what Orbax will read: listing the keys reads the whole index in one
    # call, and reading a value shows whether its file exists and is long enough. This takes a third
    # of the time of restoring. In object stores and with several processes, only the index is
    # checked.
    name = f"{os.fspath(folder)}/"
    base = {"driver": "file", "path": name} if is_local(folder) else name
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = store.list().result()
    if not keys:
        raise FileNotFoundError(f"{folder} contains no arrays")
    if is_local(folder) and jax.process_count() == 1:
        for key in keys:
            # Components of array names are joined with dots: "params.block.w/.zarray".
            part = key.decode().split("/")[0].split(".")[0]
            if (not parts or part in parts) and not store.read(key).result().value:
                raise FileNotFoundError(f"{key.decode()} in {folder} is missing")
    return ocp.PyTreeCheckpointHandler().metadata(folder).tree


def read_as_numpy(folder: epath.Path, metadata: Any) -> Any:
    """Reads the arrays named by `metadata`, a part of the stored tree; float16 becomes float32."""

    def restore_args(leaf):
        dtype = np.dtype(np.float32) if leaf.dtype == np.float16 else None
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)

    args = ocp.args.PyTreeRestore(
        item=metadata, restore_args=jax.tree.map(restore_args, metadata), partial_restore=True
    )
    return ocp.PyTreeCheckpointHandler().restore(folder, args=args)


def read_on_devices(
    folder: epath.Path, metadata: Any, leaves: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Reads a stored tree, or some of its top-level parts, into jax arrays.

    Unlike Orbax's Checkpointer, this does not wait for other processes: each process reads its own
    shards, and an error on one of them leaves no other waiting.

    Args:
      folder: written by Orbax.
      metadata: of `read_metadata`; without the parts that are not read.
      leaves: for each of these stored arrays, by name, an array or jax.ShapeDtypeStruct whose type
        and, where given, sharding the result has. Without a sharding it is on this process's first
        device.

    Returns:
      The arrays by the same names.
    """
    item = jax.tree_util.tree_map_with_path(
        lambda path, _: _with_sharding(leaves[path_name(path)]), metadata
    )
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    return leaves_by_name(ocp.PyTreeCheckpointHandler().restore(folder, args=args))


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def path_name(path: Any) -> str:
    """The name of a leaf from its path in a tree, such as "opt_state/0/mu/w"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree, arrays or their metadata, by the names of `path_name`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves if hasattr(leaf, "shape")}


def check_leaves(tree: Any, what: str) -> None:
    """Raises TypeError or ValueError for a leaf that Orbax would reject midway, or change."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = what + jax.tree_util.keystr(path)
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise TypeError(f"{name} must be an array; got {leaf!r}")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{name} is a typed random key: save its jax.random.key_data")
        if leaf.size == 0:
            raise ValueError(
                f"{name} has shape {leaf.shape}: Orbax does not store arrays without elements"
            )


def check_free_space(directory: os.PathLike | str, tree: Any, what: str, hint: str = "") -> None:
    """Raises InputError where this process's arrays of the tree do not fit on the local disk.

    Orbax notices it midway, and reports it in hundreds of lines.

    Args:
      directory: where the arrays will be written; it need not exist.
      tree: the arrays.
      what: names them in the error.
      hint: appended to the error.
    """
    if not is_local(directory):
        return
    folder = os.path.realpath(directory)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    needed = 0
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            needed += sum(s.data.nbytes for s in leaf.addressable_shards if s.replica_id == 0)
        else:
            needed += leaf.nbytes
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"not enough disk space for {what} in {directory}: "
            f"{needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free{hint}"
        )


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks and without TensorStore's page of settings."""
    text = " ".join(str(error).split(" [tensorstore_spec")[0].split())
    text = text or type(error).__name__
    return text if len(text) <= 240 else text[:240] + "..."
