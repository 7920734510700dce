"""Reading models: by a bundled name, from a run or model directory, or from published weights."""

import os
import pathlib
from typing import Any

from etils import epath

from hmar_jax import families, settings
from hmar_jax.autoencoders.base import AUTOENCODER, AutoencoderSpec
from hmar_jax.errors import InputError
from hmar_jax.io import checkpoints, files, models, runs

_BUNDLED = pathlib.Path(__file__).resolve().parent / "bundled"


def bundled_models() -> list[str]:
    """Names of the models that come with the package."""
    if not _BUNDLED.is_dir():
        return []
    return sorted(p.name for p in _BUNDLED.iterdir() if (p / "config.json").is_file())


def load_spec_and_params(name: str, checkpoint: int | str = "latest") -> tuple[Any, dict]:
    """As `load`, but the spec and all parameters, by part, on the host."""
    directory = pathlib.Path(name) if files.is_local(name) else epath.Path(name)

    def exists(folder):
        config = folder / "config.json"
        # os.path: unlike Path.is_file, False for any nonsense
        return os.path.isfile(config) if files.is_local(folder) else config.exists()

    if name in bundled_models() and not exists(directory):
        directory = _BUNDLED / name
    if not exists(directory):
        raise InputError(
            f"model must be a bundled model ({', '.join(bundled_models()) or 'none'}) or a "
            f"directory with a config.json; got {name!r}"
        )
    where = str(directory / "config.json")
    config = files.read_json(directory / "config.json", "the config of a model or a run")
    if runs.is_run(config):
        return _load_run(directory, families.spec_from_json(config.get("model"), where), checkpoint)
    if checkpoint != "latest":
        raise InputError(
            f"checkpoint {checkpoint!r} of {name!r}: only runs have checkpoints; this is a model"
        )
    config, params = models.load_model(directory)
    return families.spec_from_json(config, where), params


def _load_run(directory: pathlib.Path | epath.Path, spec: Any, checkpoint: int | str):
    _, saved = checkpoints.load_params_of_run(directory, averaged=True, checkpoint=checkpoint)
    trained = saved["params"]
    if isinstance(spec, AutoencoderSpec):
        return spec, {AUTOENCODER: trained}
    family = families.get_family(spec.family)
    parent_params: dict = {}
    for kind in family.TASKS.values():
        if kind.parent_folder and (directory / kind.parent_folder / "config.json").exists():
            _, parent_params = models.load_model(directory / kind.parent_folder)
    return spec, family.assemble_params(spec, trained, parent_params)


def convert_torch_files(model: str | None = None, family: str = "", **options) -> tuple[Any, dict]:
    """As `from_torch`, but the spec and the parameters on the host."""
    module = families.get_family(family or families.DEFAULT_FAMILY)
    if module.ConvertConfig is None:
        raise InputError(f"the family {module.NAME!r} has no published weights to read")
    given = settings.resolve_names(module.ConvertConfig, options)
    given = {name: value for name, value in given.items() if value is not None}
    return module.convert(model, module.ConvertConfig(**given))
