"""What a model family offers: all that pipeline, evaluation and command line ask of it.

A family's family.py is a module with the attributes of `Family`.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from hmar_jax.settings import Settings
from hmar_jax.training.task import Params
from hmar_jax.training.trainable import Trainable


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
