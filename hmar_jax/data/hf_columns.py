"""Images, labels and file names in the columns of a data set of the library `datasets`."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hmar_jax.data.fingerprint import local_sizes
from hmar_jax.errors import InputError

# Names that decide where several columns could be meant; all are in use on the Hub.
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_NAMES = ("label", "labels", "class", "cls", "category", "target", "y")
_UNKNOWN_LABELS = (None, -1, "")  # of test splits whose labels are secret


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one split.

    Attributes:
      split: its name.
      table: datasets.Dataset of the column of images alone, not decoded.
      classes: class to what its rows are called, sorted: "CLASS/FILE", "CLASS/NUMBER", or "FILE"
        and "NUMBER" of the one class "" where there are no labels. Declared classes may be empty.
      numbers: row by what it is called.
      sizes: (N,) int64, bytes by row.
      unlabeled: rows without label, none of which is in `classes`.
    """

    split: str
    table: Any
    classes: Mapping[str, Sequence[str]]
    numbers: Mapping[str, int]
    sizes: np.ndarray
    unlabeled: int


def find_image_column(spec: str, features: Mapping[str, Any], wanted: str | None) -> str:
    """The column of images.

    Args:
      spec: names the data set in errors.
      features: of its columns.
      wanted: the column that the user named.

    Raises:
      InputError: there is none, it is no column of images, or it could be one of several.
    """
    import datasets

    typed = [name for name, f in features.items() if isinstance(f, datasets.Image)]
    encoded = [name for name, f in features.items() if _is_encoded(f)]
    if wanted is not None:
        if wanted not in typed + encoded:
            raise InputError(
                f"image={wanted} must be a column of images; {spec} has "
                f"{', '.join(typed + encoded) or 'none'}"
            )
        return wanted
    return _choose(spec, "image", "images", typed or encoded, _IMAGE_NAMES, list(features)) or ""


def find_label_column(spec: str, features: Mapping[str, Any], wanted: str | None) -> str | None:
    """The column of labels; None if there is none. Arguments and errors: see find_image_column."""
    import datasets

    usable = [name for name, feature in features.items() if _is_label(feature)]
    if wanted is not None:
        if wanted not in usable:
            raise InputError(
                f"label={wanted} must be a column of class labels, integers or strings; {spec} "
                f"has {', '.join(usable) or 'none'}"
            )
        return wanted
    declared = [name for name in usable if isinstance(features[name], datasets.ClassLabel)]
    named = [name for name in usable if name in _LABEL_NAMES]
    return _choose(spec, "label", "labels", declared or named, _LABEL_NAMES, None)


def _is_encoded(feature: Any) -> bool:
    """Whether a column has the bytes of files: Parquet files that another program wrote."""
    if isinstance(feature, Mapping):
        return "bytes" in feature and _is_encoded(feature["bytes"])
    return getattr(feature, "dtype", "") in ("binary", "large_binary")


def _is_label(feature: Any) -> bool:
    dtype = getattr(feature, "dtype", "")
    return isinstance(dtype, str) and (
        dtype in ("string", "large_string", "bool") or dtype.startswith(("int", "uint"))
    )


def _choose(
    spec: str,
    option: str,
    what: str,
    candidates: Sequence[str],
    names: Sequence[str],
    columns: Sequence[str] | None,
) -> str | None:
    """One of the candidates. None of them: None, or an error that lists `columns`."""
    if len(candidates) == 1:
        return candidates[0]
    for name in names:
        if name in candidates:
            return name
    if candidates:
        raise InputError(
            f"{spec} has several columns of {what}: {', '.join(candidates)}; give "
            f"{spec},{option}={candidates[0]}"
        )
    if columns is not None:
        raise InputError(f"{spec} must have a column of {what}; it has {', '.join(columns)}")
    return None


def read_rows(spec: str, split: str, table: Any, image: str, label: str | None) -> Rows:
    """Reads labels, names and sizes of all rows, and no image.

    Args:
      spec, split: name the data set in errors.
      table: datasets.Dataset.
      image, label: its columns; label None: no classes.

    Raises:
      InputError: the split lacks one of the columns.
    """
    import datasets

    if missing := [name for name in (image, label) if name and name not in table.features]:
        raise InputError(f"the split {split} of {spec} must have a column {missing[0]}")
    keys: list[str] = [""]
    labels = [""] * len(table)
    if label is not None:
        keys, labels = _read_labels(table, label)
    table = table.select_columns([image])
    if isinstance(table.features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    files, sizes = _read_files(table.with_format("arrow")[:].column(image))
    pairs = list(zip(labels, files))
    if None in files or len(set(pairs)) < len(pairs):
        files = [f"{row:09d}" for row in range(len(files))]
    names = [os.path.join(key, file) if key is not None else "" for key, file in zip(labels, files)]
    classes: dict[str, list[str]] = {key: [] for key in keys}
    for key, name in zip(labels, names):
        if key is not None:
            classes[key].append(name)
    numbers = {name: row for row, name in enumerate(names)}
    classes = {key: sorted(names) for key, names in classes.items()}
    return Rows(split, table, classes, numbers, sizes, labels.count(None))


def _read_labels(table: Any, column: str) -> tuple[list[str], list[str | None]]:
    """All classes, and the one of each row."""
    import datasets

    feature = table.features[column]
    values = table.with_format("arrow").select_columns([column])[:].column(column).to_pylist()
    if isinstance(feature, datasets.ClassLabel):
        names: dict[Any, str] = dict(enumerate(feature.names))
    else:
        known = sorted({value for value in values if value not in _UNKNOWN_LABELS})
        names = {value: str(value) for value in known}
    return list(names.values()), [names.get(value) for value in values]


def _read_files(column: Any) -> tuple[list[str | None], np.ndarray]:
    """The names of the files, and their bytes (N,) int64."""
    import pyarrow as pa
    import pyarrow.compute as pc

    data, paths = column, [None] * len(column)
    if pa.types.is_struct(column.type):
        data = pc.struct_field(column, "bytes")
        if column.type.get_field_index("path") >= 0:
            paths = pc.struct_field(column, "path").to_pylist()
    sizes = pc.fill_null(pc.binary_length(data), -1).to_numpy().astype(np.int64)
    outside = [row for row in np.flatnonzero(sizes < 0).tolist() if paths[row]]
    sizes[outside] = list(local_sizes("", [paths[row] for row in outside]))
    return [os.path.basename(path) if path else None for path in paths], sizes
