"""Folders of picture files, in the ImageNet layout or without classes, on disk or in an object store."""

import dataclasses
import hashlib
import io
import os
import re
from concurrent import futures
from typing import BinaryIO

import numpy as np
from etils import epath

from hmar_jax.data.decoding import ImageDecodeError, decode_image
from hmar_jax.errors import InputError
from hmar_jax.io.files import is_local

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_NAME_LISTS = (
    "class_names.txt",
    "LOC_synset_mapping.txt",
    "synset_words.txt",
)  # ours, and as ImageNet is handed out
_VALIDATE_FOLDERS = ("validate", "val", "validation")
_LISTING_THREADS = 32  # of folders in object stores
_HELD_OUT = (
    0.02  # share of the files that validate when a folder has no validation pictures of its own
)


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Picture files on disk, or in an object store."""

    name: str
    class_names: tuple[str, ...]
    root: str
    files: tuple[str, ...]  # relative to root, in label order and sorted inside a class
    labels: np.ndarray  # int32 (N,)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        path = os.path.join(self.root, self.files[index])
        if is_local(path):
            image = decode_image(path)
        else:
            image = decode_image(_fetch(path), path)
        return {"image": image, "label": int(self.labels[index])}


def _fetch(path: str) -> BinaryIO:
    """The contents of an object in a store."""
    try:
        return io.BytesIO(epath.Path(path).read_bytes())
    except OSError as error:
        raise ImageDecodeError(
            path, " ".join(str(error).split()) or type(error).__name__
        ) from error


def open_folder(root: str, split: str, need_classes: bool) -> FolderSource:
    spec = f"folder:{root}"
    root = epath.Path(root).expanduser()
    try:
        is_folder = root.is_dir()
    except ImportError as error:
        raise InputError(
            f'{spec} needs gcsfs (for gs://) or s3fs (for s3://): pip install "hmar_jax[gcs]"'
        ) from error
    if not is_folder:
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise InputError(
            f"{root} {what}: folder:DIR takes a folder with pictures in DIR/train/CLASS, DIR/CLASS or DIR"
        )

    has_train = (root / "train").is_dir()
    train_root = root / "train" if has_train else root
    classes = _list_classes(train_root)
    if not any(classes.values()):
        raise InputError(
            f"no pictures in {train_root}: wanted files ending in {' '.join(EXTENSIONS)}"
        )
    if need_classes and "" in classes:
        raise InputError(
            f"{train_root} has pictures but no class folders: {train_root}/CLASS/{classes[''][0]} is wanted; to train "
            "without classes, put all of them into one folder"
        )
    listed = _listed_names(root)
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
        held_out = _held_out([file for files in classes.values() for file in files], train_root)
        keep_held_out = split == "validate"
        classes = {
            folder: [f for f in files if (f in held_out) == keep_held_out]
            for folder, files in classes.items()
        }
    elif split == "validate":
        found = _list_classes(validate_root)
        unknown = sorted(set(found) - set(classes))
        if unknown:
            first = (
                f"class folder {unknown[0]!r}"
                if unknown[0]
                else "pictures outside of class folders"
            )
            raise InputError(
                f"{validate_root} has {first}, which {train_root} has not: both need the same classes"
            )
        if not any(found.values()):
            raise InputError(
                f"no pictures in {validate_root}: fill it, or remove it to hold out 2 % of {train_root}"
            )
        classes = {folder: found.get(folder, []) for folder in classes}
        files_root = validate_root

    files = tuple(file for files in classes.values() for file in files)
    labels = np.repeat(
        np.arange(len(classes), dtype=np.int32), [len(files) for files in classes.values()]
    )
    return FolderSource(f"folder:{os.fspath(root)}", names, os.fspath(files_root), files, labels)


def _list_classes(root: epath.Path) -> dict[str, list[str]]:
    """Class folder name to its files, relative to root, all sorted; {"": files} if root holds the pictures itself."""
    entries = _entries(root)
    loose = [name for name, is_folder in entries if not is_folder]
    folders = [name for name, is_folder in entries if is_folder]
    # Object stores answer slowly, but many at once.
    with futures.ThreadPoolExecutor(1 if is_local(root) else _LISTING_THREADS) as pool:
        found = pool.map(lambda name: _list_pictures(root / name, name, (_real(root),)), folders)
        classes = dict(zip(folders, found))
    filled = [folder for folder, files in classes.items() if files]
    if loose and filled:
        raise InputError(
            f"{root} has pictures ({loose[0]}) beside folders of pictures ({filled[0]}): "
            "put every picture into its class's folder, or all of them into one folder without classes"
        )
    return {"": loose} if loose else classes


def _list_pictures(folder: epath.Path, relative: str, parents: tuple[str, ...]) -> list[str]:
    real = _real(folder)
    if real in parents:  # a link to a folder that contains it
        return []
    found = []
    for name, is_folder in _entries(folder):
        if is_folder:
            found += _list_pictures(folder / name, f"{relative}/{name}", (*parents, real))
        else:
            found.append(f"{relative}/{name}")
    return found


def _entries(folder: epath.Path) -> list[tuple[str, bool]]:
    """Names of the pictures and folders inside, sorted, and whether each is a folder; hidden and other files left out."""
    if is_local(folder):
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.is_dir()) for entry in entries]
    else:  # asking an object store of every name whether it is a folder would take hours
        found = [(path.name, "." not in path.name) for path in folder.iterdir()]
    return sorted(
        (name, is_folder)
        for name, is_folder in found
        if not name.startswith(".") and (is_folder or _is_picture(name))
    )


def _real(folder: epath.Path) -> str:
    return os.path.realpath(folder) if is_local(folder) else os.fspath(folder)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _readable_name(folder: str, files: list[str]) -> str:
    """`tench` for folder n01440764 when its files are n01440764_tench.jpg, n01440764_tench_2.jpg; else the folder."""
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


def _listed_names(root: epath.Path) -> dict[str, str]:
    """Class names by folder, from a list such as ImageNet's: `n02099601 golden retriever` is "golden_retriever"."""
    for file in _NAME_LISTS:
        path = root / file
        if not path.exists():
            continue
        lines = [
            line.split(maxsplit=1)
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
        wrong = next((number for number, line in enumerate(lines, 1) if len(line) != 2), None)
        if wrong:
            raise InputError(
                f"{path}, line {wrong}: a class folder and its name are wanted, such as n02099601 golden_retriever"
            )
        return {folder: "_".join(names.split(",")[0].split()) for folder, names in lines}
    return {}


def _held_out(files: list[str], root: epath.Path) -> set[str]:
    """The 2 % of the files that validate: those whose names hash lowest, so adding pictures moves few of the others."""
    if len(files) < 2:
        raise InputError(
            f"{root} has only one picture: at least two are needed, as one is held out to validate"
        )
    count = max(1, round(_HELD_OUT * len(files)))
    return set(
        sorted(files, key=lambda file: hashlib.blake2b(os.fsencode(file), digest_size=8).digest())[
            :count
        ]
    )
