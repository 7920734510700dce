"""Which images of a folder without validation images are held out."""

import hashlib
import os
import unicodedata
from collections.abc import Mapping, Sequence

from hmar_jax.errors import InputError

# At least two images of each class are held out where that is at most every fifth: two of ten
# images, one of five, none of four.
_MIN_HELD_OUT, _MIN_IMAGES_FOR_EACH = 2, 5


def hold_out(
    classes: Mapping[str, Sequence[str]], share: float, rules: int, where: str
) -> set[str]:
    """Selects images by the hashes of their names, so that new files move few of the others.

    Args:
      classes: class folder to its files.
      share: of the files that are held out, in (0, 1): of each class, or of all together by
        rules 1.
      rules: see source_config.FOLDER_RULES.
      where: what the folder is called in errors.

    Returns:
      The files that are held out: at least one.

    Raises:
      InputError: there are fewer than two files.
    """
    all_files = [file for files in classes.values() for file in files]
    if len(all_files) < 2:
        raise InputError(
            f"{where} must have at least two images, because one is held out for validation; got "
            f"{len(all_files)}"
        )
    if rules == 1:
        count = max(1, round(share * len(all_files)))
        return set(sorted(all_files, key=_first_hash)[:count])
    held_out: set[str] = set()
    for files in classes.values():
        held_out.update(sorted(files, key=_hash)[: num_held_out(len(files), share)])
    if not held_out:  # a few images in each of many classes
        largest = max(classes.values(), key=len)
        held_out.add(min(largest, key=_hash))
    return held_out


def num_held_out(num_images: int, share: float) -> int:
    """How many images of a class are held out; at least one image is left to train on."""
    minimum = min(_MIN_HELD_OUT, num_images // _MIN_IMAGES_FOR_EACH)
    return max(0, min(max(minimum, round(share * num_images)), num_images - 1))


def _hash(file: str) -> bytes:
    """Of a name, the same on every system: some write é as one character, others as two."""
    name = file if file.isascii() else unicodedata.normalize("NFC", file)
    return _digest(name.encode("utf-8", "surrogateescape"))


def _first_hash(file: str) -> bytes:
    return _digest(os.fsencode(file))


def _digest(name: bytes) -> bytes:
    return hashlib.blake2b(name, digest_size=8).digest()
