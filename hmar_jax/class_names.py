"""Classes as users name them: by name or id, in one text or several, and how results label them."""

import csv
import difflib
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from hmar_jax.errors import InputError

_INTEGER = re.compile(r"[+-]?[0-9]+")
_RANGE = re.compile(r"([0-9]+)\s*-\s*([0-9]+)")
_BY_ID, _BY_NAME = "id:", "name:"
_ALL = "all"
_MAX_NAME = 40  # characters of a class name in the name of a file


def resolve_class(given: Any, num_classes: int, class_names: Sequence[str] = ()) -> int:
    """The id of a class.

    An integer is an id. A text is looked up as a name first and as an id second: exactly; then
    without regard to case, with spaces and hyphens as underscores; then, for numbers, by value
    ("7" and "007"). Class folders are sorted as texts (0 1 10 11 2 ...), so that a number can be
    the name of one class and the id of another: such a text is refused. "id:2" is always an id, and
    "name:2" always a name.

    Args:
      given: an integer, or a text.
      class_names: by id; empty: the classes have no names.

    Raises:
      InputError: there is no such class, or several.
    """
    is_number = isinstance(given, int | np.integer) and not isinstance(given, bool)
    if np.ndim(given) == 0 and not isinstance(given, str) and not is_number:
        kind = getattr(getattr(given, "dtype", None), "kind", "")
        if kind not in ("i", "u"):  # of a numpy or JAX scalar
            raise _unknown(repr(given), num_classes, class_names)
        is_number = True
    if is_number:
        return _checked_id(int(given), num_classes)
    text = str(given).strip()
    if text not in class_names:
        if text.startswith(_BY_ID) and _INTEGER.fullmatch(text.removeprefix(_BY_ID).strip()):
            return _checked_id(int(text.removeprefix(_BY_ID)), num_classes)
        if text.startswith(_BY_NAME):
            name = text.removeprefix(_BY_NAME).strip()
            return _only(name, find_names(name, class_names), num_classes, class_names)
    named = find_names(text, class_names)
    if not _INTEGER.fullmatch(text):
        return _only(text, named, num_classes, class_names)
    number = int(text)
    if not named:
        return _checked_id(number, num_classes)
    by_name = _only(text, named, num_classes, class_names)
    if 0 <= number < num_classes and number != by_name:
        raise InputError(
            f"class {text!r} is the name of class {by_name} ({class_names[by_name]!r}) and the id "
            f"of class {class_names[number]!r}; give name:{text} or id:{number}"
        )
    return by_name


def find_names(text: str, class_names: Sequence[str]) -> list[int]:
    """Ids of the classes that a text names; of the strictest comparison that finds any."""
    for form in (_exact, _plain, _value):
        wanted = form(text)
        found = [i for i, name in enumerate(class_names) if form(name) == wanted]
        if found and wanted is not None:
            return found
    return []


