"""Folders of image files, with or without class folders, on disk or in an object store."""

import dataclasses
import hashlib
import io
import logging
import os
import re
from collections.abc import Collection
from concurrent import futures
from typing import BinaryIO

import numpy as np
from etils import epath

from hmar_jax.data.decoding import ImageDecodeError, decode_image
from hmar_jax.errors import InputError
from hmar_jax.io.files import expand, is_local, read_text

_log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

_CLASS_NAME_FILES = (
    "class_names.txt",
    "LOC_synset_mapping.txt",  # this one and the next come with ImageNet
    "synset_words.txt",
)
_VALIDATE_FOLDERS = ("validate", "val", "validation")
_LISTING_THREADS = 32  # for folders in object stores
_MAX_REPORTED = 5  # names in a warning
_HELD_OUT_FRACTION = 0.02  # for validation, if a folder has no validation images of its own


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files on disk or in an object store."""

    name: str
    class_names: tuple[str, ...]
    root: str
    files: tuple[str, ...]  # relative to root, in label order and sorted within a class
    labels: np.ndarray  # (N,) int32

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        path = os.path.join(self.root, self.files[index])
        image = decode_image(path) if is_local(path) else decode_image(_download(path), path)
        return {"image": image, "label": int(self.labels[index])}


def _download(path: str) -> BinaryIO:
    """Returns the contents of an object in a store."""
    try:
        return io.BytesIO(epath.Path(path).read_bytes())
    except OSError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageDecodeError(path, reason) from error


def open_folder(path: str, split: str, need_classes: bool) -> FolderSource:
    """Opens a folder of images.

    Args:
      path: the folder; `hmar_jax.data.sources.open_source` describes its layout.
      split: "train" or "validate".
      need_classes: whether to reject a folder without class folders.

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
        raise InputError(
            f"{root} {problem}; folder:DIR requires a folder with images in DIR/train/CLASS, "
            "DIR/CLASS or DIR"
        )

    has_train = (root / "train").is_dir()
    train_root = root / "train" if has_train else root
    classes = _list_classes(train_root)
    if not any(classes.values()):
        raise InputError(
            f"no images in {train_root}; there must be files that end in {' '.join(EXTENSIONS)}"
        )
    if need_classes and "" in classes:
        raise InputError(
            f"{train_root} has images but no class folders; move them to class folders, such as "
            f"{train_root}/CLASS/{classes[''][0]}, or all of them to one folder to train without "
            "classes"
        )
    listed = _read_class_names(root, classes, warn=split == "train")
    names = tuple(
        "all" if folder == "" else listed.get(folder) or _readable_name(folder, files)
        for folder, files in classes.items()
    )

    validate_root = None
    if has_train:
        candidates = (root / folder for folder in _VALIDATE_FOLDERS)
        validate_root = next((folder for folder in candidates if folder.is_dir()), None)

    files_root = train_root
    if validate_root is None:
        all_files = [file for files in classes.values() for file in files]
        held_out = _hold_out(all_files, train_root)
        keep_held_out = split == "validate"
        classes = {
            folder: [file for file in files if (file in held_out) == keep_held_out]
            for folder, files in classes.items()
        }
    elif split == "validate":
        found = _list_classes(validate_root)
        unknown = sorted(set(found) - set(classes))
        if unknown:
            what = f"class folder {unknown[0]!r}" if unknown[0] else "images outside class folders"
            raise InputError(
                f"{validate_root} has {what} and {train_root} does not; both must have the same "
                "classes"
            )
        if not any(found.values()):
            raise InputError(
                f"no images in {validate_root}; add some, or remove it to hold out 2 % of "
                f"{train_root}"
            )
        classes = {folder: found.get(folder, []) for folder in classes}
        files_root = validate_root

    files = tuple(file for files in classes.values() for file in files)
    sizes = [len(files) for files in classes.values()]
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), sizes)
    return FolderSource(f"folder:{os.fspath(root)}", names, os.fspath(files_root), files, labels)


