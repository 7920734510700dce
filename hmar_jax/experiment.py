"""From a config to what the loop runs: data, task and what is shown. The only place that knows all kinds of task."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hmar_jax import config_files
from hmar_jax.autoencoders.perceptual import load_perceptual, perceptual_distance
from hmar_jax.autoencoders.vq import (
    Tokenizer,
    TokenizerConfig,
    fingerprint,
    to_float,
    without_encoder,
)
from hmar_jax.data.encoding import tokenize
from hmar_jax.data.loader import DecodeErrorLog, Transform, make_loader
from hmar_jax.data.records import TokenSet, make_token_loader, open_tokens
from hmar_jax.data.sources import Source, open_source
from hmar_jax.errors import InputError
from hmar_jax.families.hmar import sampler, schedules, tasks
from hmar_jax.families.hmar.combined import CombinedModel
from hmar_jax.families.hmar.spec import ModelSpec
from hmar_jax.io import files, image_grid
from hmar_jax.parallel import processes, sharding
from hmar_jax.pipeline import STAGE1_FOLDER, TOKENIZER_FOLDER, load_spec_and_params
from hmar_jax.training.metrics import LOGGER

_SHOWN_CLASSES, _SHOWN_OF_EACH = 10, 8  # of the sample grids
_MAX_EVAL_BATCH = 128

# Of the config's numbers: keys, least and largest value. The rest is checked where it is used.
_RANGES = (
    (
        "batch_size log_every eval_every sample_every checkpoint_every keep_checkpoints accumulate recipe.unquantized_steps "
        "recipe.discriminator_channels recipe.discriminator_layers",
        1,
        math.inf,
    ),
    (
        "model.vocab_size model.z_channels model.channels model.channel_multipliers model.patch_size model.groups model.depth "
        "model.width model.heads",
        1,
        2**20,
    ),
    (
        "steps epochs image_side keep_best data.threads data.workers data.cached_copies model.num_res_blocks model.num_phi "
        "recipe.learning_rate recipe.warmup_steps recipe.revive_every recipe.clip recipe.weight_decay",
        0,
        math.inf,
    ),
    ("model.mlp_ratio", 0.1, 100),
    ("seed", 0, 2**32 - 1),
    ("ema_decay", 0, 1 - 1e-9),
    (
        "model.dropout model.drop_path model.phi_ratio recipe.class_dropout recipe.label_smoothing recipe.b1 recipe.b2",
        0,
        1,
    ),
)
_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A model that is trained on top of; the run keeps it in a folder of its own."""

    folder: str
    spec: ModelSpec
    params: dict


