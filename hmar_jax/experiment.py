"""From a config to what the training loop runs: data, task, devices. It asks the registry.

config -> parent model (if any) -> data -> task -> Experiment
"""

import dataclasses
import functools
import hashlib
import math
import os
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hmar_jax import families, initialization, settings
from hmar_jax.autoencoders import models, reconstruction
from hmar_jax.autoencoders.base import AUTOENCODER, AutoencoderSpec
from hmar_jax.config_files import ConfigSchema
from hmar_jax.data.records import (
    has_info,
    read_info,
)
from hmar_jax.data.sources import KNOWN_SPECS, SourceConfig, records_directory
from hmar_jax.errors import InputError
from hmar_jax.experiment_data import TrainingData, held_out_images, open_data, preview_images
from hmar_jax.initialization import InitialModel
from hmar_jax.io import files, identity, runs
from hmar_jax.io.history import Segment
from hmar_jax.io.identity import Inputs
from hmar_jax.loading import is_copy, load_spec_and_params
from hmar_jax.parallel import processes, sharding
from hmar_jax.progress import phase
from hmar_jax.training import extension, run_length, weights_and_biases
from hmar_jax.training.config import MAX_STEPS
from hmar_jax.training.experiment import Experiment, FrozenModel
from hmar_jax.training.step import init_state
from hmar_jax.training.trainable import DataInfo, Parent, TaskKind


def task_kind(config: ConfigDict) -> tuple[Any, TaskKind]:
    """The family (or kind of autoencoder) that a config trains, and its kind of task.

    Raises:
      InputError: there is no such family or task.
    """
    trainable = families.get_trainable(config.get("family", ""), config.get("task", ""))
    task = config.get("task", "")
    if not isinstance(task, str) or task not in trainable.TASKS:
        raise InputError(f"config.task must be one of {', '.join(trainable.TASKS)}; got {task!r}")
    return trainable, trainable.TASKS[task]


def build_experiment(
    config: ConfigDict, workdir: str | None = None, extend: bool = False
) -> Experiment:
    """From a config; a run in `workdir` that resumes keeps the frozen parent it was started with.

    Args:
      extend: whether the config may change the run in `workdir`, which must be there.

    Raises:
      InputError: something in the config does not fit together. Nothing has been written then.
    """
    trainable, kind = task_kind(config)
    config, source = initialization.complete(config, trainable, kind, workdir)
    kind.schema.check(config)
    weights_and_biases.check_project(config.get("wandb", ""))
    if not config.data.source:
        encoded = ", or tokens:DIR" if kind.parent_key else ""
        raise InputError(
            "config.data.source is empty; give --config.data.source with one of "
            f"{KNOWN_SPECS}{encoded}"
        )
    run = runs.find(workdir, kind.schema) if workdir else None
    if extend and run is None:
        raise InputError(
            f"--extend requires a run, and there is none in {workdir}; leave it out to start one"
        )
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch(mesh, config.batch_size, config.get("grad_accum_steps", 1))
    parent, parent_params, parent_difference = _load_parent(config, kind, workdir)
    side = trainable.image_side(config, parent)
    data = open_data(config, mesh, side, parent, parent_params)
    start = extension.begin(
        config, kind.schema, run, data.described, data.info.num_images, extend=extend
    )

    def make_task(config):
        return trainable.make_task(start.with_total_steps(config), parent, data.info)

    config = start.config
    steps = make_task(config).task.steps
    if steps > MAX_STEPS:
        raise InputError(
            f"config.epochs must give at most {MAX_STEPS} steps; got {config.epochs} epochs of "
            f"{data.info.num_images} images, {steps} steps"
        )
    saved = run.config if run is not None else None
    config, notes = run_length.fit_to_run(config, kind.schema, steps, saved)
    notes += start.warnings()
    setup = make_task(config)
    initial = None
    if source is not None:
        initial = initialization.initial_params(config, trainable, setup, source)
        notes += initialization.tokenizer_warnings(source, parent, parent_params)
        setup = setup._replace(spec=initialization.with_provenance(setup.spec, source))
    task = setup.task
    if data.kind not in task.input_kinds:
        kinds = ", ".join(sorted(task.input_kinds))
        raise InputError(f"{config.data.source} gives {data.kind!r}; this task takes {kinds}")
    task.check_mesh(mesh)
    frozen = trainable.frozen_params(config, parent, parent_params, _frozen_kind(config, data.kind))
    # Whatever only the networks and the optimizer can find out.
    state = jax.eval_shape(functools.partial(init_state, task), jax.random.key(0), frozen)
    inputs = Inputs(
        data.described,
        _fingerprint_files(config, kind) | _fingerprint_source(kind, source),
        frozenset({kind.initial_key} - {None}),
        parent_difference,
        labels_matter=not isinstance(setup.spec, AutoencoderSpec),
    )
    if run is None or start.begins_anew:
        from_scratch = run is None and source is None
        notes += _warnings(setup, data, parent, parent_params, from_scratch)
    kept = None
    if setup.parent_spec is not None:
        parts = _kept_parts(setup, parent_params)
        kept = FrozenModel(kind.parent_folder, setup.parent_spec, parts)
    return Experiment(
        task,
        setup.spec,
        mesh,
        frozen,
        functools.partial(data.loader, start.segment.offset),
        data.validation,
        preview_images(config, task.num_preview_images, side, data),
        data.decode_errors,
        kind.schema,
        config,
        _overview(task, data, mesh, state.params, start.segment),
        tuple(notes),
        kept,
        inputs,
        start.history(config, setup.spec.to_json(), inputs, steps),
        initial,
    )


