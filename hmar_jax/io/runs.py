"""Run directories: their config.json, and what may change between two starts of a run."""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from hmar_jax import config_files
from hmar_jax.errors import InputError
from hmar_jax.io import checkpoints, files, history, identity
from hmar_jax.io.history import Change, History
from hmar_jax.io.identity import Inputs

FORMAT = "hmar_jax run 1"


def run_config(
    spec: dict[str, Any],
    config: dict[str, Any],
    data: list[dict[str, Any]] | None = None,
    files: dict[str, str] | None = None,
    history: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The contents of a run's config.json.

    Args:
      spec: the model that the run makes.
      config: the whole training config.
      data: the data sets that the run was trained on, the present one last; docs/data.md describes
        them.
      files: fingerprints of the other files that the config names, by key.
      history: what was changed after the start, see io/history.py.
    """
    contents: dict[str, Any] = {"format": FORMAT, "config": config, "model": spec}
    more = {"data": data, "files": files, "history": list(history)}
    return contents | {name: value for name, value in more.items() if value}


def is_run(config: Any) -> bool:
    """Whether the contents of a config.json are those of a run."""
    return isinstance(config, dict) and config.get("format") == FORMAT


@dataclasses.dataclass(frozen=True)
class StartedRun:
    """A run that is resumed or extended.

    Attributes:
      contents: of its config.json.
      config: the config that it was started with or last extended to, in present names.
      step: of its newest checkpoint, damaged or not; 0 without one.
      history: the changes since its start. None lies beyond `step`: see history.rewound.
      data: the last of the data sets that it was trained on; None where it was not recorded.
    """

    contents: dict[str, Any]
    config: dict[str, Any]
    step: int
    history: tuple[Change, ...]
    data: dict[str, Any] | None


def find(workdir: str, schema: config_files.ConfigSchema) -> StartedRun | None:
    """The run in a directory; None where there is none yet.

    Raises:
      InputError: its config.json cannot be read.
    """
    saved = files.absolute(workdir) / "config.json"
    if not saved.exists():
        return None
    contents = files.read_json(saved, "the config of a run")
    if not is_run(contents):
        return None
    config = schema.upgrade(contents.get("config", {}))
    step = max(checkpoints.steps_of_run(workdir), default=0)
    changes = history.read(contents, str(saved))
    changes = history.rewound(changes, config.get("batch_size", 0), step)
    known = contents.get("data", [])
    return StartedRun(contents, config, step, changes, known[-1] if known else None)


def settle(workdir: str, config: ConfigDict, schema: config_files.ConfigSchema) -> ConfigDict:
    """The config with values for empty keys that a run keeps from its start.

    Such a key has the value of the run in `workdir`, or else that of a new run.

    Raises:
      InputError: the run's config.json cannot be read.
    """
    run = find(workdir, schema)
    return schema.settle(config, None if run is None else run.config)


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


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run directory that was compared with a start of its run.

    Attributes:
      former: the contents of its config.json; None: there is no run yet.
      present: what they are to be.
      images: how the run's images changed, in words, where that is allowed; or None.
    """

    workdir: str
    former: dict[str, Any] | None
    present: dict[str, Any]
    images: str | None

    def write(self) -> None:
        """Makes the directory, and writes its config.json where that is new.

        Raises:
          InputError: the directory cannot be written.
        """
        _write(self.workdir, files.absolute(self.workdir), self.former, self.present)


def compare(
    workdir: str,
    config: ConfigDict,
    spec: dict[str, Any],
    schema: config_files.ConfigSchema,
    inputs: Inputs | None = None,
    allow_data_change: bool = False,
    changes: History | None = None,
    extend: bool = False,
) -> Prepared:
    """Checks that a directory is this run's, or may become a run's. Nothing is written.

    Args:
      workdir: the directory, local or gs://.
      config: the whole training config.
      spec: the model that the run makes, as JSON.
      schema: of the config.
      inputs: what else the run is made from.
      allow_data_change: accept other images than those that the run was trained on, and record
        them.
      changes: the run's history, and what this start changes.
      extend: accept a changed config, and record it.

    Raises:
      InputError: the directory holds something else, or a run with another config, model, parent or
        data set.
    """
    ours, theirs, images = config_files.to_dict(config), read(workdir), []
    inputs, known = inputs or Inputs(), []
    entries: list[dict[str, Any]] = []
    if theirs is not None:
        images = _compare(workdir, theirs, ours, spec, schema, inputs, allow_data_change, extend)
        known, entries = theirs.get("data", []), theirs.get("history", [])
    if inputs.data is not None and (images or not known):
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        known = [*known, {"first_seen": now, **inputs.data}]
    if changes is not None:
        recorded = [*changes.recorded, *([changes.new.stamped()] if changes.new else [])]
        entries = [change.to_json() for change in recorded]
    fingerprints = {**(theirs or {}).get("files", {}), **inputs.files}
    present = run_config(spec, ours, known, fingerprints, entries)
    return Prepared(workdir, theirs, present, identity.shorten(images) if images else None)


def _compare(
    workdir: str,
    theirs: dict[str, Any],
    config: dict[str, Any],
    spec: dict[str, Any],
    schema: config_files.ConfigSchema,
    inputs: Inputs,
    allow_data_change: bool,
    extend: bool,
) -> list[str]:
    """Raises InputError where a run must not continue; returns how its images changed."""
    before = schema.upgrade({"family": config.get("family"), **theirs.get("config", {})})
    model = theirs.get("model") or {}
    fixed, others, classes, data = identity.task_differences(before, config), [], [], []
    if not fixed:  # of another task everything else would differ too
        fixed, others = _key_differences(theirs, before, config, schema, inputs)
        classes = identity.class_differences(
            model.get("class_names", ()), spec.get("class_names", ())
        )
        data = data_differences(theirs, before, inputs)
    if not (fixed or classes) and (extend or not (others or data)):
        may_differ = schema.harmless() | (schema.extendable() if extend else set())
        fixed = identity.model_differences(model, spec, may_differ)
    # Names may change where labels do not: of a task without labels, or of the same images.
    only_names = not inputs.labels_matter or bool(theirs.get("data") and not data)
    accepted = allow_data_change or (extend and not inputs.labels_matter)
    if classes and only_names and accepted:
        data, classes = [*data, *classes], []

    problems, cures = [], []
    if extend and fixed:
        problems.append(f"what --extend cannot change: {identity.shorten(fixed)}")
        cures.append("use the run's config")
    elif not extend and (fixed or others):
        problems.append(f"another config: {identity.shorten(sorted([*fixed, *others]))}")
        cures.append("use the run's config" + ("" if fixed else ", or change it with --extend"))
    if classes:
        problems.append(f"other classes: {', '.join(classes)}")
        accept = ", or accept these with --allow_data_change" if only_names else ""
        cures.append(f"restore its classes{accept}")
    elif data and not (allow_data_change or extend):
        problems.append(f"other images: {', '.join(data)}")
        cures.append(
            "restore its images, or accept these with --allow_data_change or, to begin anew with "
            "them, --extend"
        )
    if problems:
        ways = ["choose another --workdir", ", and ".join(cures)]
        if not checkpoints.steps_of_run(workdir):
            ways.insert(1, f"delete {workdir}, which has no checkpoint yet")
        raise InputError(
            f"{workdir} holds a run with {'; with '.join(problems)}; {', or '.join(ways)}"
        )
    return data


def _key_differences(
    theirs: dict[str, Any],
    before: dict[str, Any],
    config: dict[str, Any],
    schema: config_files.ConfigSchema,
    inputs: Inputs,
) -> tuple[list[str], list[str]]:
    """Differences of config, parent and files: those that stay, and those that --extend accepts."""
    keys = identity.config_differences(before, config, schema)
    extendable = schema.extendable()
    fixed = [text for key, text in keys.items() if key not in extendable]
    fixed += [inputs.parent_difference] if inputs.parent_difference else []
    named = identity.file_differences(before, config, theirs.get("files", {}), inputs)
    fixed += [text for key, text in named.items() if key in inputs.fixed_files]
    others = [text for key, text in keys.items() if key in extendable]
    others += [text for key, text in named.items() if key not in inputs.fixed_files]
    return fixed, others


def data_differences(
    theirs: dict[str, Any],
    before: dict[str, Any],
    inputs: Inputs,
    words: tuple[str, str] = ("there", "here"),
) -> list[str]:
    """How the data set of a run changed, in words.

    Args:
      theirs: the contents of the run's config.json.
      before: its config, in present names.
      words: see identity.data_differences.
    """
    if inputs.data is None:
        return []
    if theirs.get("data"):
        return identity.data_differences(theirs["data"][-1], inputs.data, words)
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
