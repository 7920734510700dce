"""Small files: written as a whole or not at all, and read with one-line errors.

A local file is written to a temporary file in the same folder and renamed. Other paths (gs://) are
written directly: an object store shows an object only when it is complete.
"""

import codecs
import contextlib
import errno
import glob
import io
import json
import math
import os
import secrets
import shlex
import stat
import time
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

from etils import epath

from hmar_jax.errors import InputError, printable

_NAME_IN_TEMPORARY = 64  # characters of a file's name in that of its temporary file


def is_local(path: os.PathLike | str) -> bool:
    """Whether a path is in the file system, not in an object store (gs://, s3://)."""
    return "://" not in os.fspath(path)


def expand(path: os.PathLike | str) -> str:
    """The path with `~` and `~USER` at its beginning replaced by the home directory.

    Shells leave `--workdir=~/runs` and `folder:~/images` as they are. Every path that a user gives
    passes here once, where it enters: on the command line, in a config, or as an argument of the
    Python API. Other paths, and those in object stores (gs://), come back as they are.

    Raises:
      InputError: there is no such user, and no file of that name; or it cannot be a path.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"a path must be a text or a pathlib.Path; got {path!r}")
    text = os.fspath(path)
    if "\0" in text:
        raise InputError(f"path {text!r} contains a null character")
    if not text.startswith("~") or not is_local(text):
        return text
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and not os.path.lexists(text):
        user = text.split("/")[0]
        raise InputError(
            f"path {text!r} names the home directory of a user that does not exist; "
            f"for a file or folder that is called {user!r}, write ./{text}"
        )
    return expanded


def absolute(path: os.PathLike | str) -> epath.Path:
    """The path, expanded and made absolute if it is local. Orbax accepts no relative paths."""
    return epath.Path(os.path.abspath(expand(path)) if is_local(path) else path)


def write_atomically(path: os.PathLike | str, data: bytes | str) -> None:
    """Writes a file so that every reader finds either the old or the new contents.

    This holds even if the process is killed. Symbolic links are followed. A device or a pipe
    (/dev/stdout) is written in place.

    Raises:
      OSError: it cannot be written, for example on a full disk. Its filename is `path`.
    """
    data = data.encode() if isinstance(data, str) else data
    if not is_local(path):
        epath.Path(path).write_bytes(data)
        return
    if _is_special(path):
        with _open_special(path) as file:
            file.write(data)
        return
    with open_atomically(path) as file:
        file.write(data)


@contextlib.contextmanager
def open_atomically(path: os.PathLike | str) -> Iterator[BinaryIO]:
    """Opens a local file for a `with` block that writes what is too large for the memory.

    Every reader finds either the old contents or, after the block, the new ones. If the block
    raises an error, the old contents stay. Symbolic links are followed.

    Raises:
      OSError: it cannot be written, for example on a full disk. Its filename is `path`.
    """
    target, temporary = os.path.realpath(path), ""
    try:
        temporary = _create_temporary_file(target)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):  # the folder may have been moved
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None:
            error.filename, error.filename2 = os.fspath(path), None  # not the temporary file's name
        raise


def remove_leftovers(path: os.PathLike | str) -> None:
    """Removes temporary files of a local file whose writer was killed."""
    folder, name = os.path.split(os.path.realpath(path))
    pattern = f".{glob.escape(name[:_NAME_IN_TEMPORARY])}.{'[0-9a-f]' * 8}.tmp"
    for leftover in glob.glob(os.path.join(glob.escape(folder), pattern)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(leftover)


class AppendedFile:
    """A text file for logs, which grows by lines. A local file contains each line at once.

    Object stores cannot append: there the whole file is uploaded again, at most every _SECONDS
    seconds, and on `sync` and `close`.
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
        """Does nothing; logging calls it after every line."""

    def sync(self) -> None:
        """Returns when everything written so far is in the file."""
        if isinstance(self._file, io.StringIO):
            self._upload()

    def close(self) -> None:
        if isinstance(self._file, io.StringIO):
            self._upload()
        self._file.close()

    def _upload(self) -> None:
        assert isinstance(self._file, io.StringIO)
        self._path.write_text(self._file.getvalue())
        self._written = time.monotonic()

    def __enter__(self) -> "AppendedFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def check_writable(path: os.PathLike | str) -> None:
    """Raises InputError now if `write_atomically(path, ...)` would fail later.

    It creates a file in the folder and removes it, because permission bits say nothing to root or
    on a read-only file system. Paths in object stores are not checked.
    """
    name = os.fspath(path)
    if not is_local(name):
        return
    if not name:
        raise InputError("the name of the output file must not be empty")
    if "\0" in name:
        raise InputError(f"cannot write {name!r}: the name contains a null character")
    if os.path.isdir(name) or name.endswith(os.sep):
        raise InputError(f"cannot write {name}: it names a folder; name a file")
    if _is_special(name):
        # Not opened: who reads a named pipe would take the closing for its end.
        if name not in _OPEN_FILES and not os.access(name, os.W_OK):
            raise InputError(f"cannot write {name}: {os.strerror(errno.EACCES)}")
        return
    target = os.path.realpath(name)
    folder = os.path.dirname(target)
    if not os.path.exists(folder):
        raise InputError(f"cannot write {name}: folder {folder} does not exist")
    if not os.path.isdir(folder):
        raise InputError(f"cannot write {name}: {folder} is a file, not a folder")
    try:
        os.unlink(_create_temporary_file(target))
    except OSError as error:
        raise InputError(f"cannot write {name}: {error.strerror}") from error


