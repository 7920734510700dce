"""Starting stage 1 from the parameters of another model (fine-tuning).

All parameters but the class embeddings have the same shapes whatever the classes are. A class that
the other model has too, by name, keeps its embedding; so does the null class.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from hmar_jax import settings
from hmar_jax.class_names import find_names
from hmar_jax.errors import InputError
from hmar_jax.families.hmar.spec import HmarSpec
from hmar_jax.families.hmar.transformer import NextScaleTransformer
from hmar_jax.io import models
from hmar_jax.io.identity import are_names, shorten
from hmar_jax.training.task import Params
from hmar_jax.training.trainable import InitialParams, Parent

# What a config says of the network that is not found in its parameters.
_FREE = (
    *("num_classes", "dropout", "drop_path", "dtype", "attention", "remat"),
    *("init_adaln", "init_adaln_gamma", "init_head"),
)


def check_initial(initial: Parent) -> None:
    """Raises InputError unless the model has a transformer of stage 1."""
    spec, name = initial.spec, f"init_from {initial.name!r}"
    if not isinstance(spec, HmarSpec):
        raise InputError(f"{name} must be a transformer, a run of hmar train; got a {spec.kind}")
    if not spec.next_scale:
        raise InputError(f"{name} must have a stage 1; it is a stage 2 alone")


def initial_values(initial: Parent) -> dict[str, Any]:
    """Values of config keys that may be empty, by dotted key; see training/trainable.py."""
    check_initial(initial)
    spec = initial.spec
    groups = {"model": spec.transformer, "sampling": spec.sampling}
    return {"tokenizer": initial.name} | {
        f"{group}.{field.name}": getattr(values, field.name)
        for group, values in groups.items()
        for field in dataclasses.fields(values)
    }


def initial_params(
    spec: HmarSpec, initial: Parent, params: Params, rng: np.random.Generator
) -> InitialParams:
    """The parameters of stage 1, from those of another model.

    Args:
      spec: of the model that is trained.
      initial: the other one.
      params: its parameters, by part.
      rng: for the embeddings of new classes.

    Raises:
      InputError: the networks differ in more than their classes.
    """
    check_initial(initial)
    ours, theirs = spec.transformer, initial.spec.transformer
    expected = jax.eval_shape(NextScaleTransformer(ours).init, jax.random.key(0))
    taken = jax.tree.map(np.asarray, params["transformer"])
    rows = match_classes(
        initial.spec.class_names, spec.class_names, theirs.num_classes, ours.num_classes
    )
    old = taken["embed"]["class_emb"]  # (classes + 1, C)
    if old.shape[1] == ours.width:
        new = _class_embeddings(old, rows, ours.init_std, rng)
        taken["embed"] = taken["embed"] | {"class_emb": new}
    differing = settings.differences(theirs, ours, _FREE)
    models.check_shapes(
        expected,
        taken,
        f"init_from {initial.name!r} has another network than the config "
        f"({shorten(differing)}); configs/hmar.py:finetune takes the network from there",
    )
    taken = jax.tree.map(lambda shape, x: x.astype(shape.dtype), expected, taken)
    return InitialParams(taken, tuple(_notes(spec, initial, taken, rows, differing)))


def _class_embeddings(
    old: np.ndarray, rows: Sequence[int | None], std: float, rng: np.random.Generator
) -> np.ndarray:
    """Embeddings (classes + 1, C) float32: rows of the old ones, the last one of the null class.

    A new class begins near the null class, which is what the network draws without a class.
    """
    null = len(old) - 1
    new = old[[null if row is None else row for row in [*rows, null]]].astype(np.float32)
    is_new = [i for i, row in enumerate(rows) if row is None]
    new[is_new] += rng.normal(0, std, (len(is_new), old.shape[1]))
    return new


def match_classes(
    old: Sequence[str], new: Sequence[str], num_old: int, num_new: int
) -> list[int | None]:
    """For each new class the old one that it is, or None.

    Classes are the same that have the same name. Where one side has no names, they are the same if
    their number is.

    Args:
      old, new: names by id; may be empty.
      num_old, num_new: how many classes there are.
    """
    if tuple(old) == tuple(new) or not (are_names(old) and are_names(new)):
        return list(range(num_new)) if num_old == num_new else [None] * num_new
    found = [find_names(name, old) for name in new]
    return [ids[0] if len(ids) == 1 else None for ids in found]


def _notes(
    spec: HmarSpec,
    initial: Parent,
    params: Params,
    rows: Sequence[int | None],
    differing: Sequence[str],
) -> list[str]:
    """What was taken and what is new, in words."""
    count = sum(x.size for x in jax.tree.leaves(params))
    names = spec.class_names or tuple(map(str, range(len(rows))))
    kept, new = ([i for i, row in enumerate(rows) if (row is None) == new] for new in (False, True))
    num_taken = count - len(new) * spec.transformer.width
    notes = [
        f"starting from {initial.name} ({initial.spec.kind}): {num_taken:,} of {count:,} "
        "parameters are taken from there"
    ]
    if kept:
        by_name = are_names(initial.spec.class_names) and are_names(spec.class_names)
        how = "by name" if by_name else "by id, as one side has no names"
        notes.append(f"class embeddings taken {how}: {_listed([names[i] for i in kept])}")
    if new:
        hint = "" if are_names(names) else "; ids of WordNet are no names, see class_names.txt"
        notes.append(f"class embeddings that are new: {_listed([names[i] for i in new])}{hint}")
    if left := set(range(initial.spec.num_classes)) - set(rows):
        names = initial.spec.class_names or tuple(map(str, range(initial.spec.num_classes)))
        listed = _listed([names[i] for i in sorted(left)])
        notes.append(f"class embeddings of {initial.name} that are left out: {listed}")
    if initial.spec.masked_depth:
        notes.append(f"stage 2 of {initial.name} is not taken; train one on the result of this run")
    if differing:
        notes.append(f"settings of the network that differ: {shorten(differing)}")
    return notes


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} ({shorten(map(repr, names))})"
