"""Config files: reading configs/NAME.py:SPEC, overriding single values, and what must not change in a run.

A config file is a Python file with get_config(spec) -> ml_collections.ConfigDict. Where a path is not found from the current
directory, the file of the same name that comes with the package is taken.
"""

import ast
import importlib.util
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from hmar_jax.errors import InputError

# May differ between the runs of one directory: they change what is shown and kept, not what is computed.
HARMLESS = (
    "log_every",
    "eval_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_best",
    "data.threads",
    "data.workers",
    "data.in_memory",
    # Where and in how many parts it is computed: no more than the order of sums.
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "accumulate",
    "model.remat",
)


def load_config(argument: str) -> ConfigDict:
    """From "configs/hmar.py:digits,seed=1": the file's get_config("digits,seed=1").

    Raises:
      InputError: no such file, no such name in it, or an unknown key after the name.
    """
    path, _, spec = argument.partition(":")
    file = pathlib.Path(path)
    if not os.path.isfile(file):  # unlike Path.is_file, False for any nonsense
        file = _packaged(file)
    if not file or file.suffix != ".py":
        raise InputError(f"config {path!r}: no such Python file (such as configs/hmar.py:digits)")
    loader = importlib.util.spec_from_file_location(f"hmar_config_{file.stem}", file)
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InputError(f"config {path!r}: the file has no get_config(spec)")
    config = module.get_config(spec)
    return config.lock()


def _packaged(file: pathlib.Path) -> pathlib.Path | None:
    """The config of this name that was installed with the package, or lies beside it in a checkout."""
    package = importlib.util.find_spec("hmar_jax.packaged_configs")
    folders = [pathlib.Path(p) for p in package.submodule_search_locations] if package else []
    folders.append(pathlib.Path(__file__).resolve().parent.parent / "configs")
    return next(
        (folder / file.name for folder in folders if os.path.isfile(folder / file.name)), None
    )


def parse_spec(spec: str, names: Mapping[str, Any] | Iterable[str]) -> tuple[str, dict[str, str]]:
    """From "NAME,key=value,…": the name and the pairs.

    Raises:
      InputError: the name is not among `names`, or a part has no "=".
    """
    name, *pairs = [part.strip() for part in spec.split(",")]
    if name not in names:
        raise InputError(f"config name {name!r}: known are {', '.join(names)}")
    for pair in pairs:
        if "=" not in pair:
            raise InputError(f"{pair!r} after the config name {name!r}: key=value is wanted")
    return name, dict(pair.split("=", 1) for pair in pairs)


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets a dotted key from text, in the type of the value that is there.

    Raises:
      InputError: there is no such key, or the text is no value of its type.
    """
    *parents, last = key.split(".")
    node: Any = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, ConfigDict) else None
    if not isinstance(node, ConfigDict) or last not in node:
        where = node if isinstance(node, ConfigDict) else config
        raise InputError(
            f"config key {key!r}: unknown; there are {', '.join(sorted(where.keys()))}"
        )
    old = node[last]
    if isinstance(old, ConfigDict):
        raise InputError(
            f"config key {key!r} is a group; its keys are {', '.join(f'{key}.{k}' for k in sorted(old.keys()))}"
        )
    node[last] = _convert(key, text, old)


def _convert(key: str, text: str, old: Any) -> Any:
    kind = type(old)
    wrong = InputError(
        f"config key {key}={text!r}: a value of type {kind.__name__} is wanted, such as {old!r}"
    )
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise wrong
        return text.lower() == "true"
    try:
        if kind is tuple:
            items = text.strip("()[] ")
            value = tuple(
                ast.literal_eval(item.strip()) for item in items.split(",") if item.strip()
            )
        else:
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise wrong from None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (
        kind is tuple and {type(item) for item in value} - {type(item) for item in old}
    ):
        raise wrong
    return value


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Plain JSON types, as a run directory keeps it."""
    return json.loads(json.dumps(config.to_dict()))


def build(cls, values: ConfigDict, **more):
    """A frozen dataclass from a group of the config.

    Raises:
      InputError: the group has a key that the class does not know.
    """
    known = set(cls.__dataclass_fields__)
    unknown = sorted(set(values.keys()) - known)
    if unknown:
        raise InputError(
            f"config key {unknown[0]!r}: unknown; there are {', '.join(sorted(known))}"
        )
    return cls(**values.to_dict(), **more)


_MISSING = object()  # unlike every value


def first_difference(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> str | None:
    """Names the first key, other than the harmless ones, in which two configs differ, with both values."""
    for key in sorted(set(old) | set(new)):
        name, a, b = f"{prefix}{key}", old.get(key, _MISSING), new.get(key, _MISSING)
        if isinstance(b, Mapping) and key not in old:  # a run of a version without this group
            a = {}
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found = first_difference(a, b, f"{name}.")
            if found:
                return found
        elif a != b and name not in HARMLESS:
            told = [
                f"{c.get(key)!r}" if key in c else "missing (another version)" for c in (old, new)
            ]
            return f"{name} is {told[0]} there and {told[1]} here"
    return None
