"""From a config to what the training loop runs: data, task, devices. It asks the registry.

config -> parent model (if any) -> data -> task -> Experiment
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hmar_jax import autoencoders, families, settings
from hmar_jax.autoencoders import models
from hmar_jax.autoencoders.base import AUTOENCODER, AutoencoderSpec, make_encoder
from hmar_jax.config_files import ConfigSchema
from hmar_jax.data.decode_errors import DecodeErrorLog
from hmar_jax.data.encoding import encode_in_memory
from hmar_jax.data.loader import make_loader
from hmar_jax.data.records import (
    RecordSet,
    has_info,
    make_record_loader,
    open_records,
    read_info,
)
from hmar_jax.data.sources import Source, SourceConfig, open_splits, records_directory
from hmar_jax.data.transforms import Transform
from hmar_jax.errors import InputError, printable
from hmar_jax.io import files, runs
from hmar_jax.loading import load_spec_and_params
from hmar_jax.parallel import processes, sharding
from hmar_jax.training.experiment import Experiment, FrozenModel, Validation
from hmar_jax.training.metrics import LOGGER
from hmar_jax.training.step import init_state
from hmar_jax.training.trainable import DataInfo, Parent, TaskKind

_MAX_EVAL_BATCH = 128


@dataclasses.dataclass(frozen=True)
class _Data:
    """What a task trains on."""

    info: DataInfo
    kind: str  # of its batches: "image", or a kind of records
    loader: Callable[[], grain.IterDataset]
    validation: Validation | None
    decode_errors: DecodeErrorLog
    summary: str  # how many images, for the log
    held_out: Source | None = None  # the images of `validation`; None where it has records


def task_kind(config: ConfigDict) -> tuple[Any, TaskKind]:
    """The family (or kind of autoencoder) that a config trains, and its kind of task.

    Raises:
      InputError: there is no such family or task.
    """
    trainable = families.get_trainable(config.get("family", ""), config.get("task", ""))
    task = config.get("task", "")
    if task not in trainable.TASKS:
        raise InputError(f"config.task must be one of {', '.join(trainable.TASKS)}; got {task!r}")
    return trainable, trainable.TASKS[task]


def build_experiment(config: ConfigDict, workdir: str | None = None) -> Experiment:
    """From a config; a run in `workdir` that resumes keeps the frozen parent it was started with.

    Raises:
      InputError: something in the config does not fit together. Nothing has been written then.
    """
    trainable, kind = task_kind(config)
    kind.schema.check(config)
    if not config.data.source:
        encoded = "tokens:DIR, " if kind.parent_key else ""
        raise InputError(
            "config.data.source is empty; give --config.data.source=folder:DIR, tfds:NAME, "
            f"{encoded}or digits"
        )
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch(mesh, config.batch_size, config.get("grad_accum_steps", 1))
    parent, parent_params = _load_parent(config, kind, workdir)
    side = trainable.image_side(config, parent)
    data = _open_data(config, mesh, side, parent, parent_params)
    setup = trainable.make_task(config, parent, data.info)
    task = setup.task
    if data.kind not in task.input_kinds:
        kinds = ", ".join(sorted(task.input_kinds))
        raise InputError(f"{config.data.source} gives {data.kind!r}; this task takes {kinds}")
    task.check_mesh(mesh)
    frozen = trainable.frozen_params(config, parent, parent_params, _frozen_kind(config, data.kind))
    # Whatever only the networks and the optimizer can find out.
    jax.eval_shape(functools.partial(init_state, task), jax.random.key(0), frozen)
    kept = None
    if setup.parent_spec is not None:
        parts = _kept_parts(setup, parent_params)
        kept = FrozenModel(kind.parent_folder, setup.parent_spec, parts)
    return Experiment(
        task,
        setup.spec,
        mesh,
        frozen,
        data.loader,
        data.validation,
        _preview_images(config, task.num_preview_images, side, data),
        data.decode_errors,
        kind.schema,
        kept,
        data.summary,
    )


def _frozen_kind(config: ConfigDict, kind: str) -> str:
    """The kind of batches that the frozen parameters must serve.

    Validation reads images and encodes them in the step, also where training reads records that
    were encoded to memory.
    """
    source = config.data.source
    return "image" if source and records_directory(source) is None else kind


def _kept_parts(setup: Any, parent_params: Any) -> Any:
    """The parent's parameters, without those that its frozen copy does not have."""
    if isinstance(setup.parent_spec, AutoencoderSpec):
        return {AUTOENCODER: parent_params[AUTOENCODER]}
    return parent_params


