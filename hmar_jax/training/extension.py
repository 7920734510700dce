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
from hmar_jax.progress import phase
from hmar_jax.training import run_length
from hmar_jax.training.compiled_steps import CompiledSteps
from hmar_jax.training.metrics import LOGGER
from hmar_jax.training.task import Params

_SOURCE = "data.source"
_AVERAGE = "ema_params"  # a part of the state
_HELD_OUT = "data.held_out"
_COPIES = "data.cached_copies"  # where it changes, batches come from other records


@dataclasses.dataclass(frozen=True)
class Start:
    """A start of a run: a new one, one that resumes, or one that is extended.

    Attributes:
      config: as it was given, but for the values that the run keeps.
      schema: of the config.
      run: the run so far; None: there is none yet.
      segment: the one that the next step belongs to.
      begins_anew: whether its training images are those of another stream than before.
      num_images: of an epoch.
      kept: what an extension keeps: by key, the value that was given and the run's own.
    """

    config: ConfigDict
    schema: ConfigSchema
    run: StartedRun | None
    segment: Segment
    begins_anew: bool
    num_images: int
    kept: Mapping[str, tuple[Any, Any]]

    def with_total_steps(self, config: ConfigDict) -> ConfigDict:
        """A config for the task: with its number of steps also where it gives epochs."""
        steps = run_length.total_steps(config, self.num_images, self.segment)
        return run_length.with_steps(config, steps)

    def warnings(self) -> list[str]:
        """What the run's measures mean no longer, in words."""
        former = {} if self.run is None else dict(flatten(self.run.config))
        before, now = former.get(_HELD_OUT), self.config.data.get("held_out")
        if before is None or now <= before:
            return []
        return [
            f"config.{_HELD_OUT} {before:g} -> {now:g}: the run was trained on some of the images "
            "that are held out now, so validation says less about new ones"
        ]

    def history(
        self, config: ConfigDict, spec: Mapping[str, Any], inputs: Inputs, steps: int
    ) -> History:
        """The history of the run, with what this start changes.

        Args:
          config: with everything within the run.
          spec: of the model that comes out, as JSON.
          inputs: of this start.
          steps: the run's last step.
        """
        if self.run is None:
            return History(self.segment)
        return History(
            self.segment, self.run.history, self._find_change(config, spec, inputs, steps)
        )

    def _find_change(
        self, config: ConfigDict, spec: Mapping[str, Any], inputs: Inputs, steps: int
    ) -> Change | None:
        run = self.run
        assert run is not None
        old = dict(flatten(run.config))
        new = dict(flatten(config_files.to_dict(config)))
        may_change = self.schema.extendable() - self.schema.harmless()  # others are refused
        keys = [key for key in config_files.differing_keys(old, new) if key in may_change]
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
            (_former_steps(run, self.num_images), steps),
            {key: (old.get(key), new.get(key)) for key in keys},
            self.segment.position_at(run.step),
            self.begins_anew,
            identity.shorten(images),
            self.kept,
        )


def begin(
    config: ConfigDict,
    schema: ConfigSchema,
    run: StartedRun | None,
    data: Mapping[str, Any],
    num_images: int,
    *,
    extend: bool,
) -> Start:
    """What a config and a run so far give, as far as the data and the task depend on it.

    Args:
      config: checked.
      schema: of the config.
      run: the run so far; None: there is none yet.
      data: of describe_data, for the config.
      num_images: of an epoch.
      extend: whether the config may change the run.
    """
    if run is None:
        return Start(config, schema, None, Segment(0, 0, config.batch_size), False, num_images, {})
    segment = history.segments(run.history, run.config["batch_size"])[-1]
    begins_anew = extend and _has_other_stream(config, run, data)
    if begins_anew:
        segment = Segment(run.step, 0, config.batch_size)
    elif extend and config.batch_size != segment.batch_size:
        segment = Segment(run.step, segment.position_at(run.step), config.batch_size)
    known = {key: pair for change in run.history for key, pair in change.kept.items()}
    kept = {}
    if extend:
        steps = _former_steps(run, num_images)
        kept = run_length.keep_shortened(config, schema, run.config, steps)
    # Of earlier extensions: a rerun of their command gives the same values.
    before = dict(flatten(run.config))
    present = dict(flatten(config_files.to_dict(config)))
    for key, (given, own) in known.items():
        if (present.get(key), before.get(key)) == (given, own):
            kept[key] = (given, own)
    own_values = config.copy_and_resolve_references()
    for key, (_, own) in kept.items():
        config_files.set_value(own_values, key, own)
    return Start(own_values, schema, run, segment, begins_anew, num_images, kept)


def _has_other_stream(config: ConfigDict, run: StartedRun, data: Mapping[str, Any]) -> bool:
    """Whether a config gives other training images than the run has, or in another order."""
    former = run.data or {}
    if "train" in former:
        differs = former["train"] != data["train"]
    else:  # an earlier version, which knew a data set by its place
        differs = not identity.same_place(run.config["data"]["source"], data["source"])
    copies = dict(flatten(run.config)).get(_COPIES), config.data.get("cached_copies")
    return differs or copies[0] != copies[1]


def _former_steps(run: StartedRun, num_images: int) -> int:
    """The run's last step so far."""
    if run.history:
        return run.history[-1].last_step[1]
    images = run.data["train"]["images"] if run.data and "train" in run.data else num_images
    return run_length.total_steps(run.config, images, Segment(0, 0, run.config["batch_size"]))


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
    with phase("compiling the initialization of what the checkpoint lacks", at_once=True):
        parts = jax.jit(begin, out_shardings=places)(key, frozen, state.params)
    LOGGER.info("begun anew, as the checkpoint has none: %s", ", ".join(missing))
    return state.replace(**parts)