@dataclasses.dataclass(frozen=True)
class Validation:
    """The held-out images, in batches that the hosts share."""

    loader: grain.IterDataset  # of this host
    batch_size: int  # of all hosts


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What the loop needs to know of a model: how to begin, to step, to judge and to show."""

    task: Any  # init(rng, *extra), train_step(state, batch, rng, *extra), eval_step(state, batch, *extra), partition_rules
    spec: ModelSpec  # of the model that comes out
    mesh: Mesh  # what it is trained on
    extra: tuple  # further arguments of the steps: pytrees of arrays on the host
    loader: Callable[
        [], grain.IterDataset
    ]  # this host's part of the batches for training; reading tokens can take a while
    validation: Validation | None
    image: Callable[
        [Any, jax.Array, tuple], Any
    ]  # (state, rng, extra), on the mesh -> PIL image of samples
    broken: DecodeErrorLog
    frozen: Frozen | None = None  # what the run must keep beside its own parameters


def build_experiment(config: ConfigDict, workdir: str | None = None) -> Experiment:
    """From a config; a run in `workdir` that goes on keeps the frozen model that it was begun with.

    Raises:
      InputError: something in the config does not fit together. Nothing has been written then.
    """
    _check_ranges(config)
    if not config.data.source:
        raise InputError(
            "config.data.source is empty: give --config.data.source=folder:DIR, tfds:NAME, tokens:DIR or digits"
        )
    builders = {"tokenizer": _tokenizer, "next_scale": _next_scale, "masked": _masked}
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch(mesh, config.batch_size, config.get("accumulate", 1))
    experiment = builders[config.task](config, mesh, workdir)
    transformer, tensor = experiment.spec.transformer, mesh.shape["tensor"]
    if transformer is not None and transformer.heads % tensor:
        raise InputError(
            f"mesh.tensor={tensor} does not divide the {transformer.heads} heads of the transformer"
        )
    jax.eval_shape(
        experiment.task.init, jax.random.key(0), *experiment.extra
    )  # whatever only the networks and the optimizer find out
    return experiment


def _check_ranges(config: ConfigDict) -> None:
    flat = {
        f"{group}.{key}": value
        for group in ("data", "model", "recipe")
        for key, value in config[group].items()
    }
    flat |= config.items()
    for keys, least, largest in _RANGES:
        for key in keys.split():
            value = flat.get(key, least)
            values = value if isinstance(value, tuple) else (value,)
            if not values or not all(least <= v <= largest for v in values):
                what = f"{least} or more" if largest == math.inf else f"{least} to {largest}"
                raise InputError(f"config.{key}={value}: {what} is wanted")
    if config.model.dtype not in _DTYPES:
        raise InputError(
            f"config.model.dtype={config.model.dtype!r}: known are {', '.join(_DTYPES)}"
        )


def _open(config: ConfigDict, mesh: Mesh, side: int, broken: DecodeErrorLog, need_classes: bool):
    """Training source, its transform, and the validation split."""
    if config.data.workers and config.data.in_memory:
        raise InputError(
            f"config.data.workers={config.data.workers} with data.in_memory: each process would keep all images; 0, or data.in_memory=False, is wanted"
        )
    transform = config_files.build(Transform, config.data.transform, side=side)
    open_split = functools.partial(
        open_source, config.data.source, in_memory=config.data.in_memory, need_classes=need_classes
    )
    source = open_split("train")
    rows = len(source) * max(1, config.data.get("cached_copies", 0))
    if config.batch_size > rows:
        raise InputError(
            f"config.batch_size={config.batch_size}: {config.data.source} has {rows} images, {rows} or less is wanted"
        )
    held_out = open_split("validate")
    batch = _validation_batch(config, mesh, len(held_out))
    shard, shards = sharding.host_share(mesh, batch)
    validation = make_loader(
        held_out,
        transform,
        batch_size=batch // shards,
        seed=0,
        train=False,
        shard_index=shard,
        shard_count=shards,
        threads=config.data.threads,
        broken=broken,
    )
    return source, transform, Validation(validation, batch)


def _loader(
    config: ConfigDict, mesh: Mesh, source: Source, transform: Transform, broken: DecodeErrorLog
) -> grain.IterDataset:
    """This host's part of the training images."""
    shard, shards = sharding.host_share(mesh, config.batch_size)
    return make_loader(
        source,
        transform,
        batch_size=config.batch_size // shards,
        seed=config.seed,
        train=True,
        shard_index=shard,
        shard_count=shards,
        threads=config.data.threads,
        workers=config.data.workers,
        broken=broken,
    )


