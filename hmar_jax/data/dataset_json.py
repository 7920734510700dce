"""Labels from the file dataset.json, as the data sets of StyleGAN and EDM have it.

    {"labels": [["00000/img00000000.png", 6], ["00000/img00000001.png", 9], ...]}

"labels" may also be {"00000/img00000000.png": 6, ...}, or null where there are no classes. Names
are relative to the folder of the file.
"""

import logging
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
    labels = content.get("labels") if isinstance(content, dict) else content
    if not isinstance(content, dict) or not isinstance(labels, list | dict | None):
        raise InputError(
            f'{file} must have "labels": a list of pairs of file name and class id, or null; got '
            f"{_shorten(labels)}"
        )
    if not labels:
        return None
    pairs = labels.items() if isinstance(labels, dict) else labels
    return dict(_check_pair(file, pair) for pair in pairs)


def _check_pair(file: Readable, pair: Any) -> tuple[str, int]:
    if isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str):
        name, label = pair
        is_id = isinstance(label, int | float) and label == int(label) >= 0
        if is_id and not isinstance(label, bool) and label < _MAX_CLASSES:
            return name.replace("\\", "/"), int(label)
    raise InputError(
        f'"labels" of {file} must be pairs of file name and class id, such as '
        f'["00000/img00000000.png", 6]; got {_shorten(pair)}'
    )


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
