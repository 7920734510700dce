"""Starting a run from the parameters of another model: what config.init_from means.

A config may leave keys empty that follow from that model (ConfigSchema.leave_empty). A run's
config.json has their values, and the fingerprint of the parameters.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from hmar_jax import loading
from hmar_jax.autoencoders import make_autoencoder
from hmar_jax.autoencoders.base import AUTOENCODER
from hmar_jax.config_files import flatten, set_value
from hmar_jax.errors import InputError
from hmar_jax.io import checkpoints, files, identity, runs
from hmar_jax.training.trainable import InitialParams, Parent, TaskKind, TaskSetup, Trainable


@dataclasses.dataclass(frozen=True)
class InitialModel:
    """The model that a run starts from.

    Attributes:
      name: as the config has it.
      load: reads spec and parameters; the second call takes no time.
      saved: the contents of the run's config.json, where the run has a checkpoint.
    """

    name: str
    load: Callable[[], tuple[Any, dict]]
    saved: Mapping[str, Any] | None = None

    @property
    def parent(self) -> Parent:
        """Name and spec; reads the model."""
        return Parent(self.name, self.load()[0])


def complete(
    config: ConfigDict, trainable: Trainable, kind: TaskKind, workdir: str | None = None
) -> tuple[ConfigDict, InitialModel | None]:
    """A copy of a config whose empty keys have values, and the model that the run starts from.

    Args:
      config: not checked yet.
      workdir: of a run. One with a checkpoint has its values already; the model is not read again.

    Raises:
      InputError: keys are empty and there is no config.init_from; or there is no such model, or it
        is the run itself.
    """
    completed = config.copy_and_resolve_references()
    key = kind.initial_key
    if key is None:
        return completed, None
    name, empty = config.get(key), kind.schema.empty_keys(config)
    if not name:
        if empty:
            raise InputError(
                f"config.{key} is empty; this config starts from a model, from which it takes "
                f"{identity.shorten(empty)}: give --config.{key}=MODEL, a run, a model directory "
                "or a bundled model"
            )
        return completed, None
    if workdir and identity.same_place(name, workdir):
        raise InputError(
            f"config.{key} must be another model than the run itself; got {name!r}, the --workdir; "
            "to continue that run with changed values, give its own config and --extend"
        )
    saved = runs.read(workdir) if workdir else None
    if saved is not None and not checkpoints.steps_of_run(files.absolute(workdir or "")):
        saved = None  # it has to start from the model again
    model = InitialModel(name, functools.cache(lambda: loading.load_spec_and_params(name)), saved)
    if saved is not None:
        values = dict(flatten(kind.schema.upgrade(saved.get("config", {}))))
    else:
        values = dict(trainable.initial_values(config, model.parent))
    if kind.parent_key and not config[kind.parent_key]:
        empty.append(kind.parent_key)
    for filled in empty:
        if values.get(filled) is not None:
            set_value(completed, filled, values[filled])
    return completed, model


def fingerprint(model: InitialModel, key: str) -> str:
    """Of the parameters that a run starts from. A run that has them by this name is not read."""
    if model.saved is not None:
        known = model.saved.get("files", {}).get(key)
        former = model.saved.get("config", {}).get(key, "")
        if known and identity.same_place(former, model.name):
            return known
    return loading.fingerprint(*model.load())


def with_provenance(spec: Any, model: InitialModel) -> Any:
    """The spec of a model that is trained from another one, with the origin and licence of both."""
    if model.saved is not None:
        own = model.saved.get("model", {})
        kept = {name: own[name] for name in ("origin", "licence") if name in own}
        return dataclasses.replace(spec, **kept)
    theirs = model.load()[0]
    licences = dict.fromkeys(text for text in (theirs.licence, spec.licence) if text)
    origin = f"{spec.origin}, from the parameters of {model.name}"
    if theirs.origin:
        origin += f" ({theirs.origin})"
    return dataclasses.replace(spec, origin=origin, licence="; ".join(licences))


def tokenizer_warnings(
    model: InitialModel, parent: Parent | None, parent_params: Mapping[str, Any]
) -> list[str]:
    """Whether the parent's autoencoder is another one than that of the model to start from."""
    if parent is None or model.saved is not None or model.name == parent.name:
        return []
    spec, params = model.load()
    prints = [
        make_autoencoder(spec.autoencoder).fingerprint(params[AUTOENCODER])
        for spec, params in ((spec, params), (parent.spec, parent_params))
    ]
    if prints[0] == prints[1]:
        return []
    return [
        f"{parent.name} is not the tokenizer of init_from {model.name!r}: its tokens mean "
        "something else, which training has to learn"
    ]


def initial_params(
    config: ConfigDict, trainable: Trainable, setup: TaskSetup, model: InitialModel
) -> Callable[[], InitialParams]:
    """Makes the parameters that a run starts from; they are checked now if the run is new.

    Raises:
      InputError: they do not fit what is trained.
    """

    @functools.cache
    def make() -> InitialParams:
        spec, params = model.load()
        return trainable.initial_params(config, setup, Parent(model.name, spec), params)

    if model.saved is None:
        make()
    return make