def _exact(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # macOS stores the letters of file names decomposed


def _plain(name: str) -> str:
    return re.sub(r"[\s-]", "_", _exact(name).strip().casefold())


def _value(name: str) -> str | None:
    """A number's digits without leading zeros; None for other names."""
    text = name.strip()
    return str(int(text)) if _INTEGER.fullmatch(text) else None


def _only(text: str, named: list[int], num_classes: int, class_names: Sequence[str]) -> int:
    if not named:
        raise _unknown(repr(text), num_classes, class_names)
    if len(named) > 1:
        raise InputError(
            f"class {text!r}: {len(named)} classes have this name; give an id: "
            f"{', '.join(f'id:{i}' for i in named)}"
        )
    return named[0]


def _checked_id(number: int, num_classes: int) -> int:
    if not 0 <= number < num_classes:
        raise InputError(f"class must be an id in [0, {num_classes - 1}]; got {number}")
    return number


def _unknown(given: str, num_classes: int, class_names: Sequence[str]) -> InputError:
    names = f", or a name such as {', '.join(class_names[:3])}" if class_names else ""
    similar = difflib.get_close_matches(given.strip("'\""), class_names, n=3)
    hint = f"; did you mean {' or '.join(map(repr, similar))}?" if similar else ""
    return InputError(f"class must be an id in [0, {num_classes - 1}]{names}; got {given}{hint}")


def split_classes(text: str, class_names: Sequence[str] = ()) -> list[str]:
    """Several classes in one text: separated by commas, as a row of a CSV file.

    A name that contains a comma stands between double quotes: '"great white, shark",3'.

    Raises:
      InputError: the text is empty or its quotes do not match.
    """
    try:
        items = next(csv.reader([text], strict=True, skipinitialspace=True), [])
    except csv.Error as error:
        raise InputError(f"classes {text!r}: the double quotes do not match ({error})") from None
    items = [item.strip() for item in items]
    if not all(items) or not items:
        raise InputError(f"each class must be a name or an id, separated by commas; got {text!r}")
    whole = text.strip()
    if len(items) > 1 and find_names(whole, class_names):
        unknown = [item for item in items if not find_names(item, class_names)]
        if unknown:
            raise InputError(
                f"classes {whole!r} is one class with a comma in its name; write it between double "
                f"quotes: --classes='\"{whole}\"'"
            )
    return items


def resolve_classes(text: str, num_classes: int, class_names: Sequence[str] = ()) -> list[int]:
    """The ids of several classes in one text, in the order given.

    The text is split as `split_classes` does. Beside a name or an id, an item may be a range of
    ids, "0-9", or "all". Names come first: "golden-retriever" is no range, and an item that is the
    name of one class and stands for others too is refused, as such numbers are. "id:0-9" and
    "id:all" are always ids, and "name:all" is always a name.

    Raises:
      InputError: there is no such class, or an item has two readings.
    """
    found: list[int] = []
    for item in split_classes(text, class_names):
        found += _resolve_item(item, num_classes, class_names)
    return found


def _resolve_item(item: str, num_classes: int, class_names: Sequence[str]) -> list[int]:
    by_id = item.startswith(_BY_ID) and item not in class_names
    text = item.removeprefix(_BY_ID).strip() if by_id else item
    named = [] if by_id else find_names(item, class_names)
    several = _ids_of(text, num_classes, is_name=bool(named))
    if several is None:
        return [resolve_class(item, num_classes, class_names)]
    if named and list(several) != named:
        raise InputError(
            f"{item!r} is the name of class {named[0]} ({class_names[named[0]]!r}) and stands for "
            f"the ids {several[0]} to {several[-1]}; give name:{item} or id:{item}"
        )
    if by_id or text.casefold() == _ALL:
        return list(several)
    try:  # each number as if it stood alone: class folders may be numbered otherwise than ids
        return [resolve_class(str(i), num_classes, class_names) for i in several]
    except InputError as error:
        reason = str(error).partition(";")[0]
        raise InputError(f"classes {item!r}: {reason}; give id:{item} for ids") from None


def _ids_of(text: str, num_classes: int, is_name: bool) -> range | None:
    """The ids that "all" or a range stands for; None for anything else.

    Raises:
      InputError: the range does not ascend within the ids, and is no name either.
    """
    if text.casefold() == _ALL:
        return range(num_classes)
    match = _RANGE.fullmatch(text)
    if match is None:
        return None
    first, last = int(match[1]), int(match[2])
    if first <= last < num_classes:
        return range(first, last + 1)
    if is_name:
        return None
    raise InputError(
        f"a range of classes must be FIRST-LAST with ids in [0, {num_classes - 1}], the smaller "
        f"first; got {text!r}"
    )


def file_stem(class_id: int, num_classes: int, class_names: Sequence[str] = ()) -> str:
    """A class at the beginning of a file's name: "207_golden_retriever"; ids of equal length.

    Letters and digits of every script stay; what has a meaning in paths and shells does not.
    """
    number = f"{class_id:0{len(str(num_classes - 1))}d}"
    name = _exact(class_names[class_id]) if class_names else ""
    if _value(name) == str(class_id):
        name = ""
    words = re.sub(r"\W+", "_", name)[:_MAX_NAME].strip("_")
    return f"{number}_{words}" if words else number


def label_of(class_id: int, class_names: Sequence[str] = ()) -> str:
    """What a result calls a class: its name, and its id where the name alone could mislead."""
    if not class_names:
        return str(class_id)
    name = class_names[class_id]
    others = sum(other == name for other in class_names)
    value = _value(name)
    misleading = value is not None and value != str(class_id)
    return f"{name} (id {class_id})" if others > 1 or misleading else name
