"""The protocols of a model family: what pipeline, evaluation and command line use of a model.

A family's family.py is a module with the attributes of `Family`.

Letters: B images, h w sides of an image in pixels.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from hmar_jax.settings import Settings
from hmar_jax.training.task import Params
from hmar_jax.training.trainable import Trainable


class Spec(Protocol):
    """What a model is: architectures, classes, sampling defaults; the contents of config.json."""

    family: str
    autoencoder: Any  # config of the autoencoder
    class_names: tuple[str, ...]
    sampling: Any  # SamplingConfig of the family; None: the model cannot sample
    origin: str  # where the parameters come from
    licence: str

    @property
    def kind(self) -> str:
        """What kind of model this is, in words."""
        ...

    @property
    def num_classes(self) -> int: ...

    @property
    def null_class(self) -> int:
        """The class id of unconditional samples."""
        ...

    def with_dtype(self, dtype: str) -> "Spec":
        """The same model with matrix products and convolutions in another dtype."""
        ...

    def to_json(self) -> dict[str, Any]:
        """For json.dumps; from_json returns an equal spec."""
        ...

    @classmethod
    def from_json(cls, data: Any, where: str) -> "Spec":
        """Reads what to_json wrote; InputError names the file as `where`."""
        ...


class Sampler(Protocol):
    """Samples images of classes. Calls are jitted inside; arrays have one row for each image."""

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
        """Samples images.

        Args:
          params: all parameters of the model.
          keys: (B,) random keys. An image depends on its own key and class alone.
          class_ids: (B,) int32; spec.null_class samples without a class.
          config: the family's SamplingConfig or EditingConfig.
          known: for editing, what `make_known` returns: the part of each image that is kept.

        Returns:
          Images (B, h, w, 3) float32 in [0, 1], and latents (B, ...).
        """
        ...

    def make_known(self, latents: Any, mask: Any, config: Settings, has_class: bool) -> Any:
        """Selects the part of images that editing keeps.

        Args:
          latents: encoded images, in which the masked pixels were filled before encoding.
          mask: (B, h, w) bool, True where new content goes.
          config: the family's EditingConfig.
          has_class: whether the caller gives a class for the new content.

        Returns:
          A tree of arrays (B, ...), for `known`.
        """
        ...


class Family(Trainable, Protocol):
    """A family of generative models."""

    NAME: str  # as in the registry
    Spec: type
    SamplingConfig: type  # every sampling option, declared once
    EditingConfig: type | None  # sampling options and those of editing; None: cannot edit
    ConvertConfig: type | None  # options for reading published weights; None: there are none

    def init_params(self, spec: Any, rng: jax.Array) -> Params:
        """Random parameters of a model, autoencoder included."""
        ...

    def make_sampler(self, spec: Any) -> Sampler:
        """The sampler of a model; compiles nothing yet."""
        ...

    def describe(self, spec: Any, params: Params) -> list[tuple[str, str]]:
        """Rows (name, text) of `hmar info`, beside those of the autoencoder."""
        ...

    def assemble_params(self, spec: Any, trained: Params, parent_params: Params) -> Params:
        """Merges a run's trained parameters with those of its frozen parent into a model's."""
        ...

    def convert(self, model: str | None, config: Settings) -> tuple[Any, Params]:
        """Reads files of published weights; returns spec and parameters."""
        ...


def image_keys(rng: jax.Array, count: int, start: int = 0) -> jax.Array:
    """Splits a key by index: (count,) keys, those of images start, start + 1, ...

    The key of an image depends on rng and its index alone.
    """
    keys = jnp.repeat(rng[None], count, 0)
    return jax.vmap(jax.random.fold_in)(keys, jnp.arange(start, start + count))