def _tokenizer(config: ConfigDict, mesh: Mesh, workdir: str | None) -> Experiment:
    del workdir  # nothing is frozen
    task = tasks.tokenizer_task(config)
    model = task.tokenizer
    if config.recipe.unquantized_steps >= config.steps:
        LOGGER.warning(
            "recipe.unquantized_steps=%d is not less than steps=%d: this tokenizer will not learn to quantize",
            config.recipe.unquantized_steps,
            config.steps,
        )
    extra = ()
    if task.perceptual_weight:
        if not config.perceptual_network:
            raise InputError(
                "config.recipe.perceptual_weight is not 0: config.perceptual_network must name the .npz file of the network"
            )
        extra = (load_perceptual(config.perceptual_network),)
        real_images = jax.ShapeDtypeStruct((1, model.image_side, model.image_side, 3), jnp.float32)
        jax.eval_shape(
            perceptual_distance, *extra, real_images, real_images
        )  # are they large enough for its pools?
    broken = DecodeErrorLog()
    source, transform, validation = _open(
        config, mesh, model.image_side, broken, need_classes=False
    )
    reconstruct = jax.jit(task.samples, out_shardings=sharding.replicated(mesh))

    held_out = open_source(config.data.source, "validate", in_memory=config.data.in_memory)
    few = make_loader(  # through a loader, which replaces broken images; not the hosts' own parts: all show the same
        held_out,
        transform,
        batch_size=min(_SHOWN_OF_EACH, len(held_out)),
        seed=0,
        train=False,
        threads=0,
        broken=broken,
    )
    shown = next(iter(few))["image"]

    def image(state, rng, extra):
        del rng, extra  # the same held-out images every time
        rows = np.concatenate([np.asarray(x) for x in reconstruct(state, shown)])
        return image_grid.draw(
            (rows + 1) / 2, columns=len(shown), labels=["image", "reconstruction"]
        )

    loader = functools.partial(_loader, config, mesh, source, transform, broken)
    spec = ModelSpec(
        tokenizer=model, class_names=source.class_names, origin=f"trained on {config.data.source}"
    )
    return Experiment(task, spec, mesh, extra, loader, validation, image, broken)


@dataclasses.dataclass(frozen=True)
class _Data:
    """What both stages of a transformer train on."""

    source: Source | TokenSet
    steps: int
    loader: Callable[[], grain.IterDataset]
    validation: Validation | None
    broken: DecodeErrorLog
    tokenizer_params: dict  # on the device; those that the steps and the samples need


def _data(
    config: ConfigDict, mesh: Mesh, tokenizer: TokenizerConfig, tokenizer_params, name: str
) -> _Data:
    """Images for a frozen tokenizer, or tokens made of them beforehand; `name` is the tokenizer's in errors."""
    if config.image_side and config.image_side != tokenizer.image_side:
        raise InputError(
            f"image_side={config.image_side} does not fit the tokenizer {name!r}: its scales "
            f"{','.join(map(str, tokenizer.scales))} at {tokenizer.pixels_per_token} pixels a token make "
            f"{tokenizer.image_side} pixels"
        )
    broken = DecodeErrorLog()
    kind, _, directory = config.data.source.partition(":")
    if kind == "tokens":
        source, validation = _open_tokens(
            config, mesh, directory, tokenizer, tokenizer_params, name
        )
        # Without the encoder, which then need not lie in the devices' memory.
        tokenizer_params = without_encoder(tokenizer_params)
    else:
        source, transform, validation = _open(
            config, mesh, tokenizer.image_side, broken, need_classes=True
        )
    steps = tasks.steps_of(config, len(source))
    shard, shards = sharding.host_share(mesh, config.batch_size)
    own_rows = config.batch_size // shards

    def loader():
        if kind == "tokens":
            read_from = source.in_memory() if config.data.in_memory else source
            return make_token_loader(
                read_from,
                batch_size=own_rows,
                seed=config.seed,
                shard_index=shard,
                shard_count=shards,
                threads=config.data.threads,
            )
        if not config.data.cached_copies:
            return _loader(config, mesh, source, transform, broken)
        encode = jax.jit(
            lambda params, x: Tokenizer(tokenizer).apply(
                {"params": params}, to_float(x), method="encode"
            )
        )
        params = jax.tree.map(jnp.asarray, tokenizer_params)
        tokens = tokenize(  # every host all of them
            functools.partial(encode, params),
            source,
            transform,
            copies=config.data.cached_copies,
            seed=config.seed,
            progress=processes.is_primary(),
        )
        return make_token_loader(
            tokens, batch_size=own_rows, seed=config.seed, shard_index=shard, shard_count=shards
        )

    return _Data(source, steps, loader, validation, broken, tokenizer_params)


