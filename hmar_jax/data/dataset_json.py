"""Labels from the file dataset.json, as the data sets of StyleGAN and EDM have it.

    {"labels": [["00000/img00000000.png", 6], ["00000/img00000001.png", 9], ...]}

"labels" may also be {"00000/img00000000.png": 6, ...}, or null where there are no classes. Names
are relative to the folder of the file.
"""

import logging
import posixpath
from collections.abc import Sequence
from typing import Any

from hmar_jax.errors import InputError, printable
from hmar_jax.io.files import Readable, read_json

LABELS_FILE = "dataset.json"
_MAX_CLASSES = 1_000_000  # a label beyond is no class id
_MAX_REPORTED = 5  # names in a warning

_log = logging.getLogger(__name__)


def classes_of(file: Readable, images: Sequence[str]) -> dict[str, list[str]]:
    """Reads the classes of images.

    Args:
      file: the dataset.json.
      images: their names, relative to its folder, sorted.

    Returns:
      The images of each class, "0" to the largest label; or {"": images} if there are no labels.

    Raises:
      InputError: the file is no such file, or an image has no label in it.
    """
    labels = _read(file)
    if labels is None:
        return {"": list(images)}
    missing = [image for image in images if image not in labels]
    if missing:
        raise InputError(
            f"{file} must have a label for each image; {len(missing)} of {len(images)} have none, "
            f"such as {printable(missing[0])}"
        )
    unknown = sorted(set(labels).difference(images))
    if unknown:
        _log.warning(
            "%s: %d of %d labels name no image: %s%s",
            file,
            len(unknown),
            len(labels),
            ", ".join(map(repr, unknown[:_MAX_REPORTED])),
            ", ..." if len(unknown) > _MAX_REPORTED else "",
        )
    count = max((labels[image] for image in images), default=-1) + 1
    classes: dict[str, list[str]] = {str(label): [] for label in range(count)}
    for image in images:
        classes[str(labels[image])].append(image)
    return classes


def _read(file: Readable) -> dict[str, int] | None:
    content = read_json(file, "the labels of the images")
    is_labeled = isinstance(content, dict) and "labels" in content
    labels = content["labels"] if is_labeled else content
    if not is_labeled or not isinstance(labels, list | dict | None):
        raise InputError(
            f'{file} must have "labels": a list of pairs of file name and class id, or null; got '
            f"{_shorten(labels)}; if it is another kind of file, rename it, and folders are classes"
        )
    if not labels:
        return None
    found: dict[str, int] = {}
    for pair in labels.items() if isinstance(labels, dict) else labels:
        name, label = _check_pair(file, pair)
        if found.setdefault(name, label) != label:
            raise InputError(
                f"{file} must have one label for each image; {printable(name)} has {found[name]} "
                f"and {label}"
            )
    return found


def _check_pair(file: Readable, pair: Any) -> tuple[str, int]:
    if isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str):
        name, label = pair
        is_number = isinstance(label, int | float) and not isinstance(label, bool)
        if is_number and 0 <= label < _MAX_CLASSES and label == int(label):  # NaN is not >= 0
            return posixpath.normpath(name.replace("\\", "/")), int(label)
    raise InputError(
        f'"labels" of {file} must be pairs of file name and class id, such as '
        f'["00000/img00000000.png", 6]; got {_shorten(pair)}'
    )


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
