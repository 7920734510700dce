"""What programs and notebooks hold: load a model by name, sample, encode, decode."""

import dataclasses
import functools
import os
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from hmar_jax import checkpoints, convert, files
from hmar_jax.errors import InputError
from hmar_jax.models.masked import MaskedTransformer
from hmar_jax.models.spec import ModelSpec
from hmar_jax.models.tokenizer import Tokenizer
from hmar_jax.models.transformer import NextScaleTransformer
from hmar_jax.sampling import sampler, schedules

_BUNDLED = pathlib.Path(__file__).resolve().parent.parent / "bundled"
_MAX_BATCH = 64  # pictures in one call of the compiled sampler; more are drawn in turns
_RUN_FORMAT = "hmar_jax run 1"


def bundled_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.name for p in _BUNDLED.iterdir() if (p / "config.json").is_file()) if _BUNDLED.is_dir() else []


class Pipeline:
    """A model with its parameters.

    Attributes:
      spec: ModelSpec.
      params: {"tokenizer": …, "transformer": …}.
    """

    def __init__(self, spec: ModelSpec, params, dtype: str = "auto"):
        """dtype: of matrix products and convolutions; "auto" is bfloat16 on accelerators and float32 on CPU."""
        if dtype == "auto":
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        transformer = spec.transformer and dataclasses.replace(spec.transformer, dtype=dtype)
        self.spec = dataclasses.replace(
            spec, tokenizer=dataclasses.replace(spec.tokenizer, dtype=dtype), transformer=transformer)
        self.params = jax.tree.map(jnp.asarray, params)
        self._tokenizer = Tokenizer(self.spec.tokenizer)
        # The model is bound by closure: a bound argument would be traced by jit.
        model = NextScaleTransformer(self.spec.transformer) if transformer else None
        masked = MaskedTransformer(self.spec.transformer, spec.masked_depth) if spec.masked_depth else None
        self._sample = jax.jit(
            functools.partial(sampler.sample, model, self._tokenizer, masked=masked), static_argnames=("draw", "schedule"))
        self._encode = jax.jit(functools.partial(self._apply, method="encode"))
        self._decode = jax.jit(lambda p, tokens: (self._apply(p, tokens, method="decode") + 1) / 2)

    def _apply(self, params, *args, method):
        return self._tokenizer.apply({"params": params["tokenizer"]}, *args, method=method)

    def sample(
        self, rng: jax.Array, class_id=None, *, guidance: float | None = None, masked_guidance: float = 0.0,
        top_k: int | None = None, top_p: float | None = None, greedy: bool = False, schedule=None,
        return_tokens: bool = False):
        """Draws pictures of classes.

        Args:
          rng: a key, jax.random.key(seed). Picture i depends on rng, i and its class alone.
          class_id: an id or class name for one picture, a list for several; None draws one without a class.
          guidance: how strongly to prefer what is typical of the class; 0 is not at all. None: the model's own.
          masked_guidance: the same for masked passes; at 0 they run without an unconditional half.
          top_k, top_p: draw from the k likeliest tokens, and from the likeliest that reach probability p; 0 is off.
            None: the model's own.
          greedy: take the likeliest token everywhere.
          schedule: passes of each scale: "none" (one each), "default", "cosine:N", or a list of lists of token counts,
            see sampling/schedules.py. None: "default" where the model has stage 2, otherwise "none".
          return_tokens: also return the tokens.

        Returns:
          float32 pictures in [0, 1]: (h, w, 3) for one class, (B, h, w, 3) for a list. With return_tokens also int32
          tokens (L,) or (B, L), scales in order.

        Raises:
          InputError: the model is a tokenizer alone, a class does not exist, an option is out of its range, or the
            schedule does not fit the scales or needs a stage 2 that the model has not.
        """
        if self.spec.transformer is None:
            raise InputError("this model is a tokenizer alone: it encodes and decodes, but cannot sample")
        own = lambda given, default: default if given is None else given
        draw, strength = sampler.options(
            guidance=own(guidance, self.spec.guidance), masked_guidance=masked_guidance, top_k=own(top_k, self.spec.top_k),
            top_p=own(top_p, self.spec.top_p), greedy=greedy, vocab_size=self.spec.transformer.vocab_size)
        single = class_id is None or isinstance(class_id, (int, str, np.integer)) or np.ndim(class_id) == 0
        wanted = [class_id] if single else list(class_id)
        ids = np.array([self._class(c) for c in wanted], np.int32)
        if not len(ids):
            raise InputError("class_id is empty: one class or more is wanted")
        images, tokens = self._in_turns(
            sampler.picture_keys(rng, len(ids)), ids, draw=draw, strength=strength, schedule=self._schedule(schedule))
        if single:
            images, tokens = images[0], tokens[0]
        return (images, tokens) if return_tokens else images

    def _class(self, given) -> int:
        return self.spec.transformer.null_class if given is None else self.spec.resolve_class(given)

    def _schedule(self, wanted) -> schedules.Schedule:
        if wanted is None:
            wanted = "default" if self.spec.masked_depth else "none"
        schedule = schedules.resolve(self.spec.tokenizer.scale_list, wanted)
        if not self.spec.masked_depth and any(len(row) > 1 for row in schedule):
            raise InputError(f"schedule {wanted!r} has masked passes, but this model has no stage 2: schedule='none' is wanted")
        return schedule

    def _in_turns(self, keys, ids, **options):
        """Samples at most _MAX_BATCH pictures at a time; the last turn is padded to a power of two, to compile rarely."""
        images, tokens = [], []
        for start in range(0, len(ids), _MAX_BATCH):
            part = slice(start, min(start + _MAX_BATCH, len(ids)))
            count = part.stop - part.start
            padded = np.minimum(np.arange(start, start + (1 << (count - 1).bit_length())), part.stop - 1)
            drawn = self._sample(self.params, keys[padded], jnp.asarray(ids[padded]), **options)
            images.append(drawn[0][:count])
            tokens.append(drawn[1][:count])
        return jnp.concatenate(images), jnp.concatenate(tokens)

    def encode(self, image) -> jax.Array:
        """Pictures (h, w, 3) or (B, h, w, 3), float in [0, 1] or uint8 -> tokens (L,) or (B, L) int32.

        Pictures of another size are resized, with a warning.
        """
        images, single = self._pictures(image)
        tokens = self._encode(self.params, images)
        return tokens[0] if single else tokens

    def decode(self, tokens) -> jax.Array:
        """tokens (L,) or (B, L) -> float32 pictures (h, w, 3) or (B, h, w, 3) in [0, 1].

        Raises:
          InputError: another number of tokens, or a token outside the codebook.
        """
        tokens = np.asarray(tokens)
        length, vocab_size = self.spec.tokenizer.scale_list.length, self.spec.tokenizer.vocab_size
        if tokens.ndim not in (1, 2) or tokens.shape[-1] != length or not np.issubdtype(tokens.dtype, np.integer):
            raise InputError(f"tokens of shape {tokens.shape} and type {tokens.dtype}: ({length},) or (B, {length}) integers are wanted")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise InputError(f"tokens from {tokens.min()} to {tokens.max()}: the codebook has 0 to {vocab_size - 1}")
        images = self._decode(self.params, jnp.atleast_2d(tokens).astype(jnp.int32))
        return images[0] if tokens.ndim == 1 else images

    def _pictures(self, image):
        """(B, h, w, 3) float32 in [-1, 1] of the model's size, and whether one picture was given."""
        image = np.asarray(image)
        single = image.ndim == 3
        images = image[None] if single else image
        if images.ndim != 4 or images.shape[-1] != 3:
            raise InputError(f"picture of shape {image.shape}: (h, w, 3) or (B, h, w, 3) is wanted")
        if images.dtype == np.uint8:
            images = images / np.float32(255)
        elif not np.issubdtype(images.dtype, np.floating):
            raise InputError(f"picture of type {images.dtype}: uint8, or float in [0, 1] is wanted")
        elif images.size and not (images.min() >= 0 and images.max() <= 1):
            raise InputError(f"picture with values from {images.min():g} to {images.max():g}: float pictures lie in [0, 1]")
        side = self.spec.tokenizer.image_side
        if images.shape[1:3] != (side, side):
            warnings.warn(f"resizing a picture of {images.shape[2]}x{images.shape[1]} to the model's {side}x{side}", stacklevel=3)
            images = np.stack([_resized(x, side) for x in images])
        return jnp.asarray(images, jnp.float32) * 2 - 1, single


