"""Settings: each is declared once, as a field of a frozen dataclass.

The declaration has type, range, default and help text:

    @dataclasses.dataclass(frozen=True)
    class SamplingConfig(Settings):
        top_p: float = setting(0.0, "Nucleus sampling; 0 is off.", at_least=0, at_most=1)

Everything that users meet derives from such a class: the keys of config files
(config_files.ConfigSchema), checks (at construction, and `check_value`), options of the command
line (`add_arguments`), and keyword arguments with their documentation (`parameters`, `describe`).
"""

import argparse
import dataclasses
import inspect
import json
import math
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from hmar_jax.errors import InputError

_KEY = "setting"  # of a field's metadata


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What is known of a setting beside its name, type and default."""

    help: str
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] | Mapping[str, Any] = ()
    metavar: str | None = None  # in the help of the command line
    # From the command line's text; None: by the field's type.
    parse: Callable[[str], Any] | None = None
    former_name: str | None = None  # still accepted, with a warning
    derived: bool = False  # follows from the data or another model: no key of a config
    harmless: bool = False  # may differ between the starts of one run: changes no result
    # Whether an extension of a run may change it (training/extension.py). None: unless it is in the
    # group `model`, which describes what is trained.
    extendable: bool | None = None
    # A step at which something happens once in a run: an extension may move it as long as it is
    # ahead.
    happens_once: bool = False
    # Names a data set, a model or a file: starts of one run are compared by what it names, so that
    # it may be moved.
    is_input: bool = False
    # Of a number of steps within a run: a value beyond the run's last step becomes this share of it
    # (training/run_length.py).
    share_of_run: float | None = None
    counts: str = "steps"  # what it is a number of: steps or images
    replaces: str | None = None  # another key of its group, which a value of this one turns off
    tasks: tuple[str, ...] = ()  # of sampling options: tasks whose configs have it as a key
    # Of a setting whose default may change: the default is None, and what it stands for is decided
    # when a run starts, and kept.
    new: Any = None  # the value of a new run
    before: Any = None  # the value of runs from before the setting was declared


def setting(default: Any, help: str, **declaration) -> Any:
    """A dataclass field with its declaration; see `Declaration` for the keywords."""
    return dataclasses.field(default=default, metadata={_KEY: Declaration(help, **declaration)})


def declaration(field: dataclasses.Field) -> Declaration:
    """The declaration of a field; one without help or range for a plain field."""
    return field.metadata.get(_KEY, Declaration(""))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of the classes that declare settings; checks types and ranges at construction."""

    prefix: ClassVar[str] = ""  # of names in errors, such as "config.recipe."

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = _plain(getattr(self, field.name))
            value = tuple(value) if isinstance(value, list) else value
            object.__setattr__(self, field.name, value)
            check_value(self.prefix + field.name, value, field, type(self))


def _plain(value: Any) -> Any:
    """Python's own numbers and lists in place of numpy's and JAX's, as loops over arrays give."""
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value
    if hasattr(value, "tolist") and not isinstance(value, type):  # a class such as np.float32
        return value.tolist()
    return value


def check_value(name: str, value: Any, field: dataclasses.Field, cls: type | None = None) -> None:
    """Raises InputError unless the value has the field's type and lies in its range.

    Args:
      name: how the error names the setting.
      cls: the dataclass of the field, where its annotations are strings.
    """
    declared = declaration(field)
    if declared.parse is not None and not declared.choices:
        return  # not a plain value: its own code checks it
    if value is None and field.default is None:
        return
    allowed = kinds(cls, field)
    if tuple not in allowed:
        _check_item(name, value, allowed, declared)
        return
    if not isinstance(value, tuple):
        raise InputError(f"{name} must be a list; got {value!r}")
    for item in value:
        _check_item(f"{name}: each item", item, allowed, declared)


def _check_item(name: str, value: Any, allowed: tuple[type, ...], declared: Declaration):
    if declared.choices:
        if value not in declared.choices:
            raise InputError(f"{name} must be one of {', '.join(declared.choices)}; got {value!r}")
        return
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if bool in allowed:
        if not isinstance(value, bool):
            raise InputError(f"{name} must be True or False; got {value!r}")
        return
    if float in allowed or int in allowed:
        whole = float not in allowed
        kind = "an integer" if whole else "a number"
        wrong_type = not number or (whole and not isinstance(value, int))
        limits = describe_range(declared)
        if wrong_type or not math.isfinite(value) or not in_range(value, declared):
            raise InputError(
                f"{name} must be {kind}{f' {limits}' if limits else ''}; got {value!r}"
            )


