"""What a config counts in steps or images must lie within the run, which may be short.

Intervals of a long run, or its warm-up, would never come to an end in a run of a few hundred steps.
Which settings these are, and what share of a short run they get, their declarations say
(settings.Declaration.share_of_run).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from hmar_jax import settings
from hmar_jax.config_files import ConfigSchema, flatten, get_value, set_value
from hmar_jax.io.history import Segment

_FEW_STEPS = 500  # the shortest shipped recipe has twice as many


def fit_to_run(
    config: ConfigDict, schema: ConfigSchema, steps: int, saved: Mapping[str, Any] | None = None
) -> tuple[ConfigDict, list[str]]:
    """A copy of a config in which all that counts in steps lies within the run, and what changed.

    Args:
      config: checked.
      steps: of the run.
      saved: the config that the run was started with, if it was. A value that changes results and
        that the run was started with stays as it is.
    """
    found = config.copy_and_resolve_references()
    before = dict(flatten(saved or {}))
    intervals, notes = [], []
    for name, value, declared in _counted(config, schema):
        total = steps if declared.counts == "steps" else steps * config.batch_size
        if _lies_within(value, total, declared):
            continue
        fitting = _share(total, declared)
        beyond = f"config.{name}={value} is not reached within the run's {total} {declared.counts}"
        if declared.harmless:
            intervals.append(f"{name}={fitting}")
        elif fitting < 1:  # a few steps, to try something out
            notes.append(beyond)
            continue
        elif before.get(name) == value:
            notes.append(f"{beyond}; it stays, as the run was started with it")
            continue
        else:
            notes.append(f"{beyond}; using {fitting}")
        set_value(found, name, fitting)
    if intervals:
        notes.append(
            f"intervals longer than the run's {steps} steps are shortened: {', '.join(intervals)}"
        )
    return found, notes


def _lies_within(value: int, total: int, declared: settings.Declaration) -> bool:
    return value < total or (value == total and declared.harmless)


def _share(total: int, declared: settings.Declaration) -> int:
    """What a run gets that is too short for a value; below 1 where it has no room for any."""
    assert declared.share_of_run is not None
    fitting = int(total * declared.share_of_run)
    return max(1, fitting) if declared.harmless else fitting


def keep_shortened(
    config: ConfigDict, schema: ConfigSchema, saved: Mapping[str, Any], former_steps: int
) -> dict[str, tuple[int, int]]:
    """What an extension must not change back: values that were shortened for the run so far.

    A warm-up of 500 steps became 20 in a run of 400. In a run that is extended to 800 steps, the
    same command would have it begin to warm up again.

    Args:
      config: checked, of the extended run.
      saved: the config of the run so far, upgraded.
      former_steps: of the run so far.

    Returns:
      By key, the value in `config` and that of the run.
    """
    before, found = dict(flatten(saved)), {}
    for name, value, declared in _counted(config, schema):
        per_step = 1 if declared.counts == "steps" else saved["batch_size"]
        total = former_steps * per_step
        if declared.harmless or _lies_within(value, total, declared):
            continue
        fitting = _share(total, declared)
        if fitting >= 1 and before.get(name) == fitting != value:
            found[name] = (value, fitting)
    return found


def total_steps(config: Mapping[str, Any], num_images: int, segment: Segment) -> int:
    """The last step of a run: config.steps, or the end of config.epochs.

    Epochs are counted in the stream of training images that the segment belongs to. So they are
    those of the whole run, also where its batch size changed, or those of the present data set,
    where another one began.

    Args:
      num_images: images of an epoch.
      segment: the present one of the run.
    """
    if config["steps"] or not config.get("epochs"):
        return config["steps"]
    left = config["epochs"] * num_images - segment.position
    return segment.from_step + max(0, left) // config["batch_size"]


def with_steps(config: ConfigDict, steps: int) -> ConfigDict:
    """The config of a task of so many steps, also where it gives epochs; 0 steps: as it is."""
    if not steps or config.steps == steps:
        return config
    found = config.copy_and_resolve_references()
    found.steps = steps
    return found


def _counted(
    config: ConfigDict, schema: ConfigSchema
) -> Iterator[tuple[str, int, settings.Declaration]]:
    """Dotted names, values and declarations of the settings that count within the run."""
    for group in schema.groups:
        for key, (_, field) in schema.fields(group).items():
            declared = settings.declaration(field)
            if declared.share_of_run is not None:
                name = f"{group}.{key}" if group else key
                yield name, get_value(config, name), declared


def warnings(steps: int, batch_size: int, num_images: int) -> list[str]:
    """What speaks against a run from scratch of so many steps, in words."""
    found = []
    if steps < _FEW_STEPS:
        found.append(
            f"a run of {steps} steps is short: the smallest shipped recipe has 1000; give more "
            "config.steps or config.epochs"
        )
    if (steps + 1) * batch_size <= num_images:
        found.append(
            f"{steps} steps of {batch_size} images end before each of the {num_images} images was "
            "seen once; give more config.steps or config.epochs"
        )
    return found