def _resized(image, side: int) -> np.ndarray:
    """(h, w, 3) float in [0, 1] -> (side, side, 3), Lanczos, each channel in full precision."""
    channels = [Image.fromarray(image[..., c].astype(np.float32)).resize((side, side), Image.LANCZOS) for c in range(3)]
    return np.stack([np.asarray(c) for c in channels], -1).clip(0, 1)


def load(name: str, dtype: str = "auto") -> Pipeline:
    """A bundled model by name, a run directory, or a model directory.

    A run directory gives the parameters of its latest good checkpoint.

    Raises:
      InputError: there is no such model, or it is damaged.
    """
    spec, params = load_parts(name)
    return Pipeline(spec, params, dtype)


def load_parts(name: str):
    """As load, but the spec and the parameters {"tokenizer": …, "transformer": …} on the host."""
    directory = pathlib.Path(name)
    if name in bundled_models() and not os.path.isfile(directory / "config.json"):
        directory = _BUNDLED / name
    if not os.path.isfile(directory / "config.json"):  # unlike Path.is_file, False for any nonsense
        raise InputError(
            f"model {name!r}: neither a bundled model ({', '.join(bundled_models()) or 'none'}) nor a directory with a config.json")
    config = files.read_json(directory / "config.json", "the config of a model or a run")
    if isinstance(config, dict) and config.get("format") == _RUN_FORMAT:
        return _load_run(directory, config)
    config, params = checkpoints.load_model(directory)
    return ModelSpec.from_json(config, str(directory / "config.json")), params