def _load_parent(
    config: ConfigDict, kind: TaskKind, workdir: str | None
) -> tuple[Parent | None, Any]:
    """The model that the config trains on top of: its spec, and its parameters on the host."""
    if kind.parent_key is None:
        return None, {}
    name = config[kind.parent_key]
    if not name:
        raise InputError(
            f"config.{kind.parent_key} is empty; give --config.{kind.parent_key}=MODEL, a run, a "
            "model directory or a bundled model"
        )
    kept = workdir and files.absolute(workdir) / kind.parent_folder
    resumes = workdir and (kept / "config.json").exists()
    spec, params = load_spec_and_params(os.fspath(kept) if resumes else name)
    return Parent(name, spec), jax.tree.map(np.asarray, params)


# Data


def _open_data(
    config: ConfigDict, mesh: Mesh, side: int, parent: Parent | None, parent_params: Any
) -> _Data:
    if records_directory(config.data.source) is not None:
        if parent is None:
            raise InputError(
                f"config.data.source must give images to train an autoencoder; "
                f"got {config.data.source!r}"
            )
        return _open_records(config, mesh, parent, parent_params)
    return _open_images(config, mesh, side, parent, parent_params)


def _open_images(
    config: ConfigDict, mesh: Mesh, side: int, parent: Parent | None, parent_params: Any
) -> _Data:
    if config.data.workers and config.data.in_memory:
        raise InputError(
            "config.data.workers must be 0 with data.in_memory, as each process would keep all "
            f"images; got {config.data.workers}"
        )
    transform = settings.from_group(Transform, config.data.transform, side=side)
    splits = open_splits(
        config.data.source,
        in_memory=config.data.in_memory,
        need_classes=parent is not None,
        config=settings.from_group(SourceConfig, config.data),
    )
    source, held_out = splits["train"], splits["validate"]
    copies = config.data.get("cached_copies", 0)
    _check_batch_size(config, len(source) * max(1, copies))
    errors = DecodeErrorLog()
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
        broken=errors,
    )
    shard, shards = sharding.host_share(mesh, config.batch_size)

    def loader():
        if copies:
            return _cached_loader(
                config, source, transform, parent, parent_params, shard, shards, errors
            )
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
            broken=errors,
        )

    kind = "image"
    if copies:
        kind = autoencoders.make_autoencoder(parent.spec.autoencoder).record_spec.kind
    info, batches = _info(config, source), Validation(validation, batch)
    return _Data(info, kind, loader, batches, errors, _summary(info, len(held_out)), held_out)


def _cached_loader(
    config, source: Source, transform, parent: Parent, params, shard, shards, errors
):
    """Encodes every image some times before training; every host encodes all of them."""
    autoencoder = autoencoders.make_autoencoder(parent.spec.autoencoder)
    encode, _ = make_encoder(autoencoder, params[AUTOENCODER], 1, jax.local_devices()[:1])
    records = encode_in_memory(
        encode,
        source,
        transform,
        record_spec=autoencoder.record_spec,
        copies=config.data.cached_copies,
        seed=config.seed,
        progress=processes.is_primary(),
        broken=errors,
    )
    return make_record_loader(
        records,
        batch_size=config.batch_size // shards,
        seed=config.seed,
        shard_index=shard,
        shard_count=shards,
    )


def _open_records(config: ConfigDict, mesh: Mesh, parent: Parent, parent_params: Any) -> _Data:
    directory = records_directory(config.data.source)
    if not directory:
        raise InputError(
            f"config.data.source must be tokens:DIR, DIR as hmar tokenize made it; "
            f"got {config.data.source!r}"
        )
    source, held_out = (open_records(directory, split) for split in ("train", "validate"))
    if source is None:
        raise InputError(f"the data set {directory} has no training split")
    _check_fingerprint(source, directory, parent, parent_params)
    _check_batch_size(config, len(source))
    for index, path, reason in source.info.splits["train"].broken:
        LOGGER.warning("without image %d, %s, which could not be decoded: %s", index, path, reason)
    shard, shards = sharding.host_share(mesh, config.batch_size)

    def loader():
        return make_record_loader(
            source.in_memory() if config.data.in_memory else source,
            batch_size=config.batch_size // shards,
            seed=config.seed,
            shard_index=shard,
            shard_count=shards,
            threads=config.data.threads,
        )

    info, kind = _info(config, source), source.info.record_spec.kind
    if not held_out:
        return _Data(info, kind, loader, None, DecodeErrorLog(), _summary(info, 0))
    batch = _validation_batch(config, mesh, len(held_out))
    own, count = sharding.host_share(mesh, batch)
    validation = make_record_loader(
        held_out,
        batch_size=batch // count,
        train=False,
        shard_index=own,
        shard_count=count,
        threads=config.data.threads,
    )
    summary = _summary(info, len(held_out))
    return _Data(info, kind, loader, Validation(validation, batch), DecodeErrorLog(), summary)