def _overview(task: Any, data: TrainingData, mesh: Mesh, params: Any, segment: Segment) -> str:
    """What a run trains and on what, in one line."""
    info, held_out = data.info, data.validation.num_images if data.validation else 0
    classes = f" of {info.num_classes} classes" if info.num_classes > 1 else ""
    devices = f"{mesh.size} {mesh.devices.flat[0].device_kind} device{'s' * (mesh.size > 1)}"
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    epochs = segment.position_at(task.steps) / info.num_images
    since = f" from step {segment.from_step + 1:,} on" if segment.offset else ""
    return (
        f"{info.num_images:,} images{classes} to train, {held_out:,} held out; {devices}; "
        f"{count:,} parameters; {task.steps:,} steps of {task.batch_size} images{since} "
        f"({epochs:.3g} epochs)"
    )


def _warnings(
    setup: Any, data: TrainingData, parent: Parent | None, parent_params: Any, from_scratch: bool
) -> list[str]:
    """Why a run may not work on data that it was not trained on yet, in words.

    Args:
      from_scratch: whether the run begins with random parameters; its length can be judged then.
    """
    task, found = setup.task, list(setup.warnings)
    if from_scratch:
        found = [
            *run_length.warnings(task.steps, task.batch_size, data.info.num_images),
            *found,
        ]
    if parent is not None and processes.is_primary():
        images = held_out_images(data)
        with phase(f"trying {parent.name} on held-out images"):
            found += reconstruction.warnings(
                parent.name, parent.spec.autoencoder, parent_params[AUTOENCODER], images
            )
    return found


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
) -> tuple[Parent | None, Any, str | None]:
    """The model that the config trains on top of.

    Returns:
      Its spec, its parameters on the host, and how it differs from that of the run in `workdir`.
    """
    if kind.parent_key is None:
        return None, {}, None
    key = kind.parent_key
    name = config[key]
    if not name:
        raise InputError(
            f"config.{key} is empty; give --config.{key}=MODEL, a run, a model directory or a "
            "bundled model"
        )
    kept = workdir and files.absolute(workdir) / kind.parent_folder
    resumes = workdir and (kept / "config.json").exists()
    loaded = load_spec_and_params(os.fspath(kept) if resumes else name)
    run = runs.read(workdir) if workdir else None
    former = run.get("config", {}).get(key) if run else name
    difference = None
    if former and not identity.same_place(former, name):
        if resumes:
            difference = _parent_difference(key, former, name, loaded)
        else:  # the run was killed before it had a copy
            difference = f"{key} is {former!r} there and {name!r} here"
    spec, params = loaded
    return Parent(name, spec), jax.tree.map(np.asarray, params), difference


def _parent_difference(key: str, former: str, name: str, kept: tuple[Any, Any]) -> str | None:
    """How the model `name` differs from the copy that a run keeps of `former`."""
    try:
        if is_copy(kept, load_spec_and_params(name)):
            return None
    except InputError as error:
        return f"{key} is {former!r} there and {name!r} here, which cannot be compared ({error})"
    return f"{key} is {former!r} there and {name!r}, another model, here"


def _fingerprint_files(config: ConfigDict, kind: TaskKind) -> dict[str, str]:
    """Fingerprints of the files that a config names beside its data set and its parent."""
    keys = kind.schema.inputs() - {"data.source", kind.parent_key, kind.initial_key}
    paths = {key: config.get(key, "") for key in keys}
    return {
        key: hashlib.blake2b(epath.Path(path).read_bytes(), digest_size=8).hexdigest()
        for key, path in sorted(paths.items())
        if path and epath.Path(path).exists()
    }


def _fingerprint_source(kind: TaskKind, source: InitialModel | None) -> dict[str, str]:
    if source is None or kind.initial_key is None:
        return {}
    return {kind.initial_key: initialization.fingerprint(source, kind.initial_key)}


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
