"""Fingerprints of data sets: which examples there are, in which order. Where they lie is left out.

A fingerprint covers names, sizes and labels, not contents: no image is read. So a copy of a data
set in another folder, on another mount or in a bucket has the same fingerprint, and a set to which
an image was added has another.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, Protocol

import numpy as np

from hmar_jax.errors import InputError
from hmar_jax.io.files import is_local

_THREADS = 32  # network file systems and object stores answer slowly, but to many requests at once
_FILES_PER_TASK = 1000
_DIGEST_BYTES = 8
_UNKNOWN_SIZE = -1  # of a file that is listed and cannot be found, such as a broken link
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES)


class Split(Protocol):
    """One split of a data set: a source of images, or encoded images."""

    @property
    def num_classes(self) -> int: ...

    def __len__(self) -> int: ...

    def fingerprint(self) -> str: ...


def describe_data(spec: str, splits: Mapping[str, Split]) -> dict[str, Any]:
    """Describes a data set as a run directory records it, in JSON types.

    Args:
      spec: the data set as the user named it.
      splits: by name, "train" or "validate".

    Returns:
      {"source", "classes": number of classes, and for each split {"images", "fingerprint"}}; a
      split of encoded images also has "crops".
    """
    data: dict[str, Any] = {"source": spec, "classes": next(iter(splits.values())).num_classes}
    for name, split in splits.items():
        crops = {"crops": split.crops} if hasattr(split, "crops") else {}
        data[name] = {"images": len(split), **crops, "fingerprint": split.fingerprint()}
    return data


def fingerprint_files(root: str, files: Sequence[str], labels: Sequence[int] | np.ndarray) -> str:
    """Returns 16 hexadecimal digits that depend on names, sizes, labels and order of files.

    Args:
      root: folder, local or in an object store.
      files: names relative to root.
      labels: of each file.

    Raises:
      InputError: the sizes cannot be read.
    """
    try:
        return fingerprint_listed(files, labels, _sizes(root, files))
    except OSError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the sizes of the files in {root} cannot be read: {reason}") from error


def fingerprint_listed(
    files: Sequence[str], labels: Sequence[int] | np.ndarray, sizes: Iterable[int]
) -> str:
    """Returns the digits of `fingerprint_files` for files whose sizes in bytes are known."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for name, label, size in zip(files, labels, sizes, strict=True):
        digest.update(b"%d %d %b\0" % (label, size, os.fsencode(name)))
    return digest.hexdigest()


def fingerprint_values(*values: Any) -> str:
    """Returns 16 hexadecimal digits that depend on values that JSON has."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def _sizes(root: str, files: Sequence[str]) -> Iterator[int]:
    """Bytes of each file."""
    return local_sizes(root, files) if is_local(root) else _remote_sizes(root, files)


def local_sizes(root: str, files: Sequence[str]) -> Iterator[int]:
    """Bytes of each file in the file system; -1 for those that are not there."""

    def sizes_of(start: int) -> list[int]:
        return [_local_size(os.path.join(root, f)) for f in files[start : start + _FILES_PER_TASK]]

    with futures.ThreadPoolExecutor(_THREADS) as pool:
        for sizes in pool.map(sizes_of, range(0, len(files), _FILES_PER_TASK)):
            yield from sizes


def _local_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        if error.errno in _NO_FILE:
            return _UNKNOWN_SIZE
        raise


def _remote_sizes(root: str, files: Sequence[str]) -> Iterator[int]:
    """From the listings of the folders: a request for each file would take hours."""
    from fsspec.core import url_to_fs  # it comes with etils.epath

    system, base = url_to_fs(root)

    def list_folder(folder: str) -> dict[str, int]:
        path = f"{base.rstrip('/')}/{folder}".rstrip("/")
        entries = system.ls(path, detail=True, refresh=True)
        return {os.path.basename(entry["name"]): int(entry["size"] or 0) for entry in entries}

    folders = list(dict.fromkeys(os.path.dirname(file) for file in files))
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        sizes = dict(zip(folders, pool.map(list_folder, folders)))
    for file in files:
        folder, name = os.path.split(file)
        yield sizes[folder].get(name, _UNKNOWN_SIZE)
