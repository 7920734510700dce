"""From a config to the task that it describes: architecture and recipe, without data, files or devices."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from hmar_jax import config_files
from hmar_jax.autoencoders.scales import PUBLISHED_SIDES
from hmar_jax.autoencoders.vq import Tokenizer, TokenizerConfig
from hmar_jax.autoencoders.vq_task import TokenizerTask
from hmar_jax.errors import InputError
from hmar_jax.families.hmar.losses import masked_weights, position_weights
from hmar_jax.families.hmar.masked_task import MaskedTask
from hmar_jax.families.hmar.masking import sample_mask_ratios
from hmar_jax.families.hmar.next_scale_task import NextScaleTask
from hmar_jax.families.hmar.transformer import NextScaleTransformer, TransformerConfig

_IMAGENET_IMAGES, _IMAGENET_CLASSES = 1_281_167, 1000


class Shapes(NamedTuple):
    """A task and the shapes of what its steps take beside the state, as jax.ShapeDtypeStruct."""

    task: NextScaleTask | TokenizerTask
    extra: tuple  # what is frozen
    batch: dict[str, jax.ShapeDtypeStruct]  # of all hosts


def tokenizer_task(config: ConfigDict) -> TokenizerTask:
    """Raises InputError where the config's keys or values make none; so do the others."""
    if config.steps < 1:
        raise InputError(f"steps={config.steps}: 1 or more is wanted")
    model = config_files.build(TokenizerConfig, config.model)
    return config_files.build(
        TokenizerTask,
        config.recipe,
        tokenizer=model,
        steps=config.steps,
        batch_size=config.batch_size,
    )


def steps_of(config: ConfigDict, images: int) -> int:
    """Of a transformer's run on so many images an epoch."""
    steps = config.steps or config.epochs * images // config.batch_size
    if steps < 1:
        raise InputError(
            f"steps={config.steps} and epochs={config.epochs}: one of them must be 1 or more"
        )
    return steps


def next_scale_task(
    config: ConfigDict, tokenizer: TokenizerConfig, num_classes: int, steps: int
) -> NextScaleTask:
    model = config_files.build(
        TransformerConfig,
        config.model,
        scales=tokenizer.scales,
        vocab_size=tokenizer.vocab_size,
        z_channels=tokenizer.z_channels,
        num_classes=num_classes,
    )
    position_weights(model.scale_list, config.recipe.loss_weights)  # is there such a weighting?
    return config_files.build(
        NextScaleTask,
        config.recipe,
        transformer=model,
        tokenizer=tokenizer,
        steps=steps,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
    )


def masked_task(
    config: ConfigDict, tokenizer: TokenizerConfig, model: TransformerConfig, steps: int
) -> MaskedTask:
    """`model`: of stage 1, with what stage 2 changes of it."""
    masked_weights(
        model.scale_list,
        config.recipe.loss_weights,
        jnp.ones((1, model.scale_list.length - model.scale_list.lengths[0]), bool),
    )
    sample_mask_ratios(
        jax.random.key(0), 1, config.recipe.mask_ratios
    )  # are there such weights and ratios?
    return config_files.build(
        MaskedTask,
        config.recipe,
        transformer=model,
        tokenizer=tokenizer,
        masked_depth=config.model.masked_depth,
        steps=steps,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
    )


def shapes(
    config: ConfigDict,
    num_classes: int = _IMAGENET_CLASSES,
    images: int = _IMAGENET_IMAGES,
    *,
    tokenizer: TokenizerConfig | None = None,
    stage1: TransformerConfig | None = None,
) -> Shapes:
    """What a config trains, before there are data or parameters: a tokenizer, or a stage of the transformer from tokens.

    Args:
      tokenizer: None: the published one for config.image_side.
      stage1: what a stage 2 is trained on top of.

    Raises:
      InputError: a stage 2 without a stage 1, or no tokenizer for images of a side for which no scale list is published.
    """
    whole = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)
    if config.task == "tokenizer":
        task = tokenizer_task(config)
        side = task.tokenizer.image_side
        return Shapes(
            task,
            (),
            {
                "label": whole,
                "image": jax.ShapeDtypeStruct((config.batch_size, side, side, 3), jnp.uint8),
            },
        )
    if tokenizer is None:
        if config.image_side not in PUBLISHED_SIDES:
            raise InputError(
                f"image_side={config.image_side}: the published tokenizer has scales for {', '.join(map(str, PUBLISHED_SIDES))}"
            )
        tokenizer = TokenizerConfig(scales=PUBLISHED_SIDES[config.image_side])
    steps, below = steps_of(config, images), None
    if config.task == "next_scale":
        task = next_scale_task(config, tokenizer, num_classes, steps)
    elif stage1 is None:
        raise InputError(
            f"config.task={config.task!r}: stage 2 is trained on top of a stage 1, whose architecture is wanted too"
        )
    else:
        changes = {key: value for key, value in config.model.items() if key != "masked_depth"}
        task = masked_task(config, tokenizer, dataclasses.replace(stage1, **changes), steps)
        below = jax.eval_shape(NextScaleTransformer(stage1).init, jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, tokenizer.image_side, tokenizer.image_side, 3), jnp.float32)
    frozen = jax.eval_shape(Tokenizer(tokenizer).init, jax.random.key(0), image)["params"]
    batch = {
        "label": whole,
        "tokens": jax.ShapeDtypeStruct((config.batch_size, tokenizer.scale_list.length), jnp.int32),
    }
    return Shapes(
        task, (frozen if below is None else {"tokenizer": frozen, "transformer": below},), batch
    )
