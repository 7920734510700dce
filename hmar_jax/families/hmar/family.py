"""The HMAR family: the attributes of the protocol `Family` in families/base.py."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from hmar_jax import settings
from hmar_jax.autoencoders.base import AUTOENCODER, AutoencoderSpec
from hmar_jax.autoencoders.scales import PUBLISHED_SIDES
from hmar_jax.autoencoders.vq import TokenizerConfig, VQAutoencoder
from hmar_jax.config_files import ConfigSchema
from hmar_jax.data.transforms import Transform
from hmar_jax.errors import InputError
from hmar_jax.families.hmar import fine_tuning
from hmar_jax.families.hmar.masked import MaskedTransformer
from hmar_jax.families.hmar.masked_task import MaskedTask
from hmar_jax.families.hmar.next_scale_task import NextScaleTask
from hmar_jax.families.hmar.options import ConvertConfig, EditingConfig, SamplingConfig
from hmar_jax.families.hmar.recipe import MaskedRecipe, NextScaleRecipe
from hmar_jax.families.hmar.sampler import HmarSampler
from hmar_jax.families.hmar.spec import (
    NAME,
    STAGE1_SAMPLING,
    STAGE2_SAMPLING,
    HmarSpec,
    stored_sampling,
)
from hmar_jax.families.hmar.transformer import NextScaleTransformer, TransformerConfig
from hmar_jax.io import models
from hmar_jax.io.identity import class_conflicts
from hmar_jax.parallel.sharding import MeshConfig
from hmar_jax.settings import Settings, setting
from hmar_jax.training.config import EncodedDataConfig, GenerativeTrainConfig
from hmar_jax.training.task import Params
from hmar_jax.training.trainable import (
    DataInfo,
    InitialParams,
    Parent,
    TaskKind,
    TaskSetup,
)

__all__ = ["ConvertConfig", "EditingConfig", "NAME", "SamplingConfig", "TASKS", "convert"]

Spec = HmarSpec

_STAGE2_CHANGES = ("dropout", "drop_path", "dtype", "remat", "attention")  # to stage 1's model


@dataclasses.dataclass(frozen=True)
class _Stage1Keys(Settings):
    """Keys of a config of stage 1, in addition to those of every run."""

    tokenizer: str = setting(
        "", "A run of train-tokenizer, a model directory or a bundled model.", is_input=True
    )
    init_from: str = setting(
        "",
        "The model whose parameters training starts from: a run, a model directory or a bundled "
        "model. Empty: random parameters.",
        is_input=True,
    )


@dataclasses.dataclass(frozen=True)
class _Stage2Keys(Settings):
    """Keys of a config of stage 2, in addition to those of every run."""

    init_from: str = setting(
        "", "The stage 1: a run, a model directory or a bundled model.", is_input=True
    )
    stage1_config: str = setting(
        "", "Config name of the stage 1 that hmar plan assumes without init_from.", harmless=True
    )


@dataclasses.dataclass(frozen=True)
class _Stage2Model(Settings):
    """Stage 2's own key of the group `model`."""

    masked_depth: int = setting(8, "M, last blocks that stage 2 trains.", at_least=1)


_SHARED = {
    "data": (EncodedDataConfig,),
    "data.transform": (Transform,),
    "mesh": (MeshConfig,),
}
TASKS = {
    "next_scale": TaskKind(
        ConfigSchema(
            {
                "": (GenerativeTrainConfig, _Stage1Keys),
                **_SHARED,
                "model": (TransformerConfig,),
                "recipe": (NextScaleRecipe,),
                "sampling": ((SamplingConfig, STAGE1_SAMPLING),),
            }
        ),
        command="train",
        parent_key="tokenizer",
        parent_folder="tokenizer",
        initial_key="init_from",
    ),
    "masked": TaskKind(
        ConfigSchema(
            {
                "": (GenerativeTrainConfig, _Stage2Keys),
                **_SHARED,
                "model": (_Stage2Model, (TransformerConfig, _STAGE2_CHANGES)),
                "recipe": (MaskedRecipe,),
                "sampling": ((SamplingConfig, STAGE2_SAMPLING),),
            }
        ),
        command="train",
        parent_key="init_from",
        parent_folder="stage1",
    ),
}


# Training


def image_side(config: Any, parent: Parent) -> int:
    """Pixels of the images that the task takes: those of its tokenizer."""
    return parent.spec.autoencoder.image_side


