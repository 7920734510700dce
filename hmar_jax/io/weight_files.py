"""Files of weights: the models that one contains, and which of them is taken.

A file has one state dict, or a trainer's checkpoint nests several: by mappings ({"model": ...,
"ema": ...}), by prefixes of their names ("ema.", "vae."), or both. Those of wrappers (DDP, FSDP,
torch.compile) may stand anywhere in a name.
"""

import dataclasses
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  numpy knows bfloat16 by it
import numpy as np
import safetensors

from hmar_jax.errors import InputError
from hmar_jax.io import torch_weights, weight_formats

StateDict = Mapping[str, np.ndarray]

# Parts of names that DistributedDataParallel, torch.compile, FSDP and activation checkpointing add.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Moments of an optimizer may have the names of the weights.
_OPTIMIZER = re.compile(r"(^|[._])(opt|optim\w*|exp_avg\w*|momentum\w*)([._]|$)", re.IGNORECASE)
_AVERAGED = re.compile(r"(^|[._])(ema|averaged?)([._]|$)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A state dict in a file.

    Attributes:
      place: where it is nested, such as "trainer.ema"; "" where the file is this state dict.
      tensors: by name without the place and without wrappers, as the file's reader gives them.
    """

    place: str
    tensors: Mapping[str, Any]

    def arrays(self) -> StateDict:
        """Its tensors as numpy arrays, floats as float32.

        Raises:
          InputError: a tensor is of a type that is not supported.
        """
        return {name: _to_array(name, value) for name, value in self.tensors.items()}


def find_models(
    path: str | os.PathLike, markers: Mapping[str, str]
) -> dict[str, list[StoredModel]]:
    """Reads a file of weights and finds the models in it.

    Args:
      path: a file of torch.save, a .safetensors file, or the .safetensors.index.json of a model in
        parts.
      markers: for each kind of model, a parameter name that only its state dicts contain.

    Returns:
      For each kind that is found, its state dicts in the file's order.

    Raises:
      InputError: the file cannot be read, or contains none of the models.
      ImportError: the file requires torch, which is not installed.
    """
    form = weight_formats.recognize(path)
    if form == weight_formats.TORCH:
        content = torch_weights.load_torch_file(path)
    elif form == weight_formats.SAFETENSORS:
        content = _load_safetensors(path)
    else:
        content = {
            name: array
            for part, names in weight_formats.read_index(path).items()
            for name, array in _load_safetensors(part, names).items()
        }
    found: dict[str, list[StoredModel]] = {}
    for mapping, place in _mappings(content):
        for kind, model in _models_of(mapping, place, markers):
            found.setdefault(kind, []).append(model)
    if not found:
        looked_for = ", ".join(f"{name!r} of a {kind}" for kind, name in markers.items())
        raise InputError(
            f"{path}: contains no model of a known kind (looked for {looked_for}); it has "
            f"{_outline(content)}"
        )
    return found


def choose_model(
    path: str | os.PathLike, models: list[StoredModel], weights: str | None, required: bool = True
) -> StoredModel:
    """One of the models of a kind in a file.

    Args:
      models: what find_models found, at least one.
      weights: the place of one, or a part of it: "ema" stands for "trainer.ema". None: the averaged
        one, otherwise the first; a warning says which one it is and what else is there.
      required: whether a file without such a place is an error.

    Raises:
      InputError: no place or several places have the name.
    """
    if weights is not None:
        named = [m for m in models if weights == m.place]
        named = named or [m for m in models if weights in m.place.split(".")]
        if len(named) == 1:
            return named[0]
        if named or required:
            there = [m.place for m in models if m.place]
            known = f"one of {', '.join(there)}" if there else "left out: the file has one model"
            raise InputError(f"{path}: weights must be {known}; got {weights!r}")
    averaged = [m for m in models if _AVERAGED.search(m.place)]
    taken = (averaged or models)[0]
    if len(models) > 1:
        name = lambda model: model.place or "(outermost)"
        others = ", ".join(name(model) for model in models if model is not taken)
        warnings.warn(
            f"{path}: took the weights {name(taken)}; it also has {others}, which the option "
            "weights chooses",
            stacklevel=2,
        )
    return taken


def load_state_dicts(
    path: str | os.PathLike, markers: Mapping[str, str], weights: str | None = None
) -> dict[str, StateDict]:
    """The state dicts of a file: for each kind that is found, the one that choose_model takes."""
    found = find_models(path, markers)
    return {kind: choose_model(path, m, weights, False).arrays() for kind, m in found.items()}


# Finding


def _mappings(content: Any) -> Iterator[tuple[Mapping, tuple[str, ...]]]:
    """All mappings in nested mappings, each with its place, outer ones first; no optimizer's."""
    waiting: list[tuple[Any, tuple[str, ...]]] = [(content, ())]
    seen: set[int] = set()  # a pickle may nest a mapping in itself
    while waiting:
        node, place = waiting.pop(0)
        if not isinstance(node, Mapping) or id(node) in seen:
            continue
        seen.add(id(node))
        yield node, place
        waiting += [
            (value, (*place, str(key)))
            for key, value in node.items()
            if not _OPTIMIZER.search(str(key))
        ]


def _models_of(
    mapping: Mapping, place: tuple[str, ...], markers: Mapping[str, str]
) -> Iterator[tuple[str, StoredModel]]:
    """The models whose tensors one mapping has, with their kinds."""
    names = {
        tuple(name.split(".")): value
        for name, value in mapping.items()
        if isinstance(name, str) and hasattr(value, "shape")
    }
    prefixes: dict[tuple[str, ...], str] = {}
    for kind, marker in markers.items():  # the first kind takes a prefix
        for parts in names:
            prefix = _prefix(parts, tuple(marker.split(".")))
            if prefix is not None:
                prefixes.setdefault(prefix, kind)
    tensors: dict[tuple[str, ...], dict[str, Any]] = {prefix: {} for prefix in prefixes}
    for parts, value in names.items():
        ends = range(len(parts), -1, -1)
        prefix = next((parts[:end] for end in ends if parts[:end] in prefixes), None)
        if prefix is not None:
            own = (part for part in parts[len(prefix) :] if part not in _WRAPPERS)
            tensors[prefix][".".join(own)] = value
    for prefix, kind in prefixes.items():
        yield kind, StoredModel(_describe_place((*place, *prefix)), tensors[prefix])


def _prefix(parts: tuple[str, ...], marker: tuple[str, ...]) -> tuple[str, ...] | None:
    """The parts of a name before the marker, with which it ends; wrappers inside do not count."""
    rest, wanted = list(parts), list(marker)
    while wanted:
        if not rest:
            return None
        part = rest.pop()
        if part == wanted[-1]:
            wanted.pop()
        elif part not in _WRAPPERS:
            return None
    while rest and rest[-1] in _WRAPPERS:  # one prefix for names with and without inner wrappers
        rest.pop()
    return tuple(rest)


def _describe_place(parts: tuple[str, ...]) -> str:
    return ".".join(weight_formats.printable(part) for part in parts if part not in _WRAPPERS)


def _outline(content: Any) -> str:
    """The first names of a file's content, for an error."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    names = [weight_formats.printable(name) for name in content]
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return shown or "nothing"


# Reading tensors


def _load_safetensors(path: str | os.PathLike, names: list[str] | None = None) -> dict:
    """The tensors of a .safetensors file; of all names, or of the given ones."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            there = list(file.keys())
            for name in there:
                torch_weights.check_dtype(name, file.get_slice(name).get_dtype())
            missing = sorted(set(names or ()) - set(there))
            if missing:
                raise InputError(f"{path}: has no tensor {missing[0]!r}, which the index names")
            return {name: file.get_tensor(name) for name in names or there}
    except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: is damaged or cut short ({reason}); download it again") from None


def _to_array(name: str, value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        return torch_weights.to_numpy(name, value)
    array = np.asarray(value)
    floating = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
    return array.astype(np.float32, copy=False) if floating else array
