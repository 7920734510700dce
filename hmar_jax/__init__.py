"""HMAR in JAX: hierarchical masked autoregressive image generation (arXiv 2506.04421).

import jax, hmar_jax
images = hmar_jax.sample(jax.random.key(0), class_id=[3, 5, 7])   # the bundled digits model
pipe = hmar_jax.load("runs/mine")                                 # or a run or model directory
"""

import functools
import importlib
import typing

from hmar_jax.errors import InputError

if typing.TYPE_CHECKING:
    from hmar_jax.pipeline import Pipeline, from_torch, load

__version__ = "0.2.0.dev0"
__all__ = ["InputError", "Pipeline", "from_torch", "load", "sample"]


def sample(rng, class_id=None, model: str = "digits", **options):
    """Samples images in one call: Pipeline.sample of `model`, which is loaded once and kept.

    Args:
      rng: a key, jax.random.key(seed), or the seed itself.
      class_id: an id or name for one image (h, w, 3), a list for several (B, h, w, 3).
      model: a bundled name, a run directory or a model directory.
      **options: of Pipeline.sample.

    Returns:
      float32 images in [0, 1].

    Raises:
      InputError: there is no such model or class, or an option is wrong.
    """
    return _loaded(model).sample(rng, class_id, **options)


@functools.lru_cache(maxsize=4)
def _loaded(model: str):
    """The pipelines that `sample` keeps."""
    from hmar_jax.pipeline import load

    return load(model)


def __getattr__(name: str):
    # JAX is imported when it is needed: --help and wrong arguments cost no time.
    if name in ("Pipeline", "from_torch", "load"):
        return getattr(importlib.import_module("hmar_jax.pipeline"), name)
    if name == "pipeline":
        return importlib.import_module("hmar_jax.pipeline")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