def _list_classes(root: epath.Path) -> dict[str, list[str]]:
    """Lists the files of each class folder.

    Returns:
      Class folder name to its files, relative to root, all sorted. If root itself holds the images:
      {"": files}.
    """
    entries = _list_entries(root)
    loose = [name for name, is_folder in entries if not is_folder]
    folders = [name for name, is_folder in entries if is_folder]
    # Object stores answer slowly, but to many requests at once.
    with futures.ThreadPoolExecutor(1 if is_local(root) else _LISTING_THREADS) as pool:
        found = pool.map(lambda name: _list_images(root / name, name, (_resolve(root),)), folders)
        classes = dict(zip(folders, found))
    nonempty = [folder for folder, files in classes.items() if files]
    if loose and nonempty:
        raise InputError(
            f"{root} has images ({loose[0]}) next to folders of images ({nonempty[0]}); move every "
            "image to the folder of its class, or all of them to one folder without classes"
        )
    return {"": loose} if loose else classes


def _list_images(folder: epath.Path, relative: str, parents: tuple[str, ...]) -> list[str]:
    resolved = _resolve(folder)
    if resolved in parents:  # a symbolic link to a folder that contains it
        return []
    found = []
    for name, is_folder in _list_entries(folder):
        if is_folder:
            found += _list_images(folder / name, f"{relative}/{name}", (*parents, resolved))
        else:
            found.append(f"{relative}/{name}")
    return found


def _list_entries(folder: epath.Path) -> list[tuple[str, bool]]:
    """Lists names of images and folders, sorted, and whether each is a folder; no hidden files."""
    if is_local(folder):
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.is_dir()) for entry in entries]
    else:  # one request per name to an object store would take hours
        found = [(path.name, "." not in path.name) for path in folder.iterdir()]
    return sorted(
        (name, is_folder)
        for name, is_folder in found
        if not name.startswith(".") and (is_folder or _is_image(name))
    )


def _resolve(folder: epath.Path) -> str:
    return os.path.realpath(folder) if is_local(folder) else os.fspath(folder)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _readable_name(folder: str, files: list[str]) -> str:
    """Returns the class name in the file names of a folder, or else the folder's name.

    "tench" for folder n01440764 with files n01440764_tench.jpg and n01440764_tench_2.jpg.
    """
    parts = set()
    for file in files:
        stem = os.path.splitext(os.path.basename(file))[0]
        if not stem.startswith(folder + "_"):
            return folder
        parts.add(re.sub(r"[_-]*\d+$", "", stem[len(folder) + 1 :]))
        if len(parts) > 1:  # numbers such as n01440764_10026.JPEG leave one empty part
            return folder
    name = parts.pop() if parts else ""
    return name if re.search("[^\\W\\d_]", name) else folder


def _read_class_names(root: epath.Path, folders: Collection[str], warn: bool) -> dict[str, str]:
    """Reads class names by folder: `n02099601 golden retriever` becomes "golden_retriever".

    A folder whose name has spaces ends at a tab.

    Args:
      folders: the class folders.
      warn: whether to report lines that name none of them.
    """
    for file in _CLASS_NAME_FILES:
        path = root / file
        if not path.exists():
            continue
        names = {}
        for number, line in enumerate(read_text(path, "a list of class names").split("\n"), 1):
            if not line.strip():
                continue
            folder, *rest = line.strip().split("\t" if "\t" in line.strip() else None, 1)
            if not rest:
                raise InputError(
                    f"{path}, line {number}: must be a class folder and its name, such as "
                    f"n02099601 golden_retriever; got {line.strip()!r}"
                )
            names[folder.strip()] = "_".join(rest[0].split(",")[0].split())
        unknown = [folder for folder in names if folder not in folders]
        if unknown and warn:
            _log.warning(
                "%s: %d of %d lines name no class folder: %s%s",
                path,
                len(unknown),
                len(names),
                ", ".join(map(repr, unknown[:_MAX_REPORTED])),
                ", ..." if len(unknown) > _MAX_REPORTED else "",
            )
        return names
    return {}


def _hold_out(files: list[str], root: epath.Path) -> set[str]:
    """Returns the 2 % of the files to hold out for validation.

    These are the files whose names have the lowest hashes. So new files move few of the others.
    """
    if len(files) < 2:
        raise InputError(
            f"{root} must have at least two images, because one is held out for validation; got "
            f"{len(files)}"
        )
    count = max(1, round(_HELD_OUT_FRACTION * len(files)))
    by_hash = sorted(
        files, key=lambda file: hashlib.blake2b(os.fsencode(file), digest_size=8).digest()
    )
    return set(by_hash[:count])
