"""What a config of a VQ tokenizer trains: see training/trainable.py."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hmar_jax import settings
from hmar_jax.autoencoders.base import AUTOENCODER, AutoencoderSpec
from hmar_jax.autoencoders.perceptual import load_perceptual, perceptual_distance
from hmar_jax.autoencoders.vq import TokenizerConfig, VQAutoencoder
from hmar_jax.autoencoders.vq_task import VQRecipe, VQTask
from hmar_jax.config_files import ConfigSchema
from hmar_jax.data.transforms import Transform
from hmar_jax.errors import InputError
from hmar_jax.io import models
from hmar_jax.io.identity import shorten
from hmar_jax.parallel.sharding import MeshConfig
from hmar_jax.settings import Settings, setting
from hmar_jax.training.config import DataConfig, TrainConfig
from hmar_jax.training.task import Params
from hmar_jax.training.trainable import (
    DataInfo,
    InitialParams,
    Parent,
    TaskKind,
    TaskSetup,
)

_FREE = ("dropout", "dtype")  # what a config says of the network beside its parameters


@dataclasses.dataclass(frozen=True)
class _VQKeys(Settings):
    """What a config has beside the keys of every run."""

    perceptual_network: str = setting(
        "", "The .npz file of the perceptual loss, see autoencoders/perceptual.py.", is_input=True
    )
    init_from: str = setting(
        "",
        "The model whose tokenizer training starts from: a run, a model directory or a bundled "
        "model. Empty: random parameters.",
        is_input=True,
    )


TASKS = {
    "tokenizer": TaskKind(
        ConfigSchema(
            {
                "": (TrainConfig, _VQKeys),
                "data": (DataConfig,),
                "data.transform": (Transform,),
                "mesh": (MeshConfig,),
                "model": (TokenizerConfig,),
                "recipe": (VQRecipe,),
            }
        ),
        command="train-tokenizer",
        initial_key="init_from",
    )
}


def image_side(config: Any, parent: Parent | None) -> int:
    del parent
    return settings.from_group(TokenizerConfig, config.model).image_side


def make_task(config: Any, parent: Parent | None, data: DataInfo) -> TaskSetup:
    """A tokenizer, from a checked config."""
    del parent
    if config.steps < 1:
        raise InputError(f"config.steps must be at least 1; got {config.steps}")
    model = settings.from_group(TokenizerConfig, config.model)
    recipe = settings.from_group(VQRecipe, config.recipe)
    _check_start_step(config.init_from, recipe.vq_start_step)
    task = VQTask(model, config.steps, config.batch_size, recipe)
    origin = f"trained on {data.source}"
    spec = AutoencoderSpec(model, data.class_names, origin)
    return TaskSetup(task, spec, warnings=_warnings(task, data))


def _check_start_step(init_from: str, start_step: int) -> None:
    if init_from and start_step:
        raise InputError(
            f"recipe.vq_start_step must be 0 with config.init_from, whose codebook would be "
            f"replaced at that step; got {start_step}"
        )
    if not init_from and not start_step:
        raise InputError(
            "recipe.vq_start_step must be at least 1 without config.init_from: the codebook is "
            "initialized just before that step; got 0"
        )


def _warnings(task: VQTask, data: DataInfo) -> tuple[str, ...]:
    model, recipe = task.tokenizer, task.recipe
    found = []
    if recipe.vq_start_step >= task.steps:
        found.append(
            f"recipe.vq_start_step={recipe.vq_start_step} should be less than steps={task.steps}: "
            "this tokenizer will not learn to quantize"
        )
    tokens = data.num_images * model.scale_list.length
    if model.vocab_size > tokens:
        found.append(
            f"model.vocab_size={model.vocab_size} should be at most {tokens}, the tokens of all "
            f"{data.num_images} images: most codebook entries will not be used"
        )
    return tuple(found)


def frozen_params(config: Any, parent: Parent | None, parent_params: Params, kind: str) -> Params:
    """The network of the perceptual loss, where the recipe has that loss."""
    del parent, parent_params, kind
    if not config.recipe.perceptual_weight:
        return {}
    if not config.perceptual_network:
        raise InputError(
            "config.perceptual_network must name the .npz file of the network, as "
            "config.recipe.perceptual_weight is not 0"
        )
    network = load_perceptual(config.perceptual_network)
    side = image_side(config, None)
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    # Are they large enough for the network's pools?
    jax.eval_shape(perceptual_distance, network, images, images)
    return {"perceptual": network}


def initial_values(config: Any, initial: Parent) -> dict[str, Any]:
    """Values of config keys that may be empty where a tokenizer starts from a model's."""
    del config
    tokenizer = _tokenizer_of(initial)
    return {f"model.{f.name}": getattr(tokenizer, f.name) for f in dataclasses.fields(tokenizer)}


def initial_params(config: Any, setup: TaskSetup, initial: Parent, params: Params) -> InitialParams:
    """The tokenizer of a model, of any family."""
    ours, theirs = setup.spec.autoencoder, _tokenizer_of(initial)
    differing = settings.differences(theirs, ours, _FREE)
    expected = jax.eval_shape(VQAutoencoder(ours).init, jax.random.key(0))
    models.check_shapes(
        expected,
        params[AUTOENCODER],
        f"init_from {initial.name!r} has another network than the config "
        f"({shorten(differing)}); configs/tokenizer.py:finetune takes the network from there",
    )
    taken = jax.tree.map(lambda x, y: np.asarray(y, x.dtype), expected, params[AUTOENCODER])
    count = sum(x.size for x in jax.tree.leaves(taken))
    notes = [
        f"starting from {initial.name} (tokenizer): all {count:,} parameters are taken from there"
    ]
    if config.recipe.adversarial_weight:
        notes.append("the discriminator is new")
    if differing:
        notes.append(f"settings of the network that differ: {shorten(differing)}")
    return InitialParams(taken, tuple(notes))


def _tokenizer_of(initial: Parent) -> TokenizerConfig:
    found = initial.spec.autoencoder
    if not isinstance(found, TokenizerConfig):
        raise InputError(
            f"init_from {initial.name!r} must have a VQ tokenizer; its autoencoder is of the kind "
            f"{found.kind!r}"
        )
    return found


def planning_parent(config: Any, parent_config: Any = None) -> None:
    """A tokenizer trains on top of nothing."""
    del config, parent_config
