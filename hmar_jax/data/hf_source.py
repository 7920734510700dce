"""Data sets of the Hugging Face library `datasets`: from the Hub, or local ones.

The library decodes nothing here: it gives the bytes of an image, from a memory map, and these are
decoded as those of a file. A row is called "CLASS/FILE", as the file of a folder is, if the data
set has the names of its files. Then order, held-out images and fingerprint are those of a folder of
the same files. Otherwise it is called "CLASS/NUMBER".
"""

import contextlib
import dataclasses
import io
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from hmar_jax.data.class_folders import (
    check_empty_classes,
    find_class_names,
    flatten,
    split_classes,
)
from hmar_jax.data.decoding import MAX_PIXELS, ImageDecodeError, decode_image, image_endings
from hmar_jax.data.fingerprint import fingerprint_listed
from hmar_jax.data.hf_columns import Rows, find_image_column, find_label_column, read_rows
from hmar_jax.data.source_config import FOLDER_RULES, SourceConfig
from hmar_jax.data.suggestion import suggest
from hmar_jax.errors import InputError, printable
from hmar_jax.io.files import expand

_OPTIONS = ("config", "revision", "train", "validate", "image", "label")
_VALIDATE_SPLITS = ("validation", "validate", "val", "valid", "dev", "test")
# Files and folders that the library takes as a split.
_SPLIT = re.compile(
    r"(train(ing)?|validation|valid|val|dev|test(ing)?|eval(uation)?)([-._ 0-9].*)?"
)
_SAVED_FILES = ("dataset_dict.json", "state.json")  # of save_to_disk
_FILE_KINDS = {".parquet": "parquet", ".tar": "webdataset"}  # ending: what reads it


@dataclasses.dataclass(frozen=True)
class HfSource:
    """Rows of one split of a data set of `datasets`."""

    name: str
    class_names: tuple[str, ...]
    split: str  # the data set's name of the split
    files: tuple[str, ...]  # what the rows are called, in label order and sorted within a class
    labels: np.ndarray  # (N,) int32
    rows: np.ndarray  # (N,) int64: where they are in the table
    sizes: np.ndarray  # (N,) int64: bytes
    table: Any  # datasets.Dataset of one column, whose images are not decoded
    max_pixels: int = MAX_PIXELS

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        row = int(self.rows[index])
        path = f"{self.name}/{self.split}[{row}]"
        (value,) = self.table[row].values()
        found = value if isinstance(value, Mapping) else {"bytes": value, "path": None}
        data, file = found.get("bytes"), found.get("path")
        if file:
            path += f" {os.path.basename(file)}"
        if data is None and not file:
            raise ImageDecodeError(printable(path), "the row has no image")
        image = decode_image(file if data is None else io.BytesIO(data), path, self.max_pixels)
        return {"image": image, "label": int(self.labels[index])}

    def fingerprint(self) -> str:
        """See `data.sources.Source.fingerprint`."""
        return fingerprint_listed(self.files, self.labels, self.sizes.tolist())


def open_hf(
    text: str, splits: Iterable[str], need_classes: bool, config: SourceConfig
) -> dict[str, HfSource]:
    """Opens a data set of `datasets`; its library keeps it as Arrow files in its cache.

    Args:
      text: name on the Hub or local path, and options, as `hmar_jax.data.sources.open_source`
        describes them.
      splits: "train", "validate" or both.
      need_classes: whether to reject a data set without labels.
      config: what is read of it.

    Raises:
      InputError: the library is missing, or there is no such data set of labeled images.
    """
    place, options = parse_hf(text)
    spec = f"hf:{text}"
    tables = _load(spec, place, options)
    train_split, validate_split = _choose_splits(spec, tables, options)
    _check_all_is_read(place, tables)
    image = find_image_column(spec, tables[train_split].features, options.get("image"))
    label = find_label_column(spec, tables[train_split].features, options.get("label"))
    if label is None and need_classes:
        raise InputError(
            f"{spec} must have labels, because classes are needed; it has the columns "
            f"{', '.join(tables[train_split].features)}; if one has labels, give "
            f"hf:{text},label=COLUMN"
        )
    train = read_rows(spec, train_split, tables[train_split], image, label)
    validate = None
    if validate_split:
        validate = read_rows(spec, validate_split, tables[validate_split], image, label)
        if validate.unlabeled and "validate" not in options:
            validate = None  # such as the test split of a contest
    for rows in (train, validate):
        if rows is not None and rows.unlabeled:
            raise InputError(
                f"each row of {spec} must have a label; {rows.unlabeled} of the {len(rows.sizes)} "
                f"in its split {rows.split} have none"
            )
    return _make_sources(spec, place, splits, config, train, validate)


def parse_hf(text: str) -> tuple[str, dict[str, str]]:
    """The name or path, and the options behind it: NAME,label=COLUMN.

    Raises:
      InputError: an option is unknown.
    """
    text = text.removeprefix("//datasets/")  # of hf://datasets/NAME, as the Hub writes it
    place, options = text, {}
    while not os.path.exists(expand(place)):
        rest, comma, last = place.rpartition(",")
        key, equals, value = last.partition("=")
        if not comma or not equals:
            break
        if key not in _OPTIONS or not value:
            raise InputError(
                f"the options of hf:{rest} must be among {', '.join(_OPTIONS)}, such as "
                f"label=COLUMN; got {last}"
            )
        place, options[key] = rest, value
    return expand(place), options


