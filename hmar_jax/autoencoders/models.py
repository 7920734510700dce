"""Autoencoders as models by themselves: reading, describing, training, whatever their kind."""

import importlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from hmar_jax.autoencoders import AUTOENCODERS, make_autoencoder
from hmar_jax.autoencoders.base import AUTOENCODER, AutoencoderSpec
from hmar_jax.training.task import Params

DEFAULT_KIND = "vq"  # of runs that name none
TASK = "tokenizer"  # config.task of runs that train an autoencoder


def get_trainable(kind: str) -> Any:
    """What training asks of a kind of autoencoder, see training/trainable.py."""
    return importlib.import_module(f"{AUTOENCODERS[kind]}_training")


def is_autoencoder(data: Any) -> bool:
    """Whether the contents of a config.json are those of an autoencoder alone."""
    if not isinstance(data, Mapping) or "family" in data:
        return False
    return "transformer" not in data or data["transformer"] is None


def init_params(spec: AutoencoderSpec, rng: jax.Array) -> Params:
    """Random parameters, as part of a model."""
    return {AUTOENCODER: make_autoencoder(spec.autoencoder).init(rng)}


def describe(config: Any, params: Params) -> list[tuple[str, str]]:
    """Rows of `hmar info` on a model's autoencoder."""
    autoencoder = make_autoencoder(config)
    count = sum(np.size(x) for x in jax.tree.leaves(params.get(AUTOENCODER, {})))
    return autoencoder.describe(count)
