"""Types of arguments of the command line: text to values, or one line about what is wrong."""

import argparse

from hmar_jax.errors import InputError
from hmar_jax.io import files

OWN_TRANSPARENCY = "alpha"  # of --mask: the transparent pixels of --image


def whole(text: str) -> int:
    """An integer of at least 0."""
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0; got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1; got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """What numpy and JAX both take as a seed."""
    if not text.isascii() or not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be an integer in [0, {2**32 - 1}]; got {text!r}")
    return int(text)


def numbers(text: str) -> tuple[int, ...]:
    """Integers of at least 0, separated by commas."""
    return tuple(whole(part) for part in text.split(","))


def part(text: str) -> tuple[int, int]:
    """I/N."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(
            f"must be I/N with I in [0, N - 1], such as 0/4; got {text!r}"
        )
    return int(index), int(count)


def box(text: str) -> tuple[int, ...]:
    """x0,y0,x1,y1."""
    try:
        found = tuple(int(item) for item in text.split(","))
    except ValueError:
        found = ()
    if len(found) != 4:
        raise argparse.ArgumentTypeError(f"must be four integers x0,y0,x1,y1; got {text!r}")
    return found


def checkpoint(text: str) -> int | str:
    """latest, best, or a step."""
    if text in ("latest", "best"):
        return text
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"must be latest, best or the number of a step; got {text!r}"
        )
    return int(text)


def path(text: str) -> str:
    """The name of a file or directory, with `~` expanded."""
    if not text:  # would be the current directory
        raise argparse.ArgumentTypeError("must not be empty")
    try:
        return files.expand(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