def _load(spec: str, place: str, options: Mapping[str, str]) -> Mapping[str, Any]:
    """Splits by name, each a datasets.Dataset."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f'{spec} requires datasets: pip install "hmar_jax[hf]"') from error
    is_local = os.path.exists(place)
    if not is_local and re.match(r"[./~]|.*/.*/", place):
        raise InputError(
            f"{place} does not exist; hf:NAME_OR_DIR requires a name such as USER/NAME, or a folder"
        )
    kind = _FILE_KINDS.get(os.path.splitext(place)[1])
    if os.path.isfile(place) and kind is None:
        other = suggest(place)
        hint = f"; did you mean {other}?" if other else ""
        raise InputError(
            f"{spec} must be a folder, or a file that ends with {' or '.join(_FILE_KINDS)}{hint}"
        )
    chosen = {"name": options.get("config"), "revision": options.get("revision")}
    try:
        with _quiet():
            if any(os.path.isfile(os.path.join(place, file)) for file in _SAVED_FILES):
                found = datasets.load_from_disk(place)
            elif os.path.isfile(place):
                found = datasets.load_dataset(kind, data_files={"train": place})
            else:
                found = datasets.load_dataset(place, **chosen)
    except Exception as error:  # the library raises errors of all kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ConnectionError | TimeoutError):
            reason = (
                f"the Hub cannot be reached, and there is no copy in the library's cache ({reason})"
            )
        raise InputError(f"{spec} cannot be loaded: {reason}") from error
    return found if isinstance(found, Mapping) else {str(found.split or "train"): found}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and the log of the library, which would mix with those of a run."""
    import datasets
    import huggingface_hub.utils as hub

    with contextlib.ExitStack() as restored:
        for library in (datasets, hub):
            restored.callback(library.logging.set_verbosity, library.logging.get_verbosity())
            library.logging.set_verbosity_error()
            if not library.are_progress_bars_disabled():
                restored.callback(library.enable_progress_bars)
                library.disable_progress_bars()
        yield


def _choose_splits(
    spec: str, tables: Mapping[str, Any], options: Mapping[str, str]
) -> tuple[str, str | None]:
    """The split to train on and the one to validate on; None: images are held out."""
    names = list(tables)
    for key in ("train", "validate"):
        if options.get(key, names[0]) not in names:
            raise InputError(
                f"{key}={options[key]} must be a split of {spec.split(',')[0]}, which has "
                f"{', '.join(names)}"
            )
    train = options.get("train", "train" if "train" in names or len(names) > 1 else names[0])
    if train not in names:
        raise InputError(
            f"{spec} must have a split train; it has {', '.join(names)}; give {spec},train=SPLIT"
        )
    others = (name for name in _VALIDATE_SPLITS if name in names and name != train)
    return train, options.get("validate", next(others, None))


def _check_all_is_read(place: str, splits: Collection[str]) -> None:
    """Where something local is called train, the library passes over all that is no split."""
    names = sorted(os.listdir(place)) if os.path.isdir(place) else []
    read = [name for name in names if _SPLIT.fullmatch(name) or name.startswith(tuple(splits))]
    if not read or not set(_SAVED_FILES).isdisjoint(names):
        return
    for name in (name for name in names if name not in read):
        if name.startswith("validate") or _has_images(os.path.join(place, name)):
            raise InputError(
                f"datasets does not read {os.path.join(place, name)}, because something beside it "
                f"has the name of a split; call a validation split validation; if these are "
                f"classes, give folder:{place}"
            )


def _has_images(folder: str) -> bool:
    endings = tuple(image_endings())
    files = (file for _, _, found in os.walk(folder) for file in found)
    return any(file.lower().endswith(endings) for file in files)


def _make_sources(
    spec: str,
    place: str,
    splits: Iterable[str],
    config: SourceConfig,
    train: Rows,
    validate: Rows | None,
) -> dict[str, HfSource]:
    if not any(train.classes.values()):
        raise InputError(f"no images in {spec}: its split {train.split} has no rows")
    check_empty_classes(f"each class of {spec}", train.classes, config.allow_empty_classes)
    root = epath.Path(place) if os.path.isdir(place) else None
    names = find_class_names(root, train.classes, config.folder_rules or FOLDER_RULES)
    if validate is None:
        divided = split_classes(train.classes, config, spec)
        found = {split: (train, classes) for split, classes in divided.items()}
    else:
        if unknown := sorted(set(validate.classes) - set(train.classes)):
            raise InputError(
                f"{spec}: its split {validate.split} has class {unknown[0]!r} and its split "
                f"{train.split} does not; both must have the same classes"
            )
        held_out = {name: list(validate.classes.get(name, ())) for name in train.classes}
        found = {"train": (train, train.classes), "validate": (validate, held_out)}
    return {split: _make_source(spec, names, config, *found[split]) for split in splits}


def _make_source(
    spec: str,
    class_names: tuple[str, ...],
    config: SourceConfig,
    rows: Rows,
    classes: Mapping[str, Sequence[str]],
) -> HfSource:
    files, labels = flatten(classes)
    numbers = np.array([rows.numbers[file] for file in files], np.int64)
    return HfSource(
        spec,
        class_names,
        rows.split,
        files,
        labels,
        numbers,
        rows.sizes[numbers],
        rows.table,
        config.max_pixels,
    )
