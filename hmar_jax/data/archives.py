"""Archives that are read in place: a tree of names to list, and bytes by position.

An archive has one table of its members, which is read once. A member is then one `pread`, which
has no position that threads or forked processes could move under each other.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from hmar_jax.data.suggestion import suggest
from hmar_jax.errors import InputError

FOLDER_OF_MACOS = "__MACOSX"  # beside the images, with ._NAME for each of them


class ArchiveFile:
    """A local file that several threads and processes read at once, each process by its own handle.

    A pickled one has no handle: the process that loads it opens the file at its first read.
    """

    def __init__(self, path: str):
        self.path = path
        self._identity = _identity(os.stat(path))
        self._start()

    def _start(self) -> None:
        self._lock, self._descriptor = threading.Lock(), -1

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_identity": self._identity}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def read(self, offset: int, size: int) -> bytes:
        """Bytes from an offset on; fewer than `size` where the file ends.

        Raises:
          OSError: the file cannot be read.
          InputError: the file is another one than was listed.
        """
        descriptor = self._open()
        data = os.pread(descriptor, size, offset)
        while len(data) < size:  # a signal, or more than 2 GiB
            more = os.pread(descriptor, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def _open(self) -> int:
        with self._lock:
            if self._descriptor < 0:
                descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                weakref.finalize(self, os.close, descriptor)
                if _identity(os.fstat(descriptor)) != self._identity:
                    raise InputError(
                        f"{self.path} was changed after it had been listed; rerun the command"
                    )
                self._descriptor = descriptor
        return self._descriptor


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


class ArchiveFolder:
    """A folder in an archive, or a file in it: what listings need of a path.

    Attributes:
      where: how messages call it: the archive's path, and the folder in it.
      inside: its path in the archive; "" is the top.
    """

    def __init__(self, archive: "Archive", inside: str, node: Any):
        self._archive, self.inside, self._node = archive, inside, node
        self.where = os.path.join(archive.path, inside) if inside else archive.path

    def __str__(self) -> str:
        return self.where

    def __truediv__(self, name: str) -> "ArchiveFolder":
        node = self._node.get(name, _MISSING) if self.is_dir() else _MISSING
        return ArchiveFolder(self._archive, f"{self.inside}/{name}".lstrip("/"), node)

    @property
    def name(self) -> str:
        return self.inside.rpartition("/")[2]

    def is_dir(self) -> bool:
        return isinstance(self._node, dict)

    def exists(self) -> bool:
        return self._node is not _MISSING

    def children(self) -> Iterator[tuple[str, bool, bool]]:
        """(name, whether it is a folder, whether it is a file; neither: a link or a device)."""
        for name, node in self._node.items():
            is_folder = isinstance(node, dict)
            yield name, is_folder, not is_folder and node is not None

    def member(self, path: str) -> int:
        """The number of a file below this folder, as it was given to `Archive`."""
        node = self._node
        for name in path.split("/"):
            node = node[name]
        return node

    def read_bytes(self) -> bytes:
        """The contents of a file.

        Raises:
          OSError: the archive is damaged there.
        """
        return self._archive.read_member(self._node)


_MISSING = object()


class Archive:
    """The names in an archive, as a tree of folders.

    Attributes:
      path: of the archive.
      read_member: returns the contents of a file by its number; raises OSError where it is damaged.
    """

    def __init__(self, path: str, read_member: Callable[[int], bytes]):
        self.path, self.read_member = path, read_member
        self._tree: dict[str, Any] = {}

    @property
    def top(self) -> ArchiveFolder:
        return ArchiveFolder(self, "", self._tree)

    def add(self, name: str, node: Mapping | int | None) -> None:
        """Adds a file by its number, a folder ({}), or what is neither (None).

        A later file replaces one of the same name, as it does where archives are unpacked.
        """
        *folders, last = [part for part in name.split("/") if part not in ("", ".")] or [""]
        if not last or FOLDER_OF_MACOS in (last, *folders):
            return
        tree = self._tree
        for folder in folders:
            below = tree.get(folder)
            if not isinstance(below, dict):
                below = tree[folder] = {}
            tree = below
        if not isinstance(tree.get(last), dict):
            tree[last] = node

    def data_folder(self, marks: Collection[str], endings: Collection[str]) -> ArchiveFolder:
        """The folder that holds the data: most archives have one folder around everything.

        Such a folder has no other folder and no image beside it. It holds folders and no image, or
        one of the files `marks`: a single folder of images is a class.
        """
        folder = self.top
        while True:
            folders, has_images, has_mark = _contents(folder, marks, endings)
            if len(folders) != 1 or folders == ["train"] or has_images or has_mark:
                return folder
            inner = folder / folders[0]
            below, has_images, has_mark = _contents(inner, marks, endings)
            if not has_mark and (has_images or not below):
                return folder
            folder = inner


def _contents(
    folder: ArchiveFolder, marks: Collection[str], endings: Collection[str]
) -> tuple[list[str], bool, bool]:
    """The folders in a folder, whether it has images, and whether it has one of the files."""
    shown = [child for child in folder.children() if not child[0].startswith(".")]
    folders = [name for name, is_folder, _ in shown if is_folder]
    files = [name for name, is_folder, _ in shown if not is_folder]
    has_images = any(name[name.rfind(".") :].lower() in endings for name in files)
    return folders, has_images, any(name in marks for name in files)


def check_file(path: str, kind: str) -> None:
    """Raises InputError unless `kind:PATH` names an existing local file that can be opened."""
    if "://" in path:
        raise InputError(
            f"{kind}:FILE must be a local file, because single images are read from it; copy "
            f"{path} to each host, or unpack it there and give folder:DIR"
        )
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder, not a file; did you mean {suggest(path)}?")
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist; {kind}:FILE requires an archive of images")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
