"""Folders of image files, with or without class folders, on disk or in an object store."""

import collections
import dataclasses
import io
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import BinaryIO

import numpy as np
from etils import epath

from hmar_jax.data.decoding import MAX_PIXELS, ImageDecodeError, decode_image
from hmar_jax.data.fingerprint import fingerprint_files
from hmar_jax.data.held_out import hold_out
from hmar_jax.data.listing import (
    CLASS_NAME_FILES,
    Listing,
    describe_skipped,
    list_class_folders,
)
from hmar_jax.data.source_config import FOLDER_RULES, SourceConfig
from hmar_jax.errors import InputError, printable
from hmar_jax.io.files import expand, is_local, read_text

_log = logging.getLogger(__name__)

_VALIDATE_FOLDERS = ("validate", "val", "validation", "valid")
# Names of splits that are no names of classes, if all folders have one.
_SPLIT_NAMES = frozenset((*_VALIDATE_FOLDERS, "train", "training", "test", "testing"))
_MAX_REPORTED = 5  # names in a warning


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
    top = os.path.realpath(expand(root))
    relative = os.path.relpath(os.path.realpath(expand(path)), top)
    folders = relative.split(os.sep)
    if folders[0] in (os.curdir, os.pardir) or any(name.startswith(".") for name in folders):
        return False  # elsewhere, the data set itself, which is not empty, or hidden
    splits = ("train", *_VALIDATE_FOLDERS)
    return folders[0] in splits or not os.path.isdir(os.path.join(top, "train"))


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
        raise InputError(
            f"{root} {problem}; folder:DIR requires a folder with images in DIR/train/CLASS, "
            "DIR/CLASS or DIR"
        )

    rules = config.folder_rules or FOLDER_RULES
    has_train = (root / "train").is_dir()
    train_root = root / "train" if has_train else root
    train = list_class_folders(train_root, rules)
    _check_classes(train_root, train, need_classes, rules == 1 or config.allow_empty_classes)
    if rules > 1 and not has_train:
        _check_not_splits(root, train)
    names = _class_names(root, train.classes, rules)
    skipped = collections.Counter(train.skipped)

    validate_root = None
    if has_train:
        names_of_split = _VALIDATE_FOLDERS if rules > 1 else _VALIDATE_FOLDERS[:3]
        candidates = (root / folder for folder in names_of_split)
        validate_root = next((folder for folder in candidates if folder.is_dir()), None)
    found = {"train": (train_root, train.classes)}
    if validate_root is None:
        held_out = hold_out(train.classes, config.held_out, rules, str(train_root))
        for split in ("train", "validate"):
            keep = split == "validate"
            kept = {
                folder: [file for file in files if (file in held_out) == keep]
                for folder, files in train.classes.items()
            }
            found[split] = train_root, kept
    elif "validate" in splits:
        validate = list_class_folders(validate_root, rules)
        _check_validation(validate_root, validate, train_root, train)
        skipped.update(validate.skipped)
        kept = {folder: validate.classes.get(folder, []) for folder in train.classes}
        found["validate"] = validate_root, kept

    name = f"folder:{os.fspath(root)}"
    if skipped:
        _log.info("%s: skipped %s", printable(name), describe_skipped(skipped))
    return {split: _source(name, names, *found[split], config.max_pixels) for split in splits}


def _source(
    name: str,
    class_names: tuple[str, ...],
    root: epath.Path,
    classes: Mapping[str, Sequence[str]],
    max_pixels: int,
) -> FolderSource:
    files = tuple(file for files in classes.values() for file in files)
    sizes = [len(files) for files in classes.values()]
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), sizes)
    return FolderSource(name, class_names, os.fspath(root), files, labels, max_pixels)


def _check_classes(
    root: epath.Path, listing: Listing, need_classes: bool, allow_empty: bool
) -> None:
    classes, skipped = listing.classes, describe_skipped(listing.skipped)
    if not any(classes.values()):
        raise InputError(
            f"no images in {root}; there must be files such as .jpg, .png or .webp"
            + (f"; found {skipped}" if listing.skipped else "")
        )
    if need_classes and "" in classes:
        raise InputError(
            f"{root} has images but no class folders; move them to class folders, such as "
            f"{root}/CLASS/{classes[''][0]}, or all of them to one folder to train without "
            "classes"
        )
    empty = [printable(folder) for folder, files in classes.items() if not files]
    if empty and not allow_empty:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise InputError(
            f"each class folder of {root} must have images; there are none in "
            f"{', '.join(empty[:5])}{more}; remove them, or keep them as classes with "
            "--config.data.allow_empty_classes=true (hmar tokenize: --allow_empty_classes)"
            + (f"; found {skipped}" if listing.skipped else "")
        )


def _check_not_splits(root: epath.Path, listing: Listing) -> None:
    """DIR/Train and DIR/Val would be two classes."""
    folders = sorted(listing.classes)
    if len(folders) > 1 and all(folder.lower() in _SPLIT_NAMES for folder in folders):
        raise InputError(
            f"the folders of {root} must be classes, or be called train and validate (or "
            f"{', '.join(_VALIDATE_FOLDERS[1:])}); got {', '.join(folders)}; rename them"
        )


def _check_validation(
    root: epath.Path, listing: Listing, train_root: epath.Path, train: Listing
) -> None:
    unknown = sorted(set(listing.classes) - set(train.classes))
    if unknown:
        what = f"class folder {unknown[0]!r}" if unknown[0] else "images outside class folders"
        raise InputError(
            f"{root} has {what} and {train_root} does not; both must have the same classes"
        )
    if not any(listing.classes.values()):
        raise InputError(
            f"no images in {root}; add some, or remove it to hold out images of {train_root}"
        )


def _class_names(
    root: epath.Path, classes: Mapping[str, Sequence[str]], rules: int
) -> tuple[str, ...]:
    listed = _read_class_names(root, classes)
    names = tuple(
        "all" if folder == "" else listed.get(folder) or _readable_name(folder, files)
        for folder, files in classes.items()
    )
    return names if rules == 1 else tuple(map(printable, names))


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


def _read_class_names(root: epath.Path, folders: Collection[str]) -> dict[str, str]:
    """Reads class names by folder: `n02099601 golden retriever` becomes "golden_retriever".

    A folder whose name has spaces ends at a tab. Lines that name none of the class folders are
    reported.
    """
    for file in CLASS_NAME_FILES:
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
        if unknown:
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
