"""Config files: reading configs/NAME.py:SPEC, changing single values, comparing configs of runs.

A config file is a Python file with get_config(spec) -> ml_collections.ConfigDict. `ConfigSchema`
says which keys there are; the keys are declared as settings (settings.py).
"""

import ast
import copy
import dataclasses
import functools
import importlib.util
import json
import logging
import os
import pathlib
import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from hmar_jax import settings
from hmar_jax.errors import InputError

_log = logging.getLogger(__name__)

# A class of settings, or a class and the names of some of its settings.
Part = type | tuple[type, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class ConfigSchema:
    """The keys of a kind of config: classes of settings for the top level ("") and each group."""

    groups: Mapping[str, tuple[Part, ...]]  # by dotted name: "", "data", "data.transform", ...

    def fields(self, group: str) -> dict[str, tuple[type, dataclasses.Field]]:
        """The settings of a group by name, each with the class that declares it."""
        found: dict[str, tuple[type, dataclasses.Field]] = {}
        for part in self.groups.get(group, ()):
            cls, names = part if isinstance(part, tuple) else (part, None)
            for field in dataclasses.fields(cls):
                derived = settings.declaration(field).derived
                has_default = field.default is not dataclasses.MISSING
                if has_default and not derived and (names is None or field.name in names):
                    found[field.name] = (cls, field)
        return found

    def default_config(self) -> ConfigDict:
        """All keys with their defaults."""
        config = ConfigDict()
        for group in sorted(self.groups, key=lambda name: name.count(".") + bool(name)):
            node = config
            for name in group.split(".") if group else ():
                if name not in node:
                    node[name] = ConfigDict()
                node = node[name]
            for name, (cls, field) in self.fields(group).items():
                node[name] = field.default if field.default is not None else _empty(cls, field)
        return config

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises InputError for the first key that is unknown, missing or out of range."""
        for group in self.groups:
            node: Any = config
            for name in group.split(".") if group else ():
                node = node.get(name) if isinstance(node, Mapping | ConfigDict) else None
            if not isinstance(node, Mapping | ConfigDict):
                raise InputError(f"config has no group {group!r}")
            fields = self.fields(group)
            inner = {name.split(".")[-1] for name in self.groups if _parent(name) == group and name}
            for name in node:
                if name not in fields and name not in inner:
                    known = ", ".join(sorted([*fields, *inner]))
                    raise InputError(f"unknown config key {_join(group, name)!r}; known: {known}")
            for name, (cls, field) in fields.items():
                if name not in node:
                    raise InputError(f"config key {_join(group, name)} is missing")
                settings.check_value(f"config.{_join(group, name)}", node[name], field, cls)

    def harmless(self) -> set[str]:
        """Dotted names of the keys that may differ between the starts of one run."""
        return {
            _join(group, name)
            for group in self.groups
            for name, (_, field) in self.fields(group).items()
            if settings.declaration(field).harmless
        }

    def inputs(self) -> set[str]:
        """Dotted names of the keys that name inputs: compared by what they name, not as text."""
        return {
            _join(group, name)
            for group in self.groups
            for name, (_, field) in self.fields(group).items()
            if settings.declaration(field).is_input
        }

    def extendable(self) -> set[str]:
        """Dotted names of the keys that an extension of a run may change, without inputs."""
        found = set()
        for group in self.groups:
            for name, (_, field) in self.fields(group).items():
                declared = settings.declaration(field)
                may = declared.extendable
                if (group.split(".")[0] != "model") if may is None else may:
                    found.add(_join(group, name))
        return found - self.inputs()

    def happen_once(self) -> set[str]:
        """Dotted names of the keys that are a step at which something happens once in a run."""
        return {
            _join(group, name)
            for group in self.groups
            for name, (_, field) in self.fields(group).items()
            if settings.declaration(field).happens_once
        }

    def former_names(self) -> dict[str, str]:
        """Dotted former names of keys, and the present ones."""
        return {
            _join(group, settings.declaration(field).former_name): _join(group, name)
            for group in self.groups
            for name, (_, field) in self.fields(group).items()
            if settings.declaration(field).former_name
        }

    def replaced_by(self) -> dict[str, str]:
        """Dotted names of keys that turn another one off, and that other key."""
        return {
            _join(group, name): _join(group, settings.declaration(field).replaces)
            for group in self.groups
            for name, (_, field) in self.fields(group).items()
            if settings.declaration(field).replaces
        }

    def upgrade(self, old: Mapping[str, Any]) -> dict[str, Any]:
        """The config of an older version: former names replaced, missing keys at their defaults.

        A key that declares what held before it was there has that value.
        """
        flat, former = dict(flatten(old)), self.former_names()
        flat = {former.get(name, name): value for name, value in flat.items()}
        for name, declared in self._kept():
            flat.setdefault(name, declared.before)
        for name, value in flatten(to_dict(self.default_config())):
            flat.setdefault(name, value)
        return unflatten(flat)

    def settle(self, config: ConfigDict, run: Mapping[str, Any] | None) -> ConfigDict:
        """A copy of a config with values for the empty keys that a run keeps from its start.

        Args:
          run: the config of the run that resumes, upgraded; None: a new run.
        """
        settled, kept = copy.deepcopy(config), dict(flatten(run or {}))
        for name, declared in self._kept():
            *groups, key = name.split(".")
            node = functools.reduce(lambda node, group: node[group], groups, settled)
            if node.get(key) is None:
                value = kept.get(name)
                node[key] = declared.new if value is None else value
        return settled

    def leave_empty(self, config: ConfigDict, names: Iterable[str]) -> None:
        """Empties dotted keys of a config, to be filled in when a run starts from a model.

        They still have a type and can be set, in config files and on the command line.
        """
        for name in names:
            group, _, key = name.rpartition(".")
            cls, field = self.fields(group)[key]
            set_value(config, name, _empty(cls, field))

    def empty_keys(self, config: ConfigDict) -> list[str]:
        """Dotted keys that are empty and whose declaration allows no empty value."""
        return [
            _join(group, name)
            for group in self.groups
            for name, (_, field) in self.fields(group).items()
            if field.default is not None and get_value(config, _join(group, name)) is None
        ]

    def _kept(self) -> Iterator[tuple[str, settings.Declaration]]:
        """Dotted names of the keys that a run keeps from its start, and their declarations."""
        for group in self.groups:
            for name, (_, field) in self.fields(group).items():
                declared = settings.declaration(field)
                if declared.new is not None:
                    yield _join(group, name), declared


def _empty(cls: type, field: dataclasses.Field) -> Any:
    """None that remembers its type, so that it can be overridden."""
    kinds = [kind for kind in settings.kinds(cls, field) if kind is not type(None)]
    return config_dict.placeholder(kinds[0])


def _parent(group: str) -> str:
    return group.rpartition(".")[0]


def _join(group: str, name: str | None) -> str:
    return f"{group}.{name}" if group else str(name)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested mappings."""
    for key, value in tree.items():
        name = _join(prefix, key)
        if isinstance(value, Mapping):
            yield from flatten(value, name)
        else:
            yield name, value


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of flatten."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


# Reading


def load_config(argument: str) -> ConfigDict:
    """From "configs/hmar.py:digits,seed=1": the file's get_config("digits,seed=1").

    A path with a folder other than `configs` must be that file. `configs/NAME.py`, or NAME alone,
    that is not found from the current directory is the one that comes with the package.

    Raises:
      InputError: no such file, no such name in it, an unknown key after the name; or the file is no
        Python, fails, or returns something else.
    """
    path, _, spec = argument.partition(":")
    file = _find(path)
    loader = importlib.util.spec_from_file_location(f"hmar_config_{file.stem}", file)
    assert loader is not None and loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    try:
        loader.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise InputError(f"config {path!r} must define get_config(spec)")
        config = get_config(spec)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"config {path!r} {_describe_failure(error, file)}") from error
    if not isinstance(config, ConfigDict):
        raise InputError(
            f"config {path!r}: get_config must return an ml_collections.ConfigDict; "
            f"got {type(config).__name__}"
        )
    return config.lock()


