"""What a config of a VQ tokenizer trains: see training/trainable.py."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hmar_jax import settings
from hmar_jax.autoencoders.base import AutoencoderSpec
from hmar_jax.autoencoders.perceptual import load_perceptual, perceptual_distance
from hmar_jax.autoencoders.vq import TokenizerConfig
from hmar_jax.autoencoders.vq_task import VQRecipe, VQTask
from hmar_jax.config_files import ConfigSchema
from hmar_jax.data.transforms import Transform
from hmar_jax.errors import InputError
from hmar_jax.parallel.sharding import MeshConfig
from hmar_jax.settings import Settings, setting
from hmar_jax.training.config import DataConfig, TrainConfig
from hmar_jax.training.task import Params
from hmar_jax.training.trainable import DataInfo, Parent, TaskKind, TaskSetup


@dataclasses.dataclass(frozen=True)
class _VQKeys(Settings):
    """What a config has beside the keys of every run."""

    perceptual_network: str = setting(
        "", "The .npz file of the perceptual loss, see autoencoders/perceptual.py.", is_input=True
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
    task = VQTask(model, config.steps, config.batch_size, recipe)
    origin = f"trained on {data.source}"
    spec = AutoencoderSpec(model, data.class_names, origin)
    return TaskSetup(task, spec, warnings=_warnings(task, data))


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


def planning_parent(config: Any, parent_config: Any = None) -> None:
    """A tokenizer trains on top of nothing."""
    del config, parent_config