def run_config(spec: ModelSpec, config: dict) -> dict:
    """What a run directory's config.json holds: the whole training config, and the model it makes."""
    return {"format": _RUN_FORMAT, "config": config, "model": spec.to_json()}


def _load_run(directory: pathlib.Path, config: dict):
    spec = ModelSpec.from_json(config.get("model"), str(directory / "config.json"))
    _, saved = checkpoints.load_params_of_run(directory)
    if spec.transformer is None:
        return spec, {"tokenizer": saved["params"]}
    _, frozen = checkpoints.load_model(directory / "tokenizer")
    return spec, {"tokenizer": frozen["tokenizer"], "transformer": saved["params"]}


def from_torch(model: str | None = None, *, tokenizer: str, scales=None, heads: int | None = None, dtype: str = "auto") -> Pipeline:
    """Published PyTorch weights as a Pipeline; see torch_parts."""
    return Pipeline(*torch_parts(model, tokenizer=tokenizer, scales=scales, heads=heads), dtype)


def torch_parts(model: str | None = None, *, tokenizer: str, scales=None, heads: int | None = None):
    """Reads published weights.

    Args:
      model: a .pth file with a stage-1, VAR or combined HMAR state dict, or a trainer's checkpoint that nests one; None:
        tokenizer alone.
      tokenizer: the .pth file of VAR's tokenizer.
      scales: the sides, where the weights' K and L are not those of a published list.
      heads: where the weights do not tell; None takes the published rule, as many as blocks.

    Returns:
      ModelSpec and parameters on the host.

    Raises:
      InputError: a file is unreadable or no such model, or the scale list is not known.
    """
    states = convert.load_state_dicts(tokenizer)
    if "tokenizer" not in states:
        raise InputError(f"{tokenizer}: holds a transformer and no tokenizer; give the tokenizer's file, such as vae.pth")
    licence = "HMAR's published weights are for non-commercial use, VAR's are MIT: the converted weights keep their licence"
    transformer, depth, params = None, 0, {}
    if model is not None:
        found = convert.load_state_dicts(model)
        if "transformer" not in found:
            raise InputError(f"{model}: holds a tokenizer and no transformer")
        if convert.is_combined(found["transformer"]):
            transformer, params["transformer"], depth, params["masked"] = convert.combined_from_state(
                found["transformer"], scales, heads)
        else:
            transformer, params["transformer"] = convert.transformer_from_state(found["transformer"], scales, heads)
        scale_list = transformer.scale_list
    else:
        scale_list = convert.tokenizer_scales(states["tokenizer"], scales)
    config, params["tokenizer"] = convert.tokenizer_from_state(states["tokenizer"], scale_list)
    origin = f"converted from {pathlib.Path(tokenizer).name}" + (f" and {pathlib.Path(model).name}" if model else "")
    spec = ModelSpec(tokenizer=config, transformer=transformer, masked_depth=depth, origin=origin, licence=licence)
    return spec, params