def _describe_failure(error: BaseException, file: pathlib.Path) -> str:
    """What went wrong in a config file, and in which of its lines."""
    reason = " ".join(str(error).split())
    # Of a key that a ConfigDict lacks: without the whole config, which follows.
    reason, *others = reason.split("Other fields present")
    reason = reason.strip(" '\".") if others else reason
    if isinstance(error, SyntaxError):
        if "null bytes" in reason or "codec" in reason or "utf-8" in reason.lower():
            return f"must be UTF-8 text; save it as UTF-8 ({reason})"
        return f"is not valid Python: {error.msg} (line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == os.path.abspath(file)]
    where = f" in line {lines[-1]}" if lines else ""
    return f"fails{where}: {type(error).__name__}{f': {reason}' if reason else ''}"


def _find(path: str) -> pathlib.Path:
    if os.path.isfile(path) and path.endswith(".py"):  # unlike Path.is_file, False for any nonsense
        return pathlib.Path(path)
    folder, name = os.path.split(path)
    name = name.removesuffix(".py")
    packaged = _packaged_configs()
    if folder in ("", "configs") and name in packaged:
        _log.info("config %s: the packaged file %s", path, packaged[name])
        return packaged[name]
    raise InputError(
        f"config {path!r}: no such Python file; packaged configs: {', '.join(sorted(packaged))}"
    )


