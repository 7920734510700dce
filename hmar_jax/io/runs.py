"""Run directories: their config.json, and what may change between two starts of a run."""

import json
from typing import Any

from ml_collections import ConfigDict

from hmar_jax import config_files
from hmar_jax.errors import InputError
from hmar_jax.io import files

FORMAT = "hmar_jax run 1"


def run_config(spec: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The contents of a run's config.json: the whole training config, and the model it makes."""
    return {"format": FORMAT, "config": config, "model": spec}


def is_run(config: Any) -> bool:
    """Whether the contents of a config.json are those of a run."""
    return isinstance(config, dict) and config.get("format") == FORMAT


def saved_config(workdir: str, schema: config_files.ConfigSchema) -> dict[str, Any] | None:
    """The config that a run was started with, in present names; None where there is no run yet."""
    saved = files.absolute(workdir) / "config.json"
    if not saved.exists():
        return None
    found = files.read_json(saved, "the config of a run")
    return schema.upgrade(found.get("config", {})) if is_run(found) else None


def prepare(
    workdir: str, config: ConfigDict, spec: dict[str, Any], schema: config_files.ConfigSchema
) -> None:
    """Makes a run directory, or checks that it is this run's.

    Raises:
      InputError: the directory cannot be written, holds something else, or a run with another
        config.
    """
    directory = files.absolute(workdir)
    ours = run_config(spec, config_files.to_dict(config))
    saved = directory / "config.json"
    if saved.exists():
        theirs = files.read_json(saved, "the config of a run")
        if not is_run(theirs):
            raise InputError(f"{workdir}/config.json is not a run's; choose another --workdir")
        before = schema.upgrade({"family": config.family, **theirs.get("config", {})})
        difference = config_files.first_difference(before, ours["config"], schema.harmless())
        if difference:
            raise InputError(
                f"{workdir} holds a run with another config: {difference}; "
                "choose another --workdir, or use the run's config"
            )
    elif directory.is_dir():
        leftovers = (".tmp",)  # of a process that was killed
        if any(not path.name.endswith(leftovers) for path in directory.iterdir()):
            raise InputError(
                f"{workdir} is neither empty nor a run directory (no config.json); "
                "choose another --workdir"
            )
    elif directory.exists():
        raise InputError(f"workdir must be a directory; {workdir} is a file")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(ours, indent=1, sort_keys=True)
        files.write_atomically(saved, text)  # first: it makes this a run directory
        (directory / "samples").mkdir(exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot write workdir {workdir}: {e.strerror or e}") from None