def _open_tokens(
    config: ConfigDict, mesh: Mesh, directory: str, tokenizer: TokenizerConfig, params, name: str
):
    """Training tokens, and the loader of those held out or None."""
    if not directory:
        raise InputError(
            f"config.data.source={config.data.source!r}: tokens:DIR is wanted, DIR as hmar tokenize made it"
        )
    source, held_out = (open_tokens(directory, split) for split in ("train", "validate"))
    if source is None:
        raise InputError(f"the token set {directory} has no training split")
    ours, theirs = fingerprint(tokenizer, params), source.info.fingerprint
    if ours != theirs:
        raise InputError(
            f"the token set {directory} was made by another tokenizer: by {source.info.tokenizer!r} with fingerprint {theirs}; "
            f"{name!r} has {ours}: name that tokenizer, or make the tokens anew with hmar tokenize"
        )
    if config.batch_size > len(source):
        raise InputError(
            f"config.batch_size={config.batch_size}: {config.data.source} has {len(source)} images, {len(source)} or less is wanted"
        )
    for index, path, reason in source.info.splits["train"].broken:
        LOGGER.warning(
            "without image %d, %s, which could not be read when tokens were made: %s",
            index,
            path,
            reason,
        )
    if not held_out:
        return source, None
    batch = _validation_batch(config, mesh, len(held_out))
    shard, shards = sharding.host_share(mesh, batch)
    loader = make_token_loader(
        held_out,
        batch_size=batch // shards,
        train=False,
        shard_index=shard,
        shard_count=shards,
        threads=config.data.threads,
    )
    return source, Validation(loader, batch)


