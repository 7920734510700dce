"""Writing and reading small files so that a reader sees all of a file or none of it, and mistakes take one line.

Local paths are written to a temporary file beside the target and renamed over it. Other paths (gs://) are written
directly: object stores show an object only when it is whole.
"""

import io
import json
import math
import os
import secrets
import stat
import time
from typing import Any

from etils import epath

from hmar_jax.errors import InputError


def is_local(path: os.PathLike | str) -> bool:
    """Whether the path is on this machine's file system rather than in an object store (gs://, s3://)."""
    return "://" not in os.fspath(path)


def absolute(path: os.PathLike | str) -> epath.Path:
    """The path, absolute if it is local. Orbax takes no relative paths."""
    return epath.Path(os.path.abspath(path) if is_local(path) else path)


def write_atomically(path: os.PathLike | str, data: bytes | str) -> None:
    """Writes the file; whoever reads it, and whenever this process dies, finds the old contents or the new ones.

    Symbolic links are followed. A device or a pipe (/dev/stdout) is written in place.

    Raises:
      OSError: it cannot be written, as on a full disk; the error's filename is `path`.
    """
    data = data.encode() if isinstance(data, str) else data
    if not is_local(path):
        epath.Path(path).write_bytes(data)
        return
    target = os.path.realpath(path)
    if _is_special(target):
        with open(target, "wb") as file:
            file.write(data)
        return
    temporary = _create_beside(target)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None:
            error.filename, error.filename2 = os.fspath(path), None  # not the temporary file's name
        raise


class AppendedFile:
    """A text file that grows. A local one has each line at once.

    Object stores cannot append: there the whole file is written anew, at most once in some seconds, and on closing. For logs.
    """

    _SECONDS = 30

    def __init__(self, path: os.PathLike | str):
        self._path = epath.Path(path)
        self._written = -math.inf
        if is_local(path):
            self._file = open(path, "a", buffering=1)
        else:
            self._file = io.StringIO()
            if self._path.exists():
                self._file.write(self._path.read_text())

    def write(self, text: str) -> None:
        self._file.write(text)
        if isinstance(self._file, io.StringIO) and time.monotonic() - self._written > self._SECONDS:
            self._upload()

    def flush(self) -> None:
        """For logging, after every line: nothing."""

    def sync(self) -> None:
        """Everything written so far is in the file."""
        if isinstance(self._file, io.StringIO):
            self._upload()

    def close(self) -> None:
        if isinstance(self._file, io.StringIO):
            self._upload()
        self._file.close()

    def _upload(self) -> None:
        self._path.write_text(self._file.getvalue())
        self._written = time.monotonic()

    def __enter__(self) -> "AppendedFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def check_writable(path: os.PathLike | str) -> None:
    """Raises InputError now if `write_atomically(path, ...)` would fail after an hour of work.

    A file is created in the folder and removed: permission bits say nothing to root or on a read-only file system.
    Paths in object stores are not checked.
    """
    name = os.fspath(path)
    if not is_local(name):
        return
    if not name:
        raise InputError("the name of the output file is empty")
    if "\0" in name:
        raise InputError(f"cannot write {name!r}: the name contains a null character")
    if os.path.isdir(name) or name.endswith(os.sep):
        raise InputError(f"cannot write {name}: it names a folder, name a file")
    target = os.path.realpath(name)
    folder = os.path.dirname(target)
    if not os.path.exists(folder):
        raise InputError(f"cannot write {name}: there is no folder {folder}")
    if not os.path.isdir(folder):
        raise InputError(f"cannot write {name}: {folder} is a file, not a folder")
    try:
        if _is_special(target):
            with open(target, "wb"):
                return
        os.unlink(_create_beside(target))
    except OSError as error:
        raise InputError(f"cannot write {name}: {error.strerror}") from error


def read_json(path: os.PathLike | str, what: str) -> Any:
    """The contents of a JSON file; `what` names it in errors, as in "the configuration of the model"."""
    try:
        text = epath.Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{what} is missing: there is no file {path}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is damaged: {path} is not text") from error
    except OSError as error:
        raise InputError(f"{what} cannot be read: {path}: {error.strerror or error}") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{what} is damaged: {path} is not JSON ({error})") from error


def _is_special(target: str) -> bool:
    """Renaming over a device would replace it: /dev/null would become a file for everybody."""
    try:
        return not stat.S_ISREG(os.stat(target).st_mode)
    except FileNotFoundError:
        return False


def _create_beside(target: str) -> str:
    """An empty new file in the target's folder. Not tempfile's: those are readable by their owner alone."""
    # The name carries as much of the target's as leaves room, so that a leftover tells where it came from.
    temporary = os.path.join(
        os.path.dirname(target), f".{os.path.basename(target)[:64]}.{secrets.token_hex(4)}.tmp"
    )
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return temporary
