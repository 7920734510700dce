"""Folders of image files, with or without class folders, on disk or in an object store."""

import dataclasses
import io
import os
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np
from etils import epath

from hmar_jax.data.class_folders import VALIDATE_FOLDERS, find_splits
from hmar_jax.data.decoding import MAX_PIXELS, ImageDecodeError, decode_image
from hmar_jax.data.fingerprint import fingerprint_files
from hmar_jax.data.source_config import SourceConfig
from hmar_jax.data.suggestion import suggest
from hmar_jax.errors import InputError
from hmar_jax.io.files import expand, is_local


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files on disk or in an object store."""

    name: str
    class_names: tuple[str, ...]
    root: str
    files: tuple[str, ...]  # relative to root, in label order and sorted within a class
    labels: np.ndarray  # (N,) int32
    max_pixels: int = MAX_PIXELS

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        path = os.path.join(self.root, self.files[index])
        file = path if is_local(path) else _download(path)
        image = decode_image(file, path, self.max_pixels)
        return {"image": image, "label": int(self.labels[index])}

    def fingerprint(self) -> str:
        """See `data.sources.Source.fingerprint`."""
        return fingerprint_files(self.root, self.files, self.labels)


def _download(path: str) -> BinaryIO:
    """Returns the contents of an object in a store."""
    try:
        return io.BytesIO(epath.Path(path).read_bytes())
    except OSError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageDecodeError(path, reason) from error


def is_among_images(root: os.PathLike | str, path: os.PathLike | str) -> bool:
    """Whether a directory, which need not exist, is one that is searched for images of `root`."""
    if not is_below(root, path):
        return False
    top = os.path.realpath(expand(root))
    first = os.path.relpath(os.path.realpath(expand(path)), top).split(os.sep)[0]
    return first in ("train", *VALIDATE_FOLDERS) or not os.path.isdir(os.path.join(top, "train"))


def is_below(root: os.PathLike | str, path: os.PathLike | str) -> bool:
    """Whether a directory, which need not exist, lies in another, and is not hidden there.

    The other directory itself does not: it is not empty, so nothing is written to it.
    """
    top = os.path.realpath(expand(root))
    folders = os.path.relpath(os.path.realpath(expand(path)), top).split(os.sep)
    if folders[0] in (os.curdir, os.pardir):
        return False
    return not any(name.startswith(".") for name in folders)


def open_folder(
    path: str, splits: Iterable[str], need_classes: bool, config: SourceConfig
) -> dict[str, FolderSource]:
    """Opens a folder of images; lists it once for all splits.

    Args:
      path: the folder; `hmar_jax.data.sources.open_source` describes its layout.
      splits: "train", "validate" or both.
      need_classes: whether to reject a folder without class folders.
      config: what is read of it.

    Returns:
      The images of each split.

    Raises:
      InputError: there is no such folder, it has no images, or its layout is not one of the known.
    """
    spec = f"folder:{path}"
    root = epath.Path(expand(path))
    try:
        is_folder = root.is_dir()
    except ImportError as error:
        raise InputError(
            f'{spec} requires gcsfs (for gs://) or s3fs (for s3://): pip install "hmar_jax[gcs]"'
        ) from error
    if not is_folder:
        problem = "is a file, not a folder" if root.exists() else "does not exist"
        hint = f"did you mean {suggest(path)}? " if suggest(path) else ""
        raise InputError(
            f"{root} {problem}; {hint}folder:DIR requires a folder with images in "
            "DIR/train/CLASS, DIR/CLASS or DIR"
        )

    name = f"folder:{os.fspath(root)}"
    found = find_splits(root, splits, need_classes, config, name)
    return {
        split: FolderSource(
            name, f.class_names, os.fspath(f.root), f.files, f.labels, config.max_pixels
        )
        for split, f in found.items()
    }
