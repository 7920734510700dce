"""Reading models: by a bundled name, from a run or model directory, or from published weights."""

import functools
import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
from etils import epath

from hmar_jax import autoencoders, families, settings
from hmar_jax.autoencoders.base import AUTOENCODER, AutoencoderSpec
from hmar_jax.errors import InputError
from hmar_jax.io import checkpoints, files, models, runs
from hmar_jax.progress import phase

_BUNDLED = pathlib.Path(__file__).resolve().parent / "bundled"


def bundled_models() -> list[str]:
    """Names of the models that come with the package."""
    if not _BUNDLED.is_dir():
        return []
    return sorted(p.name for p in _BUNDLED.iterdir() if (p / "config.json").is_file())


def load_spec_and_params(name: str, checkpoint: int | str = "latest") -> tuple[Any, dict]:
    """Reads a model, its parameters on the host.

    Args:
      name: a bundled model (`bundled_models`), or a model or run directory, local or gs://.
      checkpoint: of a run: "latest", "best" or a step.

    Returns:
      The spec (families/base.py: Spec) and all parameters, by part; of a run the averaged ones.

    Raises:
      InputError: there is no such model or checkpoint, or its files cannot be read.
    """
    name = files.expand(name)
    directory = pathlib.Path(name) if files.is_local(name) else epath.Path(name)

    def exists(folder):
        config = folder / "config.json"
        # os.path: unlike Path.is_file, False for any nonsense
        return os.path.isfile(config) if files.is_local(folder) else config.exists()

    if name in bundled_models() and not exists(directory):
        directory = _BUNDLED / name
    if not exists(directory) and name.endswith((".pth", ".pt", ".ckpt", ".safetensors")):
        raise InputError(
            f"model must be a model directory, not a file of weights; convert it first: hmar "
            f"convert --torch={name} --tokenizer=vae.pth --out=MODEL"
        )
    if not exists(directory) and (run := _run_around(directory)) is not None:
        step = directory.name if directory.name.isdecimal() else "STEP"
        raise InputError(
            f"model must be a run, not its checkpoints; got {name!r}; give {run}, or make a model "
            f"of one: hmar export --model={run} --checkpoint={step} --out=MODEL"
        )
    if not exists(directory):
        raise InputError(
            f"model must be a bundled model ({', '.join(bundled_models()) or 'none'}) or a "
            f"directory with a config.json; got {name!r}"
        )
    jax.devices()  # without one, Orbax fails to read, and sound files would be called damaged
    config = files.read_json(directory / "config.json", "the config of a model or a run")
    with phase(f"reading the model {name}"):
        return _load(name, directory, config, checkpoint)


def _run_around(directory: Any) -> Any:
    """The run directory that RUN/checkpoints or RUN/checkpoints/STEP belongs to, or None."""
    for folder in (directory, directory.parent):
        if folder.name == "checkpoints" and (folder.parent / "config.json").exists():
            return folder.parent
    return None


def _load(
    name: str, directory: pathlib.Path | epath.Path, config: Any, checkpoint: int | str
) -> tuple[Any, dict]:
    where = str(directory / "config.json")
    if runs.is_run(config):
        spec = families.spec_from_json(config.get("model"), where)
        return _load_run(directory, spec, config["config"].get("task", ""), checkpoint)
    if checkpoint != "latest":
        raise InputError(
            f"checkpoint {checkpoint!r} of {name!r}: only runs have checkpoints; this is a model"
        )
    config, params = models.load_model(directory)
    spec = families.spec_from_json(config, where)
    # As where a directory was copied in part over an older one. Some parts fit by chance.
    failure = f"the parameters of the model {os.fspath(directory)} do not fit its config.json"
    models.check_shapes(_shapes(spec), params, failure)
    return spec, params


def _shapes(spec: Any) -> Any:
    """The parameters of a model, of which only the shapes are known."""
    if isinstance(spec, AutoencoderSpec):
        init = autoencoders.make_autoencoder(spec.autoencoder).init
        return jax.eval_shape(lambda key: {AUTOENCODER: init(key)}, jax.random.key(0))
    init_params = families.get_family(spec.family).init_params
    return jax.eval_shape(functools.partial(init_params, spec), jax.random.key(0))


def _load_run(
    directory: pathlib.Path | epath.Path, spec: Any, task: str, checkpoint: int | str
) -> tuple[Any, dict]:
    _, saved = checkpoints.load_params_of_run(directory, averaged=True, checkpoint=checkpoint)
    trained = saved["params"]
    if isinstance(spec, AutoencoderSpec):
        return spec, {AUTOENCODER: trained}
    family = families.get_family(spec.family)
    if task not in family.TASKS:
        raise InputError(
            f"config.task of the run {os.fspath(directory)!r} must be one of "
            f"{', '.join(family.TASKS)}; got {task!r}"
        )
    parent_params: dict = {}
    if folder := family.TASKS[task].parent_folder:
        _, parent_params = models.load_model(directory / folder)
    return spec, family.assemble_params(spec, trained, parent_params)


def is_copy(copy: tuple[Any, dict], model: tuple[Any, dict]) -> bool:
    """Whether a copy, of some parts of a model or of all, has its networks and parameters.

    Args:
      copy, model: spec and parameters, as `load_spec_and_params` returns them.
    """
    (spec, params), (other_spec, other_params) = copy, model
    networks, other = (
        {name: value for name, value in s.to_json().items() if isinstance(value, dict)}
        for s in (spec, other_spec)
    )
    shared = networks.keys() & other.keys() - {"sampling"}
    return all(networks[name] == other[name] for name in shared) and all(
        part in other_params
        and jax.tree.structure(tree) == jax.tree.structure(other_params[part])
        and all(map(np.array_equal, jax.tree.leaves(tree), jax.tree.leaves(other_params[part])))
        for part, tree in params.items()
    )


def fingerprint(spec: Any, params: dict) -> str:
    """16 hexadecimal digits that differ where a model samples, or its classes mean, another thing.

    A hash of the networks, the class names and every number of the parameters. Neither the place of
    the model counts, nor its default sampling options, nor the type that it computes in.

    Args:
      spec, params: as `load_spec_and_params` returns them; the parameters may be on devices.
    """
    described = spec.with_dtype("float32").to_json()
    left_out = ("format", "origin", "licence", "sampling")
    counted = {name: value for name, value in described.items() if name not in left_out}
    digest = hashlib.sha256(json.dumps(counted, sort_keys=True).encode())
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in leaves):
        digest.update(f"{path}{np.shape(leaf)}".encode())
        digest.update(np.ascontiguousarray(leaf, "<f4"))
    return digest.hexdigest()[:16]


def convert_torch_files(model: str | None = None, family: str = "", **options) -> tuple[Any, dict]:
    """Reads published PyTorch weights.

    Args:
      model: the file with the weights of the model; None: only the autoencoder's are given.
      family: of the model; empty: the default family.
      **options: of the family's ConvertConfig.

    Returns:
      The spec (families/base.py: Spec) and the parameters, by part, on the host.

    Raises:
      InputError: there is no such family, or the files are not weights that it can read.
    """
    module = families.get_family(family or families.DEFAULT_FAMILY)
    if module.ConvertConfig is None:
        raise InputError(f"the family {module.NAME!r} has no published weights to read")
    given = settings.resolve_names(module.ConvertConfig, options)
    given = {name: value for name, value in given.items() if value is not None}
    with phase("reading the weights"):
        return module.convert(model, module.ConvertConfig(**given))
