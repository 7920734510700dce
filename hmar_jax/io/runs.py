"""Run directories: their config.json, and what may change between two starts of a run."""

import datetime
import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from hmar_jax import config_files
from hmar_jax.errors import InputError
from hmar_jax.io import files, identity
from hmar_jax.io.identity import Inputs

FORMAT = "hmar_jax run 1"


def run_config(
    spec: dict[str, Any],
    config: dict[str, Any],
    data: list[dict[str, Any]] | None = None,
    files: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The contents of a run's config.json.

    Args:
      spec: the model that the run makes.
      config: the whole training config.
      data: the data sets that the run was trained on, the present one last; docs/data.md describes
        them.
      files: fingerprints of the other files that the config names, by key.
    """
    contents: dict[str, Any] = {"format": FORMAT, "config": config, "model": spec}
    return contents | ({"data": data} if data else {}) | ({"files": files} if files else {})


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


def settle(workdir: str, config: ConfigDict, schema: config_files.ConfigSchema) -> ConfigDict:
    """The config with values for empty keys that a run keeps from its start.

    Such a key has the value of the run in `workdir`, or else that of a new run.

    Raises:
      InputError: the run's config.json cannot be read.
    """
    return schema.settle(config, saved_config(workdir, schema))


def read(workdir: str) -> dict[str, Any] | None:
    """Reads the config.json of a run; None if the directory is new or empty.

    Raises:
      InputError: the directory holds something else.
    """
    directory = files.absolute(workdir)
    saved = directory / "config.json"
    if saved.exists():
        found = files.read_json(saved, "the config of a run")
        if not is_run(found):
            raise InputError(f"{workdir}/config.json is not a run's; choose another --workdir")
        return found
    if directory.is_dir():
        leftovers = (".tmp",)  # of a process that was killed
        if any(not path.name.endswith(leftovers) for path in directory.iterdir()):
            raise InputError(
                f"{workdir} is neither empty nor a run directory (no config.json); "
                "choose another --workdir"
            )
    elif directory.exists():
        raise InputError(f"workdir must be a directory; {workdir} is a file")
    return None


def prepare(
    workdir: str,
    config: ConfigDict,
    spec: dict[str, Any],
    schema: config_files.ConfigSchema,
    inputs: Inputs | None = None,
    allow_data_change: bool = False,
) -> str | None:
    """Makes a run directory, or checks that it is this run's. Everything is compared first.

    Args:
      workdir: the directory, local or gs://.
      config: the whole training config.
      spec: the model that the run makes, as JSON.
      schema: of the config.
      inputs: what else the run is made from.
      allow_data_change: accept other images than those that the run was trained on, and record
        them.

    Returns:
      How the images changed, where that was allowed.

    Raises:
      InputError: the directory cannot be written, holds something else, or a run with another
        config, model, parent or data set. Nothing has been written then.
    """
    directory, ours = files.absolute(workdir), config_files.to_dict(config)
    theirs, changes = read(workdir), []
    inputs, known = inputs or Inputs(), []
    if theirs is not None:
        changes = _compare(workdir, theirs, ours, spec, schema, inputs, allow_data_change)
        known = theirs.get("data", [])
    if inputs.data is not None and (changes or not known):
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        known = [*known, {"first_seen": now, **inputs.data}]
    fingerprints = {**(theirs or {}).get("files", {}), **inputs.files}
    _write(workdir, directory, theirs, run_config(spec, ours, known, fingerprints))
    return identity.shorten(changes) if changes else None


def _compare(
    workdir: str,
    theirs: dict[str, Any],
    config: dict[str, Any],
    spec: dict[str, Any],
    schema: config_files.ConfigSchema,
    inputs: Inputs,
    allow_data_change: bool,
) -> list[str]:
    """Raises InputError where a run must not resume; returns how its images changed."""
    before = schema.upgrade({"family": config.get("family"), **theirs.get("config", {})})
    model = theirs.get("model") or {}
    keys, classes, data = identity.task_differences(before, config), [], []
    if not keys:  # of another task everything else would differ too
        keys = identity.config_differences(before, config, schema)
        keys += identity.input_differences(before, config, theirs.get("files", {}), inputs)
        classes = identity.class_differences(
            model.get("class_names", ()), spec.get("class_names", ())
        )
        data = _data_differences(theirs, before, inputs)
    if not (keys or classes or data):
        keys = identity.model_differences(model, spec, schema)
    # Names may change where labels do not: of a task without labels, or of the same images.
    only_names = not inputs.labels_matter or bool(theirs.get("data") and not data)
    if classes and only_names and allow_data_change:
        data, classes = [*data, *classes], []

    problems, cures = [], []
    if keys:
        problems.append(f"another config: {identity.shorten(keys)}")
        cures.append("use the run's config")
    if classes:
        problems.append(f"other classes: {', '.join(classes)}")
        accept = ", or accept these with --allow_data_change" if only_names else ""
        cures.append(f"restore its classes{accept}")
    elif data and not allow_data_change:
        problems.append(f"other images: {', '.join(data)}")
        cures.append("restore its images, or accept these with --allow_data_change")
    if problems:
        raise InputError(
            f"{workdir} holds a run with {'; with '.join(problems)}; choose another --workdir, or "
            f"{', and '.join(cures)}"
        )
    return data


def _data_differences(theirs: dict[str, Any], before: dict[str, Any], inputs: Inputs) -> list[str]:
    if inputs.data is None:
        return []
    if theirs.get("data"):
        return identity.data_differences(theirs["data"][-1], inputs.data)
    # An earlier version did not record what the data set contained.
    source, now = before["data"]["source"], inputs.data["source"]
    if identity.same_place(source, now):
        return []
    return [f"the run knows its data set by its place alone, which was {source!r} and is {now!r}"]


def _write(
    workdir: str, directory: epath.Path, old: dict[str, Any] | None, new: dict[str, Any]
) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if new != old:  # first: it makes this a run directory
            text = json.dumps(new, indent=1, sort_keys=True)
            files.write_atomically(directory / "config.json", text)
        (directory / "samples").mkdir(exist_ok=True)
    except OSError as e:
        what = f"{e.filename} in workdir" if e.filename else "workdir"
        raise InputError(f"cannot write {what} {workdir}: {e.strerror or e}") from None
