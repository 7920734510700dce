"""What two starts of a run are compared by: config, classes, model, images and other inputs.

Where an input lies may change: data sets and files are known by fingerprints, parents by their
parameters. Inputs of runs that have no fingerprints yet are known by their place.
"""

import collections
import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hmar_jax import config_files
from hmar_jax.config_files import ConfigSchema
from hmar_jax.io.files import expand, is_local

_MOST_NAMED = 5  # differences of a kind that a message names
_MOST_CHARACTERS = 80  # of a value in a message
_WORDNET_ID = re.compile(r"n\d{8}")
# Keys of a model that do not say what it computes, or that the config has too.
_NOT_COMPARED = ("format", "family", "origin", "licence", "class_names", "sampling")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run is made from, beside its config.

    Attributes:
      data: the data set, as data/fingerprint.py: describe_data gives it; None: not compared.
      files: fingerprints of the other files that the config names, by key.
      fixed_files: keys of those that no extension of the run can change.
      parent_difference: how the parent that the config names differs from the run's own; None: it
        does not.
      labels_matter: False: the task trains on images alone, and its classes may change with them.
    """

    data: Mapping[str, Any] | None = None
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed_files: frozenset[str] = frozenset()
    parent_difference: str | None = None
    labels_matter: bool = True


def shorten(items: Iterable[str]) -> str:
    """Joins the first items, and counts the others."""
    items = list(items)
    more = len(items) - _MOST_NAMED
    return ", ".join(items[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 4]} ..."


def same_place(a: str, b: str) -> bool:
    """Whether two names of an input mean one place, such as "folder:images/" and "folder:images".

    Local paths are taken from the current directory.
    """
    return _place(a) == _place(b)


def _place(name: str) -> tuple[str, ...]:
    kind, colon, path = name.partition(":")
    if not colon or path.startswith("//"):  # a path alone, also gs://
        kind, path = "", name
    kind = {"records": "tokens"}.get(kind, kind)
    prefix, at, folder = path.partition("@") if kind == "tfds" else ("", "@", path)
    if not at or not folder:
        return kind, prefix
    if is_local(folder):
        return kind, prefix, os.path.abspath(expand(folder))
    return kind, prefix, folder.rstrip("/")


# Differences, each in words


def task_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Whether two configs are of one kind of training."""
    return [
        f"{key} is {old.get(key)!r} there and {new.get(key)!r} here"
        for key in ("family", "task")
        if old.get(key) != new.get(key)
    ]


def config_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], schema: ConfigSchema
) -> dict[str, str]:
    """Keys in which a run's config (ConfigSchema.upgrade) differs, without those of inputs.

    Returns:
      By key, the difference in words.
    """
    a, b = dict(config_files.flatten(old)), dict(config_files.flatten(new))
    show = lambda config, key: _shown(config[key]) if key in config else "missing (another version)"
    return {
        key: f"{key} is {show(a, key)} there and {show(b, key)} here"
        for key in config_files.differing_keys(a, b, schema.harmless() | schema.inputs())
    }


def class_differences(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """How the classes of a data set changed: names added and removed, or their order."""
    if tuple(old) == tuple(new):
        return []
    before, now = collections.Counter(old), collections.Counter(new)
    added = [repr(name) for name in (now - before)]
    removed = [repr(name) for name in (before - now)]
    found = [f"added {shorten(added)}"] if added else []
    found += [f"removed {shorten(removed)}"] if removed else []
    if not found:
        i = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
        found.append(f"the same names in another order: class {i} was {old[i]!r} and is {new[i]!r}")
    return found


def class_conflicts(model: Sequence[str], data: Sequence[str]) -> list[str]:
    """How the classes of a data set differ from those of a model, if both have names.

    The ids of WordNet (n01440764) are no names of their own: ImageNet's classes have both.
    """
    return class_differences(model, data) if are_names(model) and are_names(data) else []


def are_names(names: Sequence[str]) -> bool:
    """Whether there are names, and not only ids of WordNet."""
    return not all(map(_WORDNET_ID.fullmatch, names))


def data_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], words: tuple[str, str] = ("there", "here")
) -> list[str]:
    """How a data set changed, split by split; both as describe_data gives them.

    Args:
      words: which of the two a number belongs to.
    """
    before, now = words
    found = []
    for split, what in (("train", "training"), ("validate", "validation")):
        a, b = old.get(split), new.get(split)
        if a == b:
            continue
        if a is None or b is None:
            found.append(f"{what} images were {'added' if a is None else 'removed'}")
            continue
        if a["images"] != b["images"]:
            found.append(f"{a['images']} {what} images {before}, {b['images']} {now}")
        elif a.get("crops") != b.get("crops"):
            crops = [split.get("crops", "no encoded") for split in (a, b)]
            found.append(f"{crops[0]} crops of each {what} image {before}, {crops[1]} {now}")
        else:
            found.append(f"the {b['images']} {what} images have other names, sizes or labels")
    return found


def file_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], known: Mapping[str, str], inputs: Inputs
) -> dict[str, str]:
    """How the files that the config names differ.

    Args:
      old, new: configs of the run and of this start.
      known: the run's fingerprints of files, by key.

    Returns:
      By key, the difference in words.
    """
    a, b = dict(config_files.flatten(old)), dict(config_files.flatten(new))
    found = {}
    for key in sorted({*known, *inputs.files}):
        there, here = a.get(key) or "", b.get(key) or ""
        if key in known and key in inputs.files:
            if known[key] != inputs.files[key]:
                change = f"has other contents than {there!r} had"
                if same_place(there, here):
                    change = "was changed since the run started"
                found[key] = f"{key} {here!r} {change}"
        elif not same_place(there, here):
            found[key] = f"{key} is {_shown(there)} there and {_shown(here)} here"
    return found


def model_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], ignored: Iterable[str]
) -> list[str]:
    """Keys in which two models differ, of those that both have: versions name different ones.

    Args:
      ignored: keys of a config; those of its group `model` may differ.
    """
    a, b = dict(config_files.flatten(old)), dict(config_files.flatten(new))
    may_differ = {name.rpartition(".")[2] for name in ignored if name.startswith("model.")}
    return [
        f"{name} of the model is {_shown(a[name])} there and {_shown(b[name])} here"
        for name in sorted(a.keys() & b.keys())
        if name.partition(".")[0] not in _NOT_COMPARED
        and name.rpartition(".")[2] not in may_differ
        and a[name] != b[name]
    ]
