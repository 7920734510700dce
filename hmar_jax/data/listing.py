"""Lists the image files of class folders, on disk, in an object store or in an archive."""

import collections
import dataclasses
import os
from collections.abc import Iterator, Mapping
from concurrent import futures

from etils import epath

from hmar_jax.data.archives import ArchiveFolder
from hmar_jax.data.dataset_json import LABELS_FILE, classes_of
from hmar_jax.data.decoding import image_endings
from hmar_jax.errors import InputError, printable
from hmar_jax.io.files import is_local

_LISTING_THREADS = 32  # for folders in object stores
_FIRST_ENDINGS = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # of version 0.1
)
# What operating systems, file servers and archives leave in folders; names in lower case. Names
# that begin with a dot are ignored too.
_SYSTEM_NAMES = frozenset(
    (
        *("__macosx", "icon\r"),  # macOS, which also leaves .DS_Store and ._NAME
        *("$recycle.bin", "system volume information"),  # Windows
        *("thumbs.db", "ehthumbs.db", "desktop.ini"),
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),  # file servers
        *("lost+found", "__pycache__"),
    )
)
CLASS_NAME_FILES = (
    "class_names.txt",
    "LOC_synset_mapping.txt",  # this one and the next come with ImageNet
    "synset_words.txt",
)
_BROKEN_LINK, _SPECIAL, _NO_ENDING = "broken link", "pipe or device", "without ending"
_ARCHIVED_LINK = "link in an archive"
_CURES = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "pip install pillow-heif"),
    ".avif": "pip install --upgrade pillow",  # read since Pillow 11.3
}

Folder = epath.Path | ArchiveFolder


@dataclasses.dataclass(frozen=True)
class Listing:
    """The image files below a folder.

    Attributes:
      classes: class folder to its files, relative to the listed folder, all sorted. If that folder
        itself holds the images: {"": files}.
      skipped: how many files are not images, by ending (such as ".txt"), or by what they are.
      labels_file: the file that the classes come from, in place of folders; or "".
    """

    classes: dict[str, list[str]]
    skipped: Mapping[str, int]
    labels_file: str = ""


def listed_endings(rules: int) -> frozenset[str]:
    """The endings of files that are listed as images; rules: see source_config.FOLDER_RULES."""
    return _FIRST_ENDINGS if rules == 1 else image_endings()


def list_class_folders(root: Folder, rules: int) -> Listing:
    """Lists the files of each class folder, or those that dataset.json gives labels.

    Args:
      root: the folder that holds the class folders, or the images.
      rules: see source_config.FOLDER_RULES.

    Raises:
      InputError: a folder cannot be listed; images are next to class folders; a class folder is a
        broken symbolic link; or there is a dataset.json that does not fit the images.
    """
    walk = _Walk(listed_endings(rules), rules)
    if rules > 1 and (labels_file := root / LABELS_FILE).exists():
        files, skipped = walk.images(root, "", ())
        skipped[".json"] -= 1
        classes = classes_of(labels_file, sorted(files or []))
        return Listing(classes, +skipped, str(labels_file))
    entries, skipped = walk.entries(root)
    if rules > 1 and skipped.get(_BROKEN_LINK):
        raise InputError(
            f"{printable(str(root))} has a symbolic link that leads nowhere, "
            f"{printable(_first_broken_link(root))}; repair or remove it"
        )
    loose = [name for name, is_folder in entries if not is_folder]
    folders = [name for name, is_folder in entries if is_folder]
    is_quick = isinstance(root, ArchiveFolder) or is_local(root)
    # Object stores answer slowly, but to many requests at once.
    with futures.ThreadPoolExecutor(1 if is_quick else _LISTING_THREADS) as pool:
        found = pool.map(lambda name: walk.images(root / name, name, (_resolve(root),)), folders)
        results = dict(zip(folders, found))
    classes = {}
    for folder, (files, skipped_below) in results.items():
        skipped.update(skipped_below)
        if files is not None:
            classes[folder] = files
        elif rules == 1:
            classes[folder] = []
    nonempty = [folder for folder, files in classes.items() if files]
    if loose and nonempty:
        raise InputError(
            f"{printable(str(root))} has images ({printable(loose[0])}) next to folders of images "
            f"({printable(nonempty[0])}); move every image to the folder of its "
            "class, or all of them to one folder without classes"
        )
    return Listing({"": loose} if loose else classes, skipped)