def _check_fingerprint(source: RecordSet, directory: str, parent: Parent, params: Any) -> None:
    autoencoder = autoencoders.make_autoencoder(parent.spec.autoencoder)
    ours, theirs = autoencoder.fingerprint(params[AUTOENCODER]), source.info.fingerprint
    if ours != theirs:
        raise InputError(
            f"the data set {directory} was encoded by another autoencoder: by "
            f"{source.info.autoencoder_name!r} with fingerprint {theirs}, while {parent.name!r} "
            f"has {ours}; name that one, or encode the images again with hmar tokenize"
        )


def _info(config: ConfigDict, source: Source | RecordSet) -> DataInfo:
    return DataInfo(config.data.source, source.num_classes, source.class_names, len(source))


def _summary(info: DataInfo, num_held_out: int) -> str:
    return (
        f"{printable(info.source)}: {info.num_images} images of {info.num_classes} classes to "
        f"train on, {num_held_out} held out"
    )


def _check_batch_size(config: ConfigDict, rows: int) -> None:
    if config.batch_size > rows:
        raise InputError(
            f"config.batch_size must be at most {rows}, the images of {config.data.source}; "
            f"got {config.batch_size}"
        )


def _validation_batch(config: ConfigDict, mesh: Mesh, num_images: int) -> int:
    """Images of a validation batch of all hosts; the last one is padded."""
    parts = sharding.batch_parts(mesh)
    return -(-min(config.batch_size, num_images, _MAX_EVAL_BATCH) // parts) * parts


def _preview_images(config: ConfigDict, count: int, side: int, data: _Data) -> np.ndarray | None:
    """Held-out images, the same on every host: (count, side, side, 3) uint8."""
    if not count or data.held_out is None:
        return None
    few = make_loader(  # a loader replaces images that cannot be decoded
        data.held_out,
        settings.from_group(Transform, config.data.transform, side=side),
        batch_size=min(count, len(data.held_out)),
        seed=0,
        train=False,
        threads=0,
        broken=data.decode_errors,
    )
    return next(iter(few))["image"]


def recorded_source_config(model: str) -> SourceConfig | None:
    """What a run read of its data; None if `model` is no run directory.

    Other commands that open the data of a run open the same split with it.
    """
    path = files.absolute(model) / "config.json"
    found = files.read_json(path, "the config of a model or a run") if path.exists() else None
    if not runs.is_run(found):
        return None
    data = found.get("config", {}).get("data", {})
    directory = records_directory(data.get("source", ""))
    if directory and has_info(directory):
        info = read_info(directory)
        return SourceConfig(held_out=info.held_out, folder_rules=info.folder_rules)
    known = {field.name for field in dataclasses.fields(SourceConfig)}
    kept = {name: value for name, value in data.items() if name in known}
    schema = ConfigSchema({"": (), "data": (SourceConfig,)})
    return settings.from_group(SourceConfig, schema.upgrade({"data": kept})["data"])


# Planning


def task_shapes(
    config: ConfigDict, parent: Parent | None, data: DataInfo, kind: str | None = None
) -> tuple[Any, Any, dict[str, jax.ShapeDtypeStruct], str]:
    """The task of a config, and the shapes of its frozen parameters and batches: without data.

    Args:
      kind: of the batches; None: records where the task takes them, else images.
    """
    trainable, task_kind_ = task_kind(config)
    task_kind_.schema.check(config)
    task = trainable.make_task(config, parent, data).task
    if kind is None:
        kind = next(iter(sorted(task.input_kinds - {"image"})), "image")
    params = {}
    if parent is not None:
        alone = isinstance(parent.spec, AutoencoderSpec)
        owner = models if alone else families.get_family(parent.spec.family)
        params = jax.eval_shape(lambda: owner.init_params(parent.spec, jax.random.key(0)))
    frozen = trainable.frozen_params(config, parent, params, _frozen_kind(config, kind))
    return task, frozen, task.batch_shapes(kind), kind