def check_new_directory(path: os.PathLike | str) -> None:
    """Raises InputError unless a local path is a new or an empty directory that can be written.

    Nothing stays of the attempt. Hidden files (.DS_Store) do not count.
    """
    name = os.fspath(path)
    if not is_local(name):
        raise InputError(f"cannot write {name}: it must be a local directory")
    folder = os.path.realpath(name)
    if os.path.isdir(folder):
        found = sorted(entry for entry in os.listdir(folder) if not entry.startswith("."))
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise InputError(
                f"{name} must be a new or an empty directory; it contains {printable(found[0])}"
                f"{more}; choose another one"
            )
    check_directory_writable(name)


def check_directory_writable(path: os.PathLike | str) -> None:
    """Raises InputError unless files can be created in a local directory, which need not exist."""
    name = os.fspath(path)
    folder = os.path.realpath(name)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise InputError(f"cannot write {name}: {folder} is a file, not a folder")
    try:
        os.unlink(_create_temporary_file(os.path.join(folder, "new")))
    except OSError as error:
        raise InputError(f"cannot write {name}: {error.strerror}") from error


class Readable(Protocol):
    """A file that is no path, such as one in an archive; `str()` of it names it."""

    def read_bytes(self) -> bytes: ...


def read_text(path: os.PathLike | str | Readable, what: str) -> str:
    r"""Reads a text file that a user may have written: UTF-8, with or without a byte-order mark.

    Args:
      path: local, or gs://, or a file in an archive.
      what: names the file in errors, as in "the class names".

    Returns:
      The text without a byte-order mark; lines end in \n, also those of files from Windows.

    Raises:
      InputError: the file is missing, cannot be read, or has another encoding.
    """
    try:
        file = epath.Path(path) if isinstance(path, str | os.PathLike) else path
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{what} is missing: {path} does not exist") from error
    except OSError as error:
        raise InputError(f"{what} cannot be read: {path}: {error.strerror or error}") from error
    text = _decode(data, path, what)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decode(data: bytes, path: os.PathLike | str | Readable, what: str) -> str:
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if wide:
            found, name = "UTF-16", "UTF-16"
        else:
            line = data.count(b"\n", 0, error.start) + 1
            found = f"another encoding (line {line} has the byte 0x{data[error.start]:02x})"
            name = "LATIN1"
        raise InputError(_encoding_error(what, path, found, name)) from error
    if "\0" in text:  # ASCII letters in UTF-16 without a mark; also other binary files
        found = "UTF-16, or no text (it has null characters)"
        raise InputError(_encoding_error(what, path, found, "UTF-16"))
    return text


def _encoding_error(what: str, path: os.PathLike | str | Readable, found: str, name: str) -> str:
    file = shlex.quote(str(path))
    return (
        f"{what} must be UTF-8 text; {path} is {found}; save it as UTF-8, for example by "
        f"iconv -f {name} -t UTF-8 {file} > NEW"
    )


def read_json(path: os.PathLike | str | Readable, what: str) -> Any:
    """Reads a JSON file.

    Args:
      path: local, or gs://, or a file in an archive.
      what: names the file in errors, as in "the configuration of the model".

    Raises:
      InputError: the file is missing, cannot be read or is not JSON.
    """
    text = read_text(path, what)
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{what} is damaged: {path} is not JSON ({error})") from error


# Names of what the process has open. As links they lead to "pipe:[1234]", or to a file that a shell
# appends to.
_OPEN_FILES = {"/dev/stdout": 1, "/dev/stderr": 2, "/dev/fd/1": 1, "/dev/fd/2": 2}


def is_standard_output(path: os.PathLike | str) -> bool:
    """Whether a path names the standard output, as /dev/stdout does."""
    return _OPEN_FILES.get(os.fspath(path)) == 1


def _is_special(path: os.PathLike | str) -> bool:
    """Whether a path must be written in place: renaming would replace a device by a file."""
    if os.fspath(path) in _OPEN_FILES:
        return True
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:  # a new file; or one that fails to be created, with an error of its own
        return False


def _open_special(path: os.PathLike | str) -> BinaryIO:
    number = _OPEN_FILES.get(os.fspath(path))
    # A copy of what is open: after what has been written, where the shell appends to a file.
    return open(path if number is None else os.dup(number), "wb")


def _create_temporary_file(target: str) -> str:
    """A new empty file in the target's folder.

    Unlike a file of the tempfile module, it is not readable by its owner alone. Its name begins
    with that of the target, so that a leftover can be recognised.
    """
    temporary = os.path.join(
        os.path.dirname(target),
        f".{os.path.basename(target)[:_NAME_IN_TEMPORARY]}.{secrets.token_hex(4)}.tmp",
    )
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return temporary
