"""Classes and splits of listed images: from class folders, or from a file of labels."""

import collections
import dataclasses
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from hmar_jax.data.archives import ArchiveFolder
from hmar_jax.data.dataset_json import LABELS_FILE
from hmar_jax.data.held_out import hold_out
from hmar_jax.data.listing import (
    CLASS_NAME_FILES,
    Folder,
    Listing,
    describe_skipped,
    folders_of,
    list_class_folders,
)
from hmar_jax.data.source_config import FOLDER_RULES, SourceConfig
from hmar_jax.data.suggestion import suggest
from hmar_jax.errors import InputError, printable
from hmar_jax.io.files import read_text

_log = logging.getLogger(__name__)

VALIDATE_FOLDERS = ("validate", "val", "validation", "valid")
# Names of splits that are no names of classes, if all folders have one.
_SPLIT_NAMES = frozenset((*VALIDATE_FOLDERS, "train", "training", "test", "testing"))
_MAX_REPORTED = 5  # names in a warning


@dataclasses.dataclass(frozen=True)
class SplitFiles:
    """The images of one split.

    Attributes:
      root: the folder that holds the class folders.
      class_names: by label.
      files: relative to root, in label order and sorted within a class.
      labels: (N,) int32.
    """

    root: Folder
    class_names: tuple[str, ...]
    files: tuple[str, ...]
    labels: np.ndarray


def find_splits(
    root: Folder, splits: Iterable[str], need_classes: bool, config: SourceConfig, name: str
) -> dict[str, SplitFiles]:
    """Finds the images of splits; lists the folder once for all of them.

    Args:
      root: the folder; `hmar_jax.data.sources.open_source` describes its layout.
      splits: "train", "validate" or both.
      need_classes: whether to reject a folder without class folders.
      config: what is read of it.
      name: of the data set, in the log.

    Raises:
      InputError: it has no images, or its layout is not one of the known.
    """
    rules = config.folder_rules or FOLDER_RULES
    is_labeled = rules > 1 and (root / LABELS_FILE).exists()  # which labels files of all folders
    has_train = (root / "train").is_dir()
    if is_labeled and has_train:
        _check_no_validation(root)
        has_train = False
    train_root = root / "train" if has_train else root
    train = list_class_folders(train_root, rules)
    if has_train and rules > 1 and "" in train.classes:
        _check_not_a_class(root)
    _check_classes(train_root, train, need_classes, rules == 1 or config.allow_empty_classes)
    if rules > 1 and not has_train:
        _check_not_splits(root, train)
    names = find_class_names(root, train.classes, rules)
    skipped = collections.Counter(train.skipped)

    validate_root = None
    if has_train:
        names_of_split = VALIDATE_FOLDERS if rules > 1 else VALIDATE_FOLDERS[:3]
        candidates = (root / folder for folder in names_of_split)
        validate_root = next((folder for folder in candidates if folder.is_dir()), None)
    if validate_root is None:
        classes = split_classes(train.classes, config, str(train_root))
        found = {split: (train_root, classes[split]) for split in classes}
    else:
        found = {"train": (train_root, train.classes)}
        if "validate" in splits:
            validate = list_class_folders(validate_root, rules)
            _check_validation(validate_root, validate, train_root, train)
            skipped.update(validate.skipped)
            kept = {folder: validate.classes.get(folder, []) for folder in train.classes}
            found["validate"] = validate_root, kept
    if skipped:
        _log.info("%s: skipped %s", printable(name), describe_skipped(skipped))
    return {
        split: SplitFiles(found[split][0], names, *flatten(found[split][1])) for split in splits
    }


def split_classes(
    classes: Mapping[str, Sequence[str]], config: SourceConfig, where: str
) -> dict[str, dict[str, list[str]]]:
    """Divides the files of each class into those to train on and those that are held out.

    Args:
      where: what the data set is called in errors.

    Returns:
      {"train", "validate"}, each class to files.

    Raises:
      InputError: there are fewer than two files.
    """
    held_out = hold_out(classes, config.held_out, config.folder_rules or FOLDER_RULES, where)
    return {
        split: {
            folder: [file for file in files if (file in held_out) == keep]
            for folder, files in classes.items()
        }
        for split, keep in (("train", False), ("validate", True))
    }


