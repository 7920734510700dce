"""HMAR in JAX: hierarchical masked autoregressive image generation (arXiv 2506.04421).

import jax, hmar_jax
images = hmar_jax.sample(jax.random.key(0), class_id=[3, 5, 7])   # the bundled digits model
pipe = hmar_jax.load("runs/mine")                                 # or a run or model directory
"""

import functools

from hmar_jax.errors import InputError
from hmar_jax.pipeline import Pipeline, from_torch, load

__version__ = "0.1.0"
__all__ = ["InputError", "Pipeline", "from_torch", "load", "sample"]

_loaded = functools.lru_cache(maxsize=4)(load)  # the pipes that `sample` keeps


def sample(rng, class_id=None, model: str = "digits", **options):
    """Images in one call: Pipeline.sample of `model`, which is loaded once and kept.

    Args:
      rng: a key, jax.random.key(seed).
      class_id: an id for one image (h, w, 3), a list for several (B, h, w, 3).
      model: a bundled name, a run directory or a model directory.
      **options: of Pipeline.sample.
    """
    return _loaded(model).sample(rng, class_id, **options)
