"""Which stored array each array of a state takes, also where the state has changed since."""

import importlib.resources
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from hmar_jax.errors import InputError
from hmar_jax.io import arrays

# The parts that no checkpoint may lack; any other may be begun anew where a run is changed.
_LASTING = ("step", "params", "opt_state")
_STAGES = "opt_state"  # the part whose second-level names are numbers of stages


class Match(NamedTuple):
    """How a checkpoint and a state fit together.

    Attributes:
      stored: the metadata of the arrays to read, a part of the stored tree.
      names: for each array of the state to restore, by name, the stored array's name. The others
        are to be begun anew.
    """

    stored: Any
    names: dict[str, str]


def match(
    stored: Any,
    abstract_state: Any,
    what: str,
    former_names: Mapping[str, str] | None = None,
    parts_may_differ: bool = False,
) -> Match:
    """Compares the stored tree with a state.

    Args:
      stored: metadata of the stored arrays, arrays.read_metadata.
      abstract_state: tree of arrays or of jax.ShapeDtypeStruct.
      what: names the checkpoint in errors.
      former_names: former name -> present name of a field; None: those of the first version.
      parts_may_differ: of a run whose config was changed. Then the state may have parts, such as a
        moving average of the parameters, that the checkpoint lacks or has otherwise: they are begun
        anew; parts of the checkpoint that the state lacks are not read; and stages of the optimizer
        that have no state, such as clipping, may be there or not.

    Raises:
      InputError: an array is missing, unknown, or of another shape.
    """
    former_names = first_version_names() if former_names is None else former_names
    names = _stored_names(stored, abstract_state, former_names)
    if parts_may_differ:
        found = arrays.leaves_by_name(stored)
        names = _align_stages(names, found)
        parts = {_part(name) for name in (*names, *found)}
        differing = {
            part for part in parts if _leaves(names.values(), part) != _leaves(found, part)
        }
        differing -= set(_LASTING)
        names = {name: old for name, old in names.items() if _part(name) not in differing}
        stored = {part: tree for part, tree in stored.items() if part not in differing}
    _check_same_tree(stored, abstract_state, names, what)
    return Match(stored, names)


def first_version_names() -> dict[str, str]:
    """Names of the first version's states -> their present names.

    They are kept in a data file because the code no longer uses the former words.
    """
    path = importlib.resources.files("hmar_jax.io") / "first_version_names.json"
    return json.loads(path.read_text())


def _part(name: str) -> str:
    return name.partition("/")[0]


def _leaves(names, part: str) -> set[str]:
    return {name for name in names if _part(name) == part}


def _align_stages(names: Mapping[str, str], found: Mapping[str, Any]) -> dict[str, str]:
    """The names with the stored numbers of the optimizer's stages, where both have as many."""

    def stages(of) -> list[str]:
        numbers = {name.split("/")[1] for name in _leaves(of, _STAGES) if "/" in name}
        return sorted(numbers, key=lambda text: (len(text), text))

    present, former = stages(names.values()), stages(found)
    if len(present) != len(former) or present == former:
        return dict(names)
    number = dict(zip(present, former, strict=True))

    def aligned(name: str) -> str:
        part, *rest = name.split("/")
        return "/".join([part, number[rest[0]], *rest[1:]]) if part == _STAGES and rest else name

    return {name: aligned(old) for name, old in names.items()}


def _stored_names(
    stored: Any, abstract_state: Any, former_names: Mapping[str, str]
) -> dict[str, str]:
    """For each array of the abstract state, by name, the name that the checkpoint has for it."""
    prefixes = set()
    for name in arrays.leaves_by_name(stored):
        keys = name.split("/")
        prefixes |= {"/".join(keys[: n + 1]) for n in range(len(keys))}

    def stored_name(name: str) -> str:
        found: list[str] = []
        for key in name.split("/"):
            candidates = [key, *(old for old, new in former_names.items() if new == key)]
            found.append(next((k for k in candidates if "/".join([*found, k]) in prefixes), key))
        return "/".join(found)

    return {name: stored_name(name) for name in arrays.leaves_by_name(abstract_state)}


def _check_same_tree(stored: Any, abstract_state: Any, names: dict[str, str], what: str) -> None:
    """Raises InputError naming the first leaf that is missing, unknown, or of another shape."""
    found, expected = arrays.leaves_by_name(stored), arrays.leaves_by_name(abstract_state)
    what = f"{what} does not match this configuration"
    for name, old in names.items():
        if old not in found:
            raise InputError(f"{what}: it has no {name}")
        shapes = tuple(found[old].shape), tuple(expected[name].shape)
        if shapes[0] != shapes[1]:
            raise InputError(f"{what}: {name} has shape {shapes[0]}, not {shapes[1]}")
    unknown = sorted(found.keys() - set(names.values()))
    if unknown:
        raise InputError(f"{what}: it has {unknown[0]}, which is unknown here")