def _packaged_configs() -> dict[str, pathlib.Path]:
    """The configs that lie beside the package in a checkout, or were installed with it, by name."""
    checkout = pathlib.Path(__file__).resolve().parent.parent
    folders = [str(checkout / "configs")] if (checkout / "setup.py").is_file() else []
    package = importlib.util.find_spec("hmar_jax.packaged_configs")
    folders += list(package.submodule_search_locations or ()) if package else []
    found: dict[str, pathlib.Path] = {}
    for folder in map(pathlib.Path, folders):
        for file in sorted(folder.glob("*.py")) if folder.is_dir() else ():
            if not file.name.startswith("_"):
                found.setdefault(file.stem, file)
    return found


def parse_spec(spec: str, names: Mapping[str, Any] | Iterable[str]) -> tuple[str, dict[str, str]]:
    """From "NAME,key=value,...": the name and the pairs.

    Raises:
      InputError: the name is not among `names`, or a part has no "=".
    """
    name, *pairs = [part.strip() for part in spec.split(",")]
    if name not in names:
        raise InputError(f"config name {name!r} must be one of {', '.join(names)}")
    for pair in pairs:
        if "=" not in pair:
            raise InputError(f"{pair!r} after the config name {name!r} must be key=value")
    return name, dict(pair.split("=", 1) for pair in pairs)


# Single values


def get_value(config: ConfigDict, key: str) -> Any:
    """The value of a dotted key, which must be there."""
    for part in key.split("."):
        config = config[part]
    return config


def set_value(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a dotted key, which must be there, to a value of its type."""
    group, _, last = key.rpartition(".")
    (get_value(config, group) if group else config)[last] = value


def override(
    config: ConfigDict, key: str, text: str, former_names: Mapping[str, str] | None = None
) -> None:
    """Sets a dotted key from text, in the type of the value that is there.

    Args:
      former_names: old keys that are still accepted, with a warning, and their present names.

    Raises:
      InputError: there is no such key, or the text is no value of its type.
    """
    if former_names and key in former_names:
        settings.warn_renamed(f"config key {key}", former_names[key])
        key = former_names[key]
    *parents, last = key.split(".")
    node: Any = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, ConfigDict) else None
    if not isinstance(node, ConfigDict) or last not in node:
        where = node if isinstance(node, ConfigDict) else config
        raise InputError(f"unknown config key {key!r}; known: {', '.join(sorted(where.keys()))}")
    old = node[last]
    if isinstance(old, ConfigDict):
        inner = ", ".join(f"{key}.{k}" for k in sorted(old.keys()))
        raise InputError(f"config key {key!r} is a group; its keys: {inner}")
    kind = node.get_type(last) if old is None else type(old)
    node[last] = _convert(key, text, old, kind)


def override_all(
    config: ConfigDict, pairs: Iterable[tuple[str, str]], schema: ConfigSchema
) -> None:
    """Sets dotted keys from texts. A key that replaces another one (epochs: steps) turns it off.

    If both are given, the other one holds, and a warning says so.

    Raises:
      InputError: see `override`.
    """
    pairs, former = list(pairs), schema.former_names()
    for key, text in pairs:
        override(config, key, text, former)
    given = {former.get(key, key) for key, _ in pairs}
    for key, other in schema.replaced_by().items():
        if key not in given or not get_value(config, key) or not get_value(config, other):
            continue
        if other in given:
            _log.warning("config.%s has no effect, as config.%s is given too", key, other)
        else:
            override(config, other, "0")


def _convert(key: str, text: str, old: Any, kind: type) -> Any:
    example = f", such as {old!r}" if old is not None else ""
    wrong = InputError(f"config key {key} must be of type {kind.__name__}{example}; got {text!r}")
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise wrong
        return text.lower() == "true"
    try:
        if kind is tuple:
            items = text.strip("()[] ")
            value: Any = tuple(
                ast.literal_eval(item.strip()) for item in items.split(",") if item.strip()
            )
        else:
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise wrong from None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise wrong
    if kind is tuple and old and {type(item) for item in value} - {type(item) for item in old}:
        raise wrong
    return value


# Comparing


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Plain JSON types, as a run directory keeps them."""
    return json.loads(json.dumps(config.to_dict()))


_MISSING = object()  # unlike every value


def differing_keys(
    old: Mapping[str, Any], new: Mapping[str, Any], ignored: Iterable[str] = ()
) -> list[str]:
    """Sorted keys in which two flat configs (see `flatten`) differ, also those that one lacks."""
    keys = sorted({*old, *new} - set(ignored))
    return [key for key in keys if old.get(key, _MISSING) != new.get(key, _MISSING)]