def flatten(classes: Mapping[str, Sequence[str]]) -> tuple[tuple[str, ...], np.ndarray]:
    """The files in label order, and their labels (N,) int32."""
    files = tuple(file for files in classes.values() for file in files)
    sizes = [len(files) for files in classes.values()]
    return files, np.repeat(np.arange(len(classes), dtype=np.int32), sizes)


def _check_classes(root: Folder, listing: Listing, need_classes: bool, allow_empty: bool) -> None:
    classes, skipped = listing.classes, describe_skipped(listing.skipped)
    found = f"; found {skipped}" if listing.skipped else ""
    if not any(classes.values()):
        other = suggest(str(root)) if not isinstance(root, ArchiveFolder) else ""
        hint = f"; did you mean {other}?" if other not in ("", f"folder:{root}") else ""
        raise InputError(
            f"no images in {root}; there must be files such as .jpg, .png or .webp{found}{hint}"
        )
    if need_classes and "" in classes:
        if listing.labels_file:
            raise InputError(
                f"{listing.labels_file} must have class ids, because classes are needed; its "
                '"labels" are null'
            )
        raise InputError(
            f"{root} has images but no class folders; move them to class folders, such as "
            f"{root}/CLASS/{classes[''][0]}, or all of them to one folder to train without "
            "classes"
        )
    noun = "class" if listing.labels_file else "class folder"
    check_empty_classes(f"each {noun} of {root}", classes, allow_empty, found)


def check_empty_classes(
    what: str, classes: Mapping[str, Sequence[str]], allow_empty: bool, found: str = ""
) -> None:
    """Raises InputError if there are classes without images and these are not allowed.

    Args:
      what: names all classes, as in "each class folder of DIR".
      found: the end of the message.
    """
    empty = [printable(name) for name, files in classes.items() if not files]
    if empty and not allow_empty:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise InputError(
            f"{what} must have images; there are none in {', '.join(empty[:5])}{more}; remove "
            "them, or keep them as classes with --config.data.allow_empty_classes=true (hmar "
            f"tokenize: --allow_empty_classes){found}"
        )


def _check_not_splits(root: Folder, listing: Listing) -> None:
    """DIR/Train and DIR/Val would be two classes."""
    folders = sorted(listing.classes)
    if len(folders) > 1 and all(folder.lower() in _SPLIT_NAMES for folder in folders):
        raise InputError(
            f"the folders of {root} must be classes, or be called train and validate (or "
            f"{', '.join(VALIDATE_FOLDERS[1:])}); got {', '.join(folders)}; rename them"
        )


def _check_no_validation(root: Folder) -> None:
    """One dataset.json for both splits would mix them."""
    for folder in VALIDATE_FOLDERS:
        if (root / folder).is_dir():
            raise InputError(
                f"{root} must have a {LABELS_FILE} in train and one in {folder}, or neither of the "
                f"two folders; its own {LABELS_FILE} labels the images of both together"
            )


def _check_not_a_class(root: Folder) -> None:
    """Of the classes bus, train and tree, the images of train would be taken as all images."""
    for name in folders_of(root):
        is_split = name.lower() in _SPLIT_NAMES
        if not is_split and "" in list_class_folders(root / name, FOLDER_RULES).classes:
            raise InputError(
                f"{root}/train must have class folders, as the training split; it has images, and "
                f"so has {printable(name)} beside it; if train is a class, rename its folder to "
                f'train_ and write "train_ train" to {root}/{CLASS_NAME_FILES[0]}; if its images '
                "are all there are, give its path as the source"
            )


def _check_validation(root: Folder, listing: Listing, train_root: Folder, train: Listing) -> None:
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


def find_class_names(
    root: Folder | None, classes: Mapping[str, Sequence[str]], rules: int
) -> tuple[str, ...]:
    """The name of each class; rules: see source_config.FOLDER_RULES.

    Args:
      root: may hold a list of class names; None: there is none.
      classes: class folder to its files.
    """
    listed = {} if root is None else _read_class_names(root, classes)
    names = tuple(
        "all" if folder == "" else listed.get(folder) or _readable_name(folder, files)
        for folder, files in classes.items()
    )
    return names if rules == 1 else tuple(map(printable, names))


def _readable_name(folder: str, files: Sequence[str]) -> str:
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


def _read_class_names(root: Folder, folders: Collection[str]) -> dict[str, str]:
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
