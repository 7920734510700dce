"""The registry of model families: the only file that names every family.

A family is a package with two modules, which are imported on first use:
  options.py  SamplingConfig, EditingConfig, ConvertConfig: settings, without heavy imports
  family.py   the attributes of the protocol `Family` in families/base.py
"""

import importlib
from collections.abc import Mapping
from typing import Any

from hmar_jax.autoencoders import AUTOENCODERS
from hmar_jax.errors import InputError

FAMILIES = {"hmar": "hmar_jax.families.hmar"}
DEFAULT_FAMILY = "hmar"  # of configs and model files that name no family


def get_family(name: str) -> Any:
    """Imports the family.py of a family, a module as `Family` in families/base.py describes.

    Raises:
      InputError: no family has this name.
    """
    return importlib.import_module(f"{_package(name)}.family")


def get_options(name: str) -> Any:
    """Imports the options.py of a family, a module with its settings; quick to import.

    Raises:
      InputError: no family has this name.
    """
    return importlib.import_module(f"{_package(name)}.options")


def option_classes(kind: str) -> dict[str, type]:
    """The classes of one kind that the families declare, by family.

    Args:
      kind: "SamplingConfig", "EditingConfig" or "ConvertConfig"; a family may have none.
    """
    classes = {name: getattr(get_options(name), kind, None) for name in FAMILIES}
    return {name: cls for name, cls in classes.items() if cls is not None}


def _package(name: str) -> str:
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(f"family must be one of {', '.join(FAMILIES)}; got {name!r}")
    return FAMILIES[name]


def get_trainable(name: str, task: str) -> Any:
    """Imports what a config trains: a module as training/trainable.py's `Trainable` describes.

    Args:
      name: config.family, a name in FAMILIES or AUTOENCODERS; empty in runs of the first version.
      task: config.task, which decides where the name is empty.

    Raises:
      InputError: neither a family nor a kind of autoencoder has this name.
    """
    from hmar_jax.autoencoders import models  # imports JAX

    if not name:
        name = models.DEFAULT_KIND if task == models.TASK else DEFAULT_FAMILY
    if isinstance(name, str) and name in AUTOENCODERS:
        return models.get_trainable(name)
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join([*FAMILIES, *AUTOENCODERS])
        raise InputError(f"config.family must be one of {known}; got {name!r}")
    return get_family(name)


def spec_from_json(data: Any, where: str) -> Any:
    """Reads the spec in a model's config.json: of a family, or of an autoencoder alone.

    Args:
      data: the parsed file.
      where: how errors name the file.

    Raises:
      InputError: another format, or unknown or missing keys.
    """
    from hmar_jax.autoencoders import base, models

    if models.is_autoencoder(data):
        return base.AutoencoderSpec.from_json(data, where)
    name = data.get("family", DEFAULT_FAMILY) if isinstance(data, Mapping) else DEFAULT_FAMILY
    return get_family(name).Spec.from_json(data, where)