def make_task(config: Any, parent: Parent, data: DataInfo) -> TaskSetup:
    """The task of stage 1 or stage 2, from a checked config.

    Raises:
      InputError: the parent does not fit the task, the images or the classes, or the sampling
        options do not fit the model.
    """
    if config.task == "masked":
        return _make_masked_task(config, parent, data)
    tokenizer = parent.spec.autoencoder
    _check_image_side(config, parent)
    model = settings.from_group(
        TransformerConfig,
        config.model,
        scales=tokenizer.scales,
        vocab_size=tokenizer.vocab_size,
        z_channels=tokenizer.z_channels,
        num_classes=data.num_classes,
    )
    spec = HmarSpec(
        tokenizer,
        model,
        class_names=data.class_names,
        sampling=settings.from_group(SamplingConfig, config.sampling),
        origin=f"trained on {data.source}",
        licence=parent.spec.licence,
    )
    HmarSampler(spec).check(spec.sampling)
    task = NextScaleTask(
        spec=spec,
        recipe=settings.from_group(NextScaleRecipe, config.recipe),
        steps=num_steps(config, data.num_images),
        batch_size=config.batch_size,
        grad_accum_steps=config.grad_accum_steps,
    )
    tokenizer_spec = AutoencoderSpec(tokenizer, data.class_names, spec.origin, spec.licence)
    return TaskSetup(task, spec, tokenizer_spec)


def _make_masked_task(config: Any, parent: Parent, data: DataInfo) -> TaskSetup:
    stage1 = parent.spec
    _check_stage1(parent)
    _check_image_side(config, parent)
    depth = config.model.masked_depth
    if not 1 <= depth <= stage1.transformer.depth:
        raise InputError(
            f"config.model.masked_depth must be in [1, {stage1.transformer.depth}], the blocks of "
            f"{parent.name!r}; got {depth}"
        )
    conflicts = class_conflicts(stage1.class_names, data.class_names)
    if data.num_classes != stage1.num_classes:
        named = f" ({', '.join(conflicts)})" if conflicts else ""
        raise InputError(
            f"{data.source} has {data.num_classes} classes{named}, init_from {parent.name!r} has "
            f"{stage1.num_classes}; they must be equal"
        )
    if conflicts:
        raise InputError(
            f"{data.source} must have the classes of init_from {parent.name!r} in the same order; "
            f"compared with it: {', '.join(conflicts)}. Give its folders the names of that model, "
            "or list them in class_names.txt"
        )
    changes = {name: config.model[name] for name in _STAGE2_CHANGES}
    spec = dataclasses.replace(
        stage1,
        transformer=dataclasses.replace(stage1.transformer, **changes),
        masked_depth=depth,
        class_names=stage1.class_names or data.class_names,
        origin=f"trained on {data.source}",
        sampling=settings.from_group(SamplingConfig, config.sampling),
    )
    HmarSampler(spec).check(spec.sampling)
    task = MaskedTask(
        spec=spec,
        recipe=settings.from_group(MaskedRecipe, config.recipe),
        steps=num_steps(config, data.num_images),
        batch_size=config.batch_size,
        grad_accum_steps=config.grad_accum_steps,
    )
    return TaskSetup(task, spec, dataclasses.replace(stage1, masked_depth=0))


def _check_stage1(parent: Parent) -> None:
    spec, name = parent.spec, f"init_from {parent.name!r}"
    if not isinstance(spec, HmarSpec):
        raise InputError(f"{name} must be a transformer, a run of hmar train; got a {spec.kind}")
    if spec.transformer.pattern != "diagonal":
        raise InputError(
            f"{name} must have pattern=diagonal; it attends to earlier scales (causal, VAR)"
        )
    if not spec.next_scale:
        raise InputError(f"{name} must be a stage 1; it is a stage 2 alone")
    if spec.transformer.scale_list.num_scales == 1:
        raise InputError(f"{name} must have several scales: tokens of the first are never masked")


def _check_image_side(config: Any, parent: Parent) -> None:
    tokenizer = parent.spec.autoencoder
    if config.image_side and config.image_side != tokenizer.image_side:
        raise InputError(
            f"config.image_side={config.image_side} does not fit the tokenizer {parent.name!r}: "
            f"its scales {','.join(map(str, tokenizer.scales))} at {tokenizer.pixels_per_token} "
            f"pixels a token make {tokenizer.image_side} pixels"
        )


def num_steps(config: Any, num_images: int) -> int:
    """The number of training steps, from config.steps or config.epochs.

    Args:
      num_images: images of one epoch.
    """
    steps = config.steps or config.epochs * num_images // config.batch_size
    if steps < 1:
        raise InputError(
            "config.steps or config.epochs must be at least 1; got "
            f"steps={config.steps}, epochs={config.epochs}"
        )
    return steps


def frozen_params(config: Any, parent: Parent, parent_params: Params, kind: str) -> Params:
    """The tokenizer and, for stage 2, stage 1; without the encoder where batches are tokens."""
    parts = (AUTOENCODER, "transformer") if config.task == "masked" else (AUTOENCODER,)
    params = {part: parent_params[part] for part in parts}
    if kind != "image":  # the encoder is not needed, and need not take device memory
        tokenizer = VQAutoencoder(parent.spec.autoencoder)
        params[AUTOENCODER] = tokenizer.decoder_params(params[AUTOENCODER])
    return params