def in_range(value: float, declared: Declaration) -> bool:
    """Whether a number lies in the declared range."""
    return (
        (declared.at_least is None or value >= declared.at_least)
        and (declared.at_most is None or value <= declared.at_most)
        and (declared.above is None or value > declared.above)
        and (declared.below is None or value < declared.below)
    )


def describe_range(declared: Declaration) -> str:
    """The range in words: "in [0, 1]", "above 0", "of at least 1"; "" without one."""
    low = declared.at_least if declared.at_least is not None else declared.above
    high = declared.at_most if declared.at_most is not None else declared.below
    if low is not None and high is not None:
        opening = "[" if declared.at_least is not None else "("
        closing = "]" if declared.at_most is not None else ")"
        return f"in {opening}{_digits(low)}, {_digits(high)}{closing}"
    if low is not None:
        kind = "of at least" if declared.at_least is not None else "above"
        return f"{kind} {_digits(low)}"
    if high is not None:
        kind = "of at most" if declared.at_most is not None else "below"
        return f"{kind} {_digits(high)}"
    return ""


def _digits(number: float) -> str:
    """A bound in all its digits: 1048576, not 1.04858e+06."""
    return str(number) if isinstance(number, int) else f"{number:g}"


def kinds(cls: type | None, field: dataclasses.Field) -> tuple[type, ...]:
    """The plain types of an annotation such as `float | None` or `tuple[int, ...]`."""
    annotation = field.type
    if isinstance(annotation, str):
        annotation = typing.get_type_hints(cls)[field.name] if cls is not None else Any
    options = (
        typing.get_args(annotation)
        if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
        else (annotation,)
    )
    found: list[type] = []
    for option in options:
        if typing.get_origin(option) is tuple:
            found += [tuple, *(a for a in typing.get_args(option) if a is not Ellipsis)]
        elif isinstance(option, type):
            found.append(option)
    return tuple(found)


def differences(there: Any, here: Any, ignored: Iterable[str] = ()) -> list[str]:
    """In words, how two instances of one class of settings differ."""
    names = [f.name for f in dataclasses.fields(here) if f.name not in ignored]
    return [
        f"{name} is {getattr(there, name)!r} there and {getattr(here, name)!r} here"
        for name in names
        if getattr(there, name) != getattr(here, name)
    ]


# Config files


def names_of_task(cls: type, task: str) -> tuple[str, ...]:
    """Names of the settings of a class that a task's configs have as keys."""
    return tuple(f.name for f in dataclasses.fields(cls) if task in declaration(f).tasks)


def from_group(cls: type, group: Mapping[str, Any], **more) -> Any:
    """An instance of a class of settings from a group of a checked config, and more fields."""
    names = {field.name for field in dataclasses.fields(cls)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in group.items() if k in names}
    return cls(**values, **more)


# The command line