def _validation_batch(config: ConfigDict, mesh: Mesh, real_images: int) -> int:
    """Images of a validation batch of all hosts; what it has too many is padded."""
    parts = sharding.batch_parts(mesh)
    return -(-min(config.batch_size, real_images, _MAX_EVAL_BATCH) // parts) * parts


def _samples(config: ConfigDict, mesh: Mesh, spec: ModelSpec, params_of: Callable) -> Callable:
    """A grid of samples as a function of (state, rng, extra); `params_of(state, *extra)` gives all of the model's parameters."""
    draw, strength = sampler.options(vocab_size=spec.tokenizer.vocab_size, **config.sampling)
    schedule = schedules.resolve(
        spec.tokenizer.scale_list, "default" if spec.masked_depth else "none"
    )
    shown = np.repeat(np.arange(min(_SHOWN_CLASSES, spec.transformer.num_classes)), _SHOWN_OF_EACH)
    model, plan = CombinedModel(spec), schedules.plan(schedule)

    def sample(params, rng):
        keys = sharding.constrain_batch(sampler.image_keys(rng, len(shown)))
        return sampler.sample(
            model, params, keys, jnp.array(shown), draw=draw, strength=strength, plan=plan
        )[0]

    sample = jax.jit(sharding.traced_on_mesh(mesh, sample), out_shardings=sharding.replicated(mesh))

    def image(state, rng, extra):
        images = sample(params_of(state, *extra), rng)
        names = [spec.class_names[i] for i in shown[::_SHOWN_OF_EACH]]
        return image_grid.draw(np.asarray(images), columns=_SHOWN_OF_EACH, labels=names)

    return image


def _begun(workdir: str | None, name: str) -> str | None:
    """Where a run that goes on keeps its frozen parameters."""
    kept = workdir and files.absolute(workdir) / name
    return os.fspath(kept) if workdir and (kept / "config.json").exists() else None


def _next_scale(config: ConfigDict, mesh: Mesh, workdir: str | None) -> Experiment:
    if not config.tokenizer:
        raise InputError(
            "config.tokenizer is empty: give --config.tokenizer=DIR, a run of train-tokenizer or a converted model; of tokens, "
            "the one that made them"
        )
    tokenizer_spec, params = load_spec_and_params(
        _begun(workdir, TOKENIZER_FOLDER) or config.tokenizer
    )
    tokenizer, params = tokenizer_spec.tokenizer, jax.tree.map(np.asarray, params["tokenizer"])
    data = _data(config, mesh, tokenizer, params, config.tokenizer)
    task = tasks.next_scale_task(config, tokenizer, data.source.num_classes, data.steps)
    model = task.transformer
    spec = ModelSpec(
        tokenizer=tokenizer,
        transformer=model,
        class_names=data.source.class_names,
        origin=f"trained on {config.data.source}",
        licence=tokenizer_spec.licence,
        **config.sampling,
    )
    image = _samples(
        config,
        mesh,
        spec,
        lambda state, tokenizer: {"tokenizer": tokenizer, "transformer": state.eval_params},
    )
    frozen = Frozen(
        TOKENIZER_FOLDER, dataclasses.replace(spec, transformer=None), {"tokenizer": params}
    )
    return Experiment(
        task,
        spec,
        mesh,
        (data.tokenizer_params,),
        data.loader,
        data.validation,
        image,
        data.broken,
        frozen,
    )


def _masked(config: ConfigDict, mesh: Mesh, workdir: str | None) -> Experiment:
    if not config.init_from:
        raise InputError(
            "config.init_from is empty: give --config.init_from=RUN, a run of hmar train or another model of stage 1"
        )
    stage1, params = load_spec_and_params(_begun(workdir, STAGE1_FOLDER) or config.init_from)
    if stage1.transformer is None:
        raise InputError(
            f"init_from {config.init_from!r} is a tokenizer alone: stage 2 starts from a transformer"
        )
    if stage1.transformer.pattern != "diagonal":
        raise InputError(
            f"init_from {config.init_from!r} attends to earlier scales (pattern=causal, VAR): stage 2 needs a stage 1 of pattern=diagonal"
        )
    if not stage1.next_scale:
        raise InputError(
            f"init_from {config.init_from!r} is a stage 2 alone: stage 2 starts from a stage 1"
        )
    if stage1.transformer.scale_list.num_scales == 1:
        raise InputError(
            f"init_from {config.init_from!r} has one scale only: its tokens are never masked"
        )
    depth = config.model.masked_depth
    if not 1 <= depth <= stage1.transformer.depth:
        raise InputError(
            f"model.masked_depth={depth}: {config.init_from!r} has {stage1.transformer.depth} blocks, 1 to "
            f"{stage1.transformer.depth} is wanted"
        )
    params = jax.tree.map(np.asarray, {part: params[part] for part in ("tokenizer", "transformer")})
    data = _data(config, mesh, stage1.tokenizer, params["tokenizer"], config.init_from)
    if data.source.num_classes != stage1.transformer.num_classes:
        raise InputError(
            f"{config.data.source} has {data.source.num_classes} classes, init_from {config.init_from!r} has "
            f"{stage1.transformer.num_classes}"
        )
    changes = {key: value for key, value in config.model.items() if key != "masked_depth"}
    model = dataclasses.replace(stage1.transformer, **changes)
    task = tasks.masked_task(config, stage1.tokenizer, model, data.steps)
    alone = dataclasses.replace(stage1, masked_depth=0)
    spec = dataclasses.replace(
        stage1,
        transformer=model,
        masked_depth=depth,
        class_names=stage1.class_names or data.source.class_names,
        origin=f"trained on {config.data.source}",
        **config.sampling,
    )
    image = _samples(
        config, mesh, spec, lambda state, frozen: {**frozen, "masked": state.eval_params}
    )
    frozen = {**params, "tokenizer": data.tokenizer_params}
    return Experiment(
        task,
        spec,
        mesh,
        (frozen,),
        data.loader,
        data.validation,
        image,
        data.broken,
        Frozen(STAGE1_FOLDER, alone, params),
    )
