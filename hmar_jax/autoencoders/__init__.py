"""Autoencoders: images to latents and back, and how they are trained.

`AUTOENCODERS` names every kind. Its modules are imported when they are asked for. Each has an
attribute `AUTOENCODER`: a class that base.py's Autoencoder protocol describes.
"""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hmar_jax.errors import InputError

if TYPE_CHECKING:
    from hmar_jax.autoencoders.base import Autoencoder, AutoencoderConfig

AUTOENCODERS = {"vq": "hmar_jax.autoencoders.vq"}  # kind -> module


def get_autoencoder_class(kind: str) -> "type[Autoencoder]":
    """The class of a kind of autoencoder.

    Raises:
      InputError: there is no such kind.
    """
    if kind not in AUTOENCODERS:
        raise InputError(f"autoencoder kind must be one of {', '.join(AUTOENCODERS)}; got {kind!r}")
    return importlib.import_module(AUTOENCODERS[kind]).AUTOENCODER


def make_autoencoder(config: "AutoencoderConfig") -> "Autoencoder":
    """The autoencoder of a config of any kind."""
    return get_autoencoder_class(config.kind)(config)


def config_from_json(data: Mapping[str, Any]) -> "AutoencoderConfig":
    """The config of an autoencoder from {"kind": "vq", ...}, as base.config_to_json writes it.

    Raises:
      InputError: the kind is unknown, or a value is out of range.
      TypeError: a key is unknown.
    """
    values = dict(data)
    return get_autoencoder_class(values.pop("kind", "")).config_class(**values)