def initial_values(config: Any, initial: Parent) -> dict[str, Any]:
    """Values of config keys that may be empty where stage 1 starts from a model."""
    del config
    return fine_tuning.initial_values(initial)


def initial_params(config: Any, setup: TaskSetup, initial: Parent, params: Params) -> InitialParams:
    """The parameters that stage 1 starts from; new classes get new embeddings."""
    rng = np.random.default_rng(config.seed)
    return fine_tuning.initial_params(setup.spec, initial, params, rng)


def planning_parent(config: Any, parent_config: Any = None) -> Any:
    """The spec of the published tokenizer of the config's image side, and for stage 2 of stage 1.

    Args:
      parent_config: for stage 2, the config of its stage 1.
    """
    side = parent_config.image_side if parent_config is not None else config.image_side
    if side not in PUBLISHED_SIDES:
        raise InputError(
            f"config.image_side must be one of {', '.join(map(str, PUBLISHED_SIDES))}, for which a "
            f"tokenizer is published; got {side}"
        )
    tokenizer = AutoencoderSpec(TokenizerConfig(scales=PUBLISHED_SIDES[side]))
    if config.task != "masked":
        return tokenizer
    if parent_config is None:
        raise InputError(
            "config.init_from is empty: give --config.init_from=RUN, or a config NAME,stage=masked "
            "whose NAME is its stage 1"
        )
    data = DataInfo("", TransformerConfig.num_classes, (), parent_config.batch_size)
    return make_task(parent_config, Parent("the published tokenizer", tokenizer), data).spec


# Models


def init_params(spec: HmarSpec, rng: jax.Array) -> Params:
    """Random parameters of all parts."""
    keys = jax.random.split(rng, 3)
    params = {
        AUTOENCODER: VQAutoencoder(spec.autoencoder).init(keys[0]),
        "transformer": NextScaleTransformer(spec.transformer).init(keys[1]),
    }
    if spec.masked_depth:
        masked = MaskedTransformer(spec.transformer, spec.masked_depth)
        params["masked"] = masked.init(keys[2], params["transformer"])
    return params


def make_sampler(spec: HmarSpec) -> HmarSampler:
    """The sampler of a model; compiles nothing yet."""
    return HmarSampler(spec)


def assemble_params(spec: HmarSpec, trained: Params, parent_params: Params) -> Params:
    """Merges a run's trained parameters with those of the frozen model in its directory."""
    return {**parent_params, "masked" if spec.masked_depth else "transformer": trained}


def describe(spec: HmarSpec, params: Params) -> list[tuple[str, str]]:
    """Rows of `hmar info`."""
    m = spec.transformer
    names = spec.class_names
    listed = f": {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else ""
    return [
        (
            "transformer",
            f"{_count(params, 'transformer'):,} parameters, depth {m.depth}, width {m.width}, "
            f"{m.heads} heads, {m.pattern} attention",
        ),
        *([("stage 2", _describe_stage2(spec, params))] if spec.masked_depth else []),
        ("classes", f"{m.num_classes}{listed}"),
        (
            "sampling",
            ", ".join(
                f"{name.replace('_', ' ')} {getattr(spec.sampling, name):g}"
                for name in stored_sampling(spec)
            ),
        ),
    ]


def _describe_stage2(spec: HmarSpec, params: Params) -> str:
    if not spec.next_scale:
        return "alone: it predicts whole scales from masks, then parts of them"
    shared = spec.transformer.depth - spec.masked_depth
    return (
        f"{_count(params, 'masked'):,} parameters, depth {spec.masked_depth}; "
        f"the first {shared} blocks are shared"
    )


def _count(params: Params, part: str) -> int:
    return sum(np.size(x) for x in jax.tree.leaves(params.get(part, {})))


def convert(model: str | None, config: ConvertConfig) -> tuple[Any, Params]:
    """Reads files of published PyTorch weights, see convert.py; returns spec and parameters.

    Raises:
      InputError: also where the shapes of the weights are not those of the model that they seem to
        be.
    """
    from hmar_jax.families.hmar.convert import convert_files  # only conversions need its readers

    try:
        spec, params = convert_files(model, config)
    except InputError:
        raise
    except (ValueError, IndexError) as error:  # of numpy, about a shape
        raise InputError(
            f"{model or config.tokenizer}: the shapes of its weights do not fit together ({error})"
        ) from None
    make = init_params if isinstance(spec, HmarSpec) else _init_tokenizer
    expected = jax.eval_shape(functools.partial(make, spec), jax.random.key(0))
    models.check_shapes(expected, params, "the weights do not fit the model that they seem to be")
    return spec, params


def _init_tokenizer(spec: AutoencoderSpec, rng: jax.Array) -> Params:
    return {AUTOENCODER: VQAutoencoder(spec.autoencoder).init(rng)}
