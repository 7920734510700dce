"""What a model family offers: everything the trainer, the pipeline and the command line ask of it.

A family's family.py is a module with the attributes of `Family`. An autoencoder's module offers the
part that training asks for (`Trainable`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from hmar_jax.config_files import ConfigSchema
from hmar_jax.settings import Settings
from hmar_jax.training.task import Params, Task

AUTOENCODER = "tokenizer"  # where a model's parameters have those of its autoencoder


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What a task may depend on of its data."""

    source: str  # as the config names it
    num_classes: int
    class_names: tuple[str, ...]
    num_images: int  # of the training split


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


class TaskSetup(NamedTuple):
    """What a config trains."""

    task: Task
    spec: Any  # of the model that comes out
    parent_spec: Any = None  # of the frozen copy in the run directory


class Spec(Protocol):
    """What a model is: architectures, classes, sampling defaults; <-> config.json."""

    family: str
    autoencoder: Any  # config of the autoencoder
    class_names: tuple[str, ...]
    sampling: Any  # SamplingConfig; None where the model cannot sample
    origin: str  # where the parameters come from
    licence: str

    @property
    def kind(self) -> str:
        """For people: what model this is."""
        ...

    @property
    def num_classes(self) -> int: ...

    @property
    def null_class(self) -> int:
        """The class id of unconditional samples."""
        ...

    def with_dtype(self, dtype: str) -> "Spec":
        """The same model with matrix products and convolutions in another type."""
        ...

    def to_json(self) -> dict[str, Any]: ...

    @classmethod
    def from_json(cls, data: Any, where: str) -> "Spec": ...


class Sampler(Protocol):
    """Images from classes. Call it with arrays of one row an image; it is jitted inside."""

    def check(self, config: Settings) -> None:
        """Raises InputError where the options do not fit the model."""
        ...

    def __call__(
        self,
        params: Params,
        keys: jax.Array,
        class_ids: jax.Array,
        config: Settings,
        known: Any = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Images (B, h, w, 3) float32 in [0, 1], and latents (B, ...).

        Args:
          keys: (B,) random keys, one an image.
          class_ids: (B,) int32; spec.null_class samples without a class.
          known: for editing, of `make_known`: what is given of each image.
        """
        ...

    def make_known(self, latents: Any, mask: Any, config: Settings, has_class: bool) -> Any:
        """What editing keeps: arrays of one row an image, for `known`.

        Args:
          latents: encodings of images in which the mask is filled.
          mask: (B, h, w) bool, True where new content goes.
          config: EditingConfig.
          has_class: whether new content of a class is asked for.
        """
        ...


class Trainable(Protocol):
    """What training asks of a family or a kind of autoencoder."""

    TASKS: Mapping[str, TaskKind]  # by config.task

    def image_side(self, config: Any, parent: Parent | None) -> int:
        """Pixels of the images that the task takes."""
        ...

    def make_task(self, config: Any, parent: Parent | None, data: DataInfo) -> TaskSetup:
        """The task that a checked config describes; InputError where its parts do not fit."""
        ...

    def frozen_params(self, config: Any, parent_params: Params, kind: str) -> Params:
        """What a task uses and does not change, from its parent's parameters; `kind` of its batches."""
        ...

    def planning_parent(self, config: Any, parent_config: Any) -> Any:
        """The spec that `hmar plan` assumes for a parent that the config does not name yet."""
        ...


class Family(Trainable, Protocol):
    """A family of generative models."""

    Spec: type
    SamplingConfig: type  # every sampling option once
    EditingConfig: type | None  # the same and the options of editing; None: no editing
    ConvertConfig: type | None  # options of reading published weights; None: there are none

    def init_params(self, spec: Any, rng: jax.Array) -> Params:
        """All parameters of a model, autoencoder included."""
        ...

    def make_sampler(self, spec: Any) -> Sampler: ...

    def describe(self, spec: Any, params: Params) -> list[tuple[str, str]]:
        """Rows of `hmar info`."""
        ...

    def assemble_params(self, spec: Any, trained: Params, parent_params: Params) -> Params:
        """A model's parameters from those of a run and of the frozen model in its directory."""
        ...

    def convert(self, model: str | None, config: Settings) -> tuple[Any, Params]:
        """Spec and parameters from files of published weights."""
        ...


def image_keys(rng: jax.Array, count: int) -> jax.Array:
    """(count,) keys, split from rng by index: image i has the same key for any count above i."""
    keys = jnp.repeat(rng[None], count, 0)
    return jax.vmap(jax.random.fold_in)(keys, jnp.arange(count))