def from_arguments(default: Any, args: argparse.Namespace) -> Any:
    """An instance of settings with the values of the options that were given (`add_arguments`)."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(default)}
    given = {name: value for name, value in values.items() if value is not None}
    return dataclasses.replace(default, **given)


def add_arguments(parser: Any, cls: type, *, several: Iterable[str] = ()) -> None:
    """Options of the command line for every setting of a class that is not there yet.

    An option that is not given stays None: the model's own value then holds.

    Args:
      parser: an argparse parser or a group of one.
      several: names of settings that may be given more than once; they are collected in a list.
    """
    for field in dataclasses.fields(cls):
        if f"--{field.name}" in parser._option_string_actions:
            continue
        declared = declaration(field)
        repeated = field.name in several
        help = _help(field, declared, repeated)
        if bool in kinds(cls, field):
            for name, value in ((field.name, True), (f"no_{field.name}", False)):
                shown = value is not field.default  # the default needs no option
                parser.add_argument(
                    f"--{name}",
                    dest=field.name,
                    default=None,
                    action="store_const",
                    const=value,
                    help=(help if value else f"Do not {help[0].lower()}{help[1:]}")
                    if shown
                    else argparse.SUPPRESS,
                )
            continue
        parse = _argument_type(cls, field)
        options: dict[str, Any] = {"action": "append"} if repeated else {}
        parser.add_argument(
            f"--{field.name}",
            default=None,
            type=parse,
            metavar=declared.metavar or field.name.upper(),
            help=help,
            **options,
        )
        if declared.former_name:
            former = _former(declared.former_name, field.name, parse)
            parser.add_argument(
                f"--{declared.former_name}",
                dest=field.name,
                default=None,
                type=former,
                help=argparse.SUPPRESS,
            )


def _former(old: str, new: str, parse: Callable) -> Callable:
    def parse_and_warn(text: str):
        warn_renamed(f"--{old}", f"--{new}")
        return parse(text)

    parse_and_warn.__name__ = getattr(parse, "__name__", "value")
    return parse_and_warn


def warn_renamed(old: str, new: str) -> None:
    """Warns that a name is deprecated."""
    warnings.warn(f"{old} is deprecated; use {new}", FutureWarning, stacklevel=3)


def _help(field: dataclasses.Field, declared: Declaration, repeated: bool) -> str:
    limits = describe_range(declared)
    choices = f"One of {', '.join(declared.choices)}." if declared.choices else ""
    parts = [declared.help, f"Must be {limits.removeprefix('of ')}." if limits else "", choices]
    if repeated:
        parts.append("May be given several times: the results stand side by side.")
    if declared.tasks:
        parts.append("Default: the model's own.")
    elif field.default is not None and bool not in kinds(None, field):
        parts.append(f"Default: {field.default}.")
    return " ".join(part for part in parts if part).replace("%", "%%")


def _argument_type(cls: type, field: dataclasses.Field) -> Callable[[str], Any]:
    declared = declaration(field)

    def parse(text: str):
        try:
            if declared.parse is not None:
                return declared.parse(text)
            value = parse_text(text, kinds(cls, field))
            check_value(f"--{field.name}", value, field, cls)
        except InputError as error:  # argparse names the option itself
            message = str(error).removeprefix(f"--{field.name}").lstrip(": ")
            raise argparse.ArgumentTypeError(message) from None
        return value

    return parse


def parse_text(text: str, allowed: tuple[type, ...]) -> Any:
    """A value of one of the types from text; the text itself where it is none."""
    if tuple in allowed:
        items = tuple(kind for kind in allowed if kind is not tuple)
        return tuple(parse_text(part.strip(), items) for part in text.split(","))
    for kind in (int, float):
        if kind in allowed:
            try:
                return kind(text)
            except ValueError:
                continue
    if bool in allowed and text.lower() in ("true", "false"):
        return text.lower() == "true"
    return text


# Keyword arguments


def _optional(annotation: Any) -> Any:
    return annotation if annotation is Any else annotation | None


def parameters(cls: type, optional: bool = True) -> list[inspect.Parameter]:
    """The settings as keyword-only parameters of a signature.

    Args:
      optional: each may also be None, which stands for the model's own value.
    """
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if optional else field.default,
            annotation=_optional(field.type) if optional else field.type,
        )
        for field in dataclasses.fields(cls)
    ]


def describe(cls: type, indent: str = "", own: Any = None) -> str:
    """One line of documentation for each setting: name, help, range and default.

    Args:
      own: a model's own values, which hold in place of the declared defaults.
    """
    lines = []
    for field in dataclasses.fields(cls):
        declared = declaration(field)
        limits = describe_range(declared)
        default = getattr(own, field.name, field.default)
        notes = [limits] if limits else []
        notes += [f"default {default!r}"] if default is not None else []
        end = f" ({'; '.join(notes)})" if notes else ""
        lines.append(f"{indent}{field.name}: {declared.help}{end}")
    return "\n".join(lines)


def resolve_names(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given keywords by their present names.

    Raises:
      InputError: a name is unknown, or an old and a new name of one setting are both given.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    former = {
        declaration(field).former_name: name
        for name, field in fields.items()
        if declaration(field).former_name
    }
    found: dict[str, Any] = {}
    for name, value in given.items():
        present = former.get(name, name)
        if present not in fields:
            raise InputError(f"unknown option {name!r}; known: {', '.join(sorted(fields))}")
        if name != present:
            warn_renamed(name, present)
            if given.get(present) is not None:
                raise InputError(f"{name} and {present} are the same option; give one of them")
        found[present] = value if value is not None else found.get(present)
    return found


def parse_json(text: str, what: str) -> Any:
    """JSON from the command line.

    Raises:
      InputError: the text is not JSON.
    """
    try:
        return json.loads(text)
    except ValueError:
        raise InputError(f"{text!r} must be {what}") from None