def folders_of(root: Folder) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones and those of systems."""
    entries, _ = _Walk(frozenset(), 2).entries(root)
    return [name for name, is_folder in entries if is_folder]


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """What was passed over, in one line: "12 files that are not images (10 .heic, 2 .txt)"."""
    total = sum(skipped.values())
    by_number = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    kinds = ", ".join(f"{count:,} {printable(kind)}" for kind, count in by_number[:8])
    more = f" and {len(by_number) - 8} other kinds" if len(by_number) > 8 else ""
    nouns = "file that is not an image" if total == 1 else "files that are not images"
    text = f"{total:,} {nouns} ({kinds}{more})"
    cures = sorted({_CURES[kind] for kind in skipped if kind in _CURES})
    if cures:
        kinds = ", ".join(kind for kind in sorted(skipped) if kind in _CURES)
        text += f"; to use {kinds}, convert them or {' and '.join(cures)}"
    return text


class _Walk:
    """Lists folders by one set of rules."""

    def __init__(self, endings: frozenset[str], rules: int):
        self._endings, self._rules = endings, rules

    def images(
        self, folder: Folder, relative: str, parents: tuple[str, ...]
    ) -> tuple[list[str] | None, collections.Counter]:
        """The images below a folder, sorted, and what was passed over.

        None in place of the images: the folder is a symbolic link to one that contains it, or an
        object of a store.
        """
        resolved = _resolve(folder)
        if resolved in parents:
            return None, collections.Counter()
        try:
            entries, skipped = self.entries(folder)
        except NotADirectoryError:
            return None, collections.Counter({_NO_ENDING: 1})
        found = []
        for name, is_folder in entries:
            path = f"{relative}/{name}" if relative else name
            if is_folder:
                files, below = self.images(folder / name, path, (*parents, resolved))
                found += files or []
                skipped.update(below)
            else:
                found.append(path)
        return found, skipped

    def entries(self, folder: Folder) -> tuple[list[tuple[str, bool]], collections.Counter]:
        """Names of images and folders, sorted, whether each is a folder, and what else is there."""
        skipped: collections.Counter = collections.Counter()
        if isinstance(folder, ArchiveFolder):
            return sorted(self._archived(folder, skipped)), skipped
        try:
            found = (
                self._local(folder, skipped) if is_local(folder) else self._remote(folder, skipped)
            )
        except NotADirectoryError:
            raise
        except OSError as error:
            raise InputError(
                f"the folder {printable(str(folder))} cannot be listed: {error.strerror or error}"
            ) from None
        return sorted(found), skipped

    def _local(self, folder: epath.Path, skipped: collections.Counter) -> list[tuple[str, bool]]:
        found, endings = [], self._endings
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if _is_folder(entry):
                    if self._is_own(name):
                        found.append((name, True))
                elif name[name.rfind(".") :].lower() in endings and _is_readable_kind(entry):
                    found.append((name, False))
                else:
                    self._skip(name, skipped, entry)
        return found

    def _remote(self, folder: epath.Path, skipped: collections.Counter) -> list[tuple[str, bool]]:
        """Asks for the kind of few names: one request for each would take hours."""
        names = [path.name for path in folder.iterdir()]
        if names == [folder.name] and not folder.is_dir():
            raise NotADirectoryError  # such as LICENSE, which looked like a folder
        found, others = [], collections.defaultdict(list)  # others: by ending
        for name in names:
            if name.startswith("."):
                continue
            ending = name[name.rfind(".") :].lower()
            if "." not in name:
                if self._is_own(name):
                    found.append((name, True))
            elif ending in self._endings:
                found.append((name, False))
            else:
                others[ending].append(name)
        for same_ending in others.values():
            if self._rules > 1 and (folder / same_ending[0]).is_dir():  # such as "St. Bernard"
                found += [(name, True) for name in same_ending if (folder / name).is_dir()]
            else:
                for name in same_ending:
                    self._skip(name, skipped)
        return found

    def _archived(
        self, folder: ArchiveFolder, skipped: collections.Counter
    ) -> Iterator[tuple[str, bool]]:
        for name, is_folder, is_file in folder.children():
            if name.startswith("."):
                continue
            if is_folder:
                if self._is_own(name):
                    yield name, True
            elif not is_file:
                skipped[_ARCHIVED_LINK] += 1
            elif name[name.rfind(".") :].lower() in self._endings:
                yield name, False
            else:
                self._skip(name, skipped)

    def _is_own(self, name: str) -> bool:
        """Whether a name was given by the user, not by a system."""
        return self._rules == 1 or name.lower() not in _SYSTEM_NAMES

    def _skip(
        self, name: str, skipped: collections.Counter, entry: os.DirEntry | None = None
    ) -> None:
        ending = os.path.splitext(name)[1].lower()
        if entry is not None and entry.is_symlink() and not os.path.exists(entry.path):
            skipped[_BROKEN_LINK] += 1
        elif ending in self._endings:
            skipped[_SPECIAL] += 1
        elif name not in CLASS_NAME_FILES and name.lower() not in _SYSTEM_NAMES:
            skipped[ending or _NO_ENDING] += 1


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link to itself
        return False


def _is_readable_kind(entry: os.DirEntry) -> bool:
    """False for pipes, sockets and devices, which could be read without end.

    A broken link to an image is read, so that it is named among the unreadable images.
    """
    return entry.is_symlink() or entry.is_file()


def _first_broken_link(folder: Folder) -> str:
    assert isinstance(folder, epath.Path)
    names = sorted(os.listdir(folder))
    return next(
        name
        for name in names
        if os.path.islink(folder / name) and not os.path.exists(folder / name)
    )


def _resolve(folder: Folder) -> str:
    if isinstance(folder, ArchiveFolder):  # which follows no links
        return folder.where
    return os.path.realpath(folder) if is_local(folder) else os.fspath(folder)
