"""The registry of model families: the only file that names every family.

A family is a package with two modules, imported when they are needed:
  options.py  SamplingConfig, EditingConfig, ConvertConfig: settings, without heavy imports
  family.py   what families/base.py's `Family` asks for
"""

import importlib
from collections.abc import Mapping
from typing import Any

from hmar_jax.autoencoders import AUTOENCODERS
from hmar_jax.errors import InputError

FAMILIES = {"hmar": "hmar_jax.families.hmar"}
DEFAULT_FAMILY = "hmar"  # of files that name none


def get_family(name: str) -> Any:
    """The module of a family, see families/base.py; InputError if there is none of this name."""
    return importlib.import_module(f"{_package(name)}.family")


def get_options(name: str) -> Any:
    """The module with a family's settings; quick to import."""
    return importlib.import_module(f"{_package(name)}.options")


def _package(name: str) -> str:
    if name not in FAMILIES:
        raise InputError(f"family must be one of {', '.join(FAMILIES)}; got {name!r}")
    return FAMILIES[name]


def get_trainable(name: str, task: str) -> Any:
    """The family or the kind of autoencoder that a config trains: a module with TASKS.

    Args:
      name: config.family, a name in FAMILIES or AUTOENCODERS; empty in older runs.
      task: config.task, which then tells.
    """
    from hmar_jax.autoencoders import models  # imports JAX

    if not name:
        name = models.DEFAULT_KIND if task == models.TASK else DEFAULT_FAMILY
    if name in AUTOENCODERS:
        return models.get_trainable(name)
    if name not in FAMILIES:
        known = ", ".join([*FAMILIES, *AUTOENCODERS])
        raise InputError(f"config.family must be one of {known}; got {name!r}")
    return get_family(name)


def spec_from_json(data: Any, where: str) -> Any:
    """The spec in a model's config.json: of a family, or of an autoencoder alone.

    Args:
      where: names the file in errors.

    Raises:
      InputError: another format, or unknown or missing keys.
    """
    from hmar_jax.autoencoders import base, models

    if models.is_autoencoder(data):
        return base.AutoencoderSpec.from_json(data, where)
    name = data.get("family", DEFAULT_FAMILY) if isinstance(data, Mapping) else DEFAULT_FAMILY
    return get_family(name).Spec.from_json(data, where)
