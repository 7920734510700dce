"""Arguments of the command line: types (text to values, or one line), and those that are shared."""

import argparse
import dataclasses
from typing import Any

from hmar_jax import families, settings
from hmar_jax.errors import InputError
from hmar_jax.io import files

MODEL_HELP = "a bundled model (digits), a run directory or a model directory"
SEED_HELP = "of the random numbers (default 0)"
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


# Arguments of several commands


def add_model(sub) -> None:
    """--model and --checkpoint."""
    sub.add_argument("--model", type=path, required=True, help=MODEL_HELP)
    sub.add_argument(
        "--checkpoint",
        type=checkpoint,
        default="latest",
        help="of a run: latest (default), best (of least validation loss) or a step",
    )


def add_options(sub, kind: str, several: tuple[str, ...] = ()) -> None:
    """The options that each family declares; those of the same name are shared."""
    for name, cls in families.option_classes(kind).items():
        group = sub.add_argument_group(f"options of {name} models")
        settings.add_arguments(group, cls, several=several)


def add_editing_options(parser) -> None:
    """Options of editing that every family has."""
    from hmar_jax.io.crops import CropConfig
    from hmar_jax.io.masks import CompositeConfig

    for cls in (CropConfig, CompositeConfig):
        settings.add_arguments(parser, cls)


def add_source_options(parser) -> None:
    """Options of what is read of a data set."""
    from hmar_jax.data.source_config import SourceConfig

    settings.add_arguments(parser, SourceConfig)


def add_decode_options(parser) -> None:
    """Options of which images are decoded."""
    from hmar_jax.data.source_config import DecodeConfig

    settings.add_arguments(parser, DecodeConfig)


def given_options(args, kind: str) -> dict[str, Any]:
    """The options of the families' classes that were given."""
    names = {
        field.name
        for cls in families.option_classes(kind).values()
        for field in dataclasses.fields(cls)
    }
    given = {name: getattr(args, name, None) for name in sorted(names)}
    return {name: value for name, value in given.items() if value is not None}
