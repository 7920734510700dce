"""What a command writes: checked before the work, so that no result is lost at its end."""

import os
import sys
from collections.abc import Iterable, Mapping
from typing import TextIO

from hmar_jax.errors import InputError
from hmar_jax.io import files

Paths = Mapping[str, str | None]


def check(outputs: Paths, inputs: Paths | None = None, **endings: tuple[str, ...]) -> None:
    """Raises InputError unless every output can be written, each to a file of its own.

    Args:
      outputs: paths by option, as in {"out": "grid.png"}; None: not given.
      inputs: files that must not be overwritten.
      **endings: by option, those that its file may have.
    """
    given = {name: path for name, path in outputs.items() if path is not None}
    for name, path in given.items():
        files.check_writable(path)
        allowed = endings.get(name)
        if allowed and not path.lower().endswith(allowed) and not _is_device(path):
            raise InputError(f"--{name} must end in {_join(allowed)}; got {path}")
    seen: dict[str, str] = {}
    for name, path in given.items():
        if _is_device(path):
            continue
        for other, there in (inputs or {}).items():
            if there is not None and _identity(there) == _identity(path):
                raise InputError(
                    f"--{name} {path} would overwrite --{other} {there}; name another file"
                )
        first = seen.setdefault(_identity(path), name)
        if first != name:
            raise InputError(
                f"--{first} and --{name} must be different files; got {given[first]} and {path}"
            )


def is_directory(path: str, endings: Iterable[str]) -> bool:
    """Whether --out names a directory rather than a file.

    It does if it ends with a slash or has no ending; an existing directory also with another ending
    than those of files.
    """
    if _is_device(path):
        return False
    ending = os.path.splitext(path)[1].lower()
    return path.endswith(os.sep) or not ending or (os.path.isdir(path) and ending not in endings)


def stream_for_words(*paths: str | None) -> TextIO:
    """Where a command prints what it has done: stdout, unless one of its files goes there."""
    piped = any(path is not None and files.is_standard_output(path) for path in paths)
    return sys.stderr if piped else sys.stdout


def _identity(path: str) -> str:
    """The same for two names of one file. Some file systems take a.png and A.png for one."""
    return (os.path.realpath(path) if files.is_local(path) else path).casefold()


def _is_device(path: str) -> bool:
    """Whether it is a device or a pipe, such as /dev/null, or /dev/stdout wherever that leads."""
    if not files.is_local(path) or not os.path.exists(path):
        return False
    return path.startswith("/dev/") or not (os.path.isfile(path) or os.path.isdir(path))


def _join(words: tuple[str, ...]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
