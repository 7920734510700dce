"""Extending a run: what a command changes in a run that has begun, and what follows from it.

Schedules, data order, intervals and everything else follow from the changed config and from the
history in the run directory (io/history.py), so that an extended run resumes as exactly as any.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from hmar_jax import config_files
from hmar_jax.config_files import ConfigSchema, flatten
from hmar_jax.errors import InputError
from hmar_jax.io import history, identity, runs
from hmar_jax.io.history import Change, History, Segment
from hmar_jax.io.identity import Inputs
from hmar_jax.io.runs import StartedRun
from hmar_jax.progress import announce
from hmar_jax.training import run_length
from hmar_jax.training.compiled_steps import CompiledSteps
from hmar_jax.training.metrics import LOGGER
from hmar_jax.training.task import Params

_SOURCE = "data.source"
_AVERAGE = "ema_params"  # a part of the state
_COPIES = "data.cached_copies"  # where it changes, batches come from other records


def has_other_stream(config: ConfigDict, run: StartedRun, data: Mapping[str, Any]) -> bool:
    """Whether a config gives other training images than the run has, or in another order.

    Args:
      data: of describe_data, for the config.
    """
    former = run.data or {}
    if "train" in former:
        differs = former["train"] != data["train"]
    else:  # an earlier version, which knew a data set by its place
        differs = not identity.same_place(run.config["data"]["source"], data["source"])
    copies = dict(flatten(run.config)).get(_COPIES), config.data.get("cached_copies")
    return differs or copies[0] != copies[1]


def next_segment(config: ConfigDict, run: StartedRun | None, begins_anew: bool) -> Segment:
    """The segment that the next step belongs to.

    Args:
      config: with the batch size of the next step.
      run: the run so far, if there is one.
      begins_anew: whether its training images are those of another stream.
    """
    if run is None:
        return Segment(0, 0, config.batch_size)
    present = history.segments(run.history, run.config["batch_size"])[-1]
    if begins_anew:
        return Segment(run.step, 0, config.batch_size)
    if config.batch_size != present.batch_size:
        return Segment(run.step, present.position_at(run.step), config.batch_size)
    return present


def former_steps(run: StartedRun, num_images: int) -> int:
    """The run's last step so far."""
    if run.history:
        return run.history[-1].last_step[1]
    images = run.data["train"]["images"] if run.data and "train" in run.data else num_images
    return run_length.total_steps(run.config, images, Segment(0, 0, run.config["batch_size"]))


def keep(
    config: ConfigDict, schema: ConfigSchema, run: StartedRun, steps: int, *, extend: bool
) -> tuple[ConfigDict, dict[str, tuple[Any, Any]]]:
    """A copy of a config with the run's own values of keys that an extension must not change back.

    See run_length.keep_shortened. A later start with the same command keeps them too, as the
    history tells.

    Args:
      steps: of the run so far.
      extend: whether the command may change the run.

    Returns:
      The config, and what is kept now: by key, the value that was given and the run's own.
    """
    found, saved = config.copy_and_resolve_references(), dict(flatten(run.config))
    known = {key: pair for change in run.history for key, pair in change.kept.items()}
    known = {
        key: (given, own)
        for key, (given, own) in known.items()
        if saved.get(key) == own and config_files.get_value(config, key) == given
    }
    new = run_length.keep_shortened(config, schema, run.config, steps) if extend else {}
    for key, (_, own) in {**known, **new}.items():
        config_files.set_value(found, key, own)
    return found, {key: pair for key, pair in new.items() if key not in known}


def find_change(
    config: ConfigDict,
    spec: Mapping[str, Any],
    schema: ConfigSchema,
    inputs: Inputs,
    run: StartedRun,
    segment: Segment,
    begins_anew: bool,
    steps: tuple[int, int],
    kept: Mapping[str, tuple[Any, Any]],
) -> Change | None:
    """What a start changes in a run; None if nothing.

    Args:
      config: of this start, with everything within the run.
      spec: of the model that comes out, as JSON.
      inputs: of this start.
      run: the run so far.
      segment, begins_anew: see `next_segment`.
      steps: the run's last step so far, and of this start.
      kept: of `keep`.
    """
    old = dict(flatten(run.config))
    new = dict(flatten(config_files.to_dict(config)))
    keys = config_files.differing_keys(old, new, schema.harmless() | schema.inputs())
    keys += identity.file_differences(old, new, run.contents.get("files", {}), inputs)
    images = runs.data_differences(run.contents, run.config, inputs, ("before", "now"))
    if images and old.get(_SOURCE) != new.get(_SOURCE):
        keys.append(_SOURCE)
    names = (run.contents.get("model") or {}).get("class_names", ())
    images += identity.class_differences(names, spec.get("class_names", ()))
    if not (keys or images):
        return None
    return Change(
        run.step,
        steps,
        {key: (old.get(key), new.get(key)) for key in keys},
        segment.position_at(run.step),
        begins_anew,
        identity.shorten(images),
        kept,
    )


def check(start: History, schema: ConfigSchema) -> None:
    """Raises InputError where a run has passed what an extension changes."""
    change = start.new
    if change is None:
        return
    step, (_, steps) = change.from_step, change.last_step
    if steps <= step:
        raise InputError(
            f"the extended run must have more than {step} steps, which are done; got {steps}; give "
            f"more config.steps or config.epochs"
        )
    for key in sorted(schema.happen_once() & change.changes.keys()):
        old, new = change.changes[key]
        if old < step:
            raise InputError(
                f"config.{key} must stay {old}, as this happens once, and the run has reached step "
                f"{step}; got {new}"
            )
        if new < step:
            raise InputError(
                f"config.{key} must be at least {step}, the step that the run has reached; "
                f"got {new}"
            )


def begin_new_parts(state: Any, steps: CompiledSteps, key: jax.Array, frozen: Params) -> Any:
    """The state of a checkpoint, with the parts that it lacks as in a new run.

    A moving average of the parameters begins with the present ones.

    Args:
      state: of RunCheckpoints.restore_latest; parts that the checkpoint lacks are abstract.
      key: of the initialization.
      frozen: parameters that the task does not change, on the devices.
    """
    is_abstract = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    missing = tuple(
        field.name
        for field in dataclasses.fields(state)
        if any(map(is_abstract, jax.tree.leaves(getattr(state, field.name))))
    )
    if not missing:
        return state

    def begin(key, frozen, params):
        new = steps.init(key, frozen) if missing != (_AVERAGE,) else None
        average = jax.tree.map(jnp.copy, params)  # its own arrays: the state is donated
        return {part: average if part == _AVERAGE else getattr(new, part) for part in missing}

    places = {
        part: jax.tree.map(lambda x: x.sharding, getattr(steps.state, part)) for part in missing
    }
    announce("compiling the initialization of what the checkpoint lacks")
    parts = jax.jit(begin, out_shardings=places)(key, frozen, state.params)
    LOGGER.info("begun anew, as the checkpoint lacks it: %s", ", ".join(missing))
    return state.replace(**parts)
