"""What training asks of a family of models, or of a kind of autoencoder."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from hmar_jax.config_files import ConfigSchema
from hmar_jax.training.task import Params, Task


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What a task may depend on of its data."""

    source: str  # as the config names it
    num_classes: int
    class_names: tuple[str, ...]
    num_images: int  # of the training split


# Assumed where there are no data yet: the training set of ImageNet.
IMAGENET = DataInfo("", 1000, (), 1_281_167)


class Parent(NamedTuple):
    """A model that a new one trains on top of."""

    name: str  # as the config names it
    spec: Any


class TaskKind(NamedTuple):
    """One kind of training that a family offers."""

    schema: ConfigSchema
    command: str  # "train" or "train-tokenizer"
    parent_key: str | None = None  # the config key that names the parent
    parent_folder: str | None = None  # where a run directory keeps it
    # The config key that names the model whose parameters a run starts from (fine-tuning).
    initial_key: str | None = None


class TaskSetup(NamedTuple):
    """What a config trains."""

    task: Task
    spec: Any  # of the model that comes out
    parent_spec: Any = None  # of the frozen copy in the run directory
    warnings: tuple[str, ...] = ()  # why the recipe may not work on these data


class InitialParams(NamedTuple):
    """The parameters that a run starts from, of another model."""

    params: Params  # all that the task trains, on the host
    notes: tuple[str, ...]  # what was taken, and what is new, in words


class Trainable(Protocol):
    """What training asks of a family or a kind of autoencoder."""

    TASKS: Mapping[str, TaskKind]  # by config.task

    def image_side(self, config: Any, parent: Parent | None) -> int:
        """Pixels of the images that the task takes."""
        ...

    def make_task(self, config: Any, parent: Parent | None, data: DataInfo) -> TaskSetup:
        """The task that a checked config describes; InputError where its parts do not fit."""
        ...

    def frozen_params(
        self, config: Any, parent: Parent | None, parent_params: Params, kind: str
    ) -> Params:
        """What a task uses and does not change, from its parent's parameters.

        Args:
          kind: of its batches: "image", or a kind of records.
        """
        ...

    def initial_values(self, config: Any, initial: Parent) -> Mapping[str, Any]:
        """Values of the config keys that may be left empty where a run starts from a model.

        Only of trainables with a TaskKind.initial_key.

        Args:
          initial: the model that the run starts from.

        Returns:
          Dotted keys and values: architecture, defaults of sampling, parent.

        Raises:
          InputError: the task cannot start from a model of this kind.
        """
        ...

    def initial_params(
        self, config: Any, setup: TaskSetup, initial: Parent, params: Params
    ) -> InitialParams:
        """The parameters that a run starts from.

        Args:
          config: complete.
          setup: what is trained.
          initial, params: the model to start from, by part.

        Raises:
          InputError: a parameter, but for those of classes, has another shape in that model.
        """
        ...

    def planning_parent(self, config: Any, parent_config: Any) -> Any:
        """The spec that `hmar plan` assumes for a parent that the config does not name yet."""
        ...
