"""What programs and notebooks hold: a loaded model that samples, edits, encodes and decodes.

The same for every model family: what a family can do, and with which options, it says itself.
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hmar_jax import autoencoders, families, loading, settings
from hmar_jax.autoencoders.base import AUTOENCODER
from hmar_jax.class_names import resolve_class
from hmar_jax.errors import InputError
from hmar_jax.families.base import image_keys
from hmar_jax.io import crops, masks
from hmar_jax.io.images import resize_image
from hmar_jax.pipeline_arguments import (
    as_array,
    as_devices,
    as_float,
    as_integer,
    as_key,
    as_mask,
    check_latents,
    warn_of_coarse_detail,
    warn_of_useless_masks,
)

# Beside a family's own, options of editing.
_EDITING_CONFIGS = (masks.CompositeConfig, crops.CropConfig)
_MAX_BATCH = 64  # images of one device in one call of the compiled sampler


class SampleBatch(NamedTuple):
    """Some images of a long list, as `Pipeline.sample_batches` gives them."""

    number: int  # of the batch, from 0
    start: int  # index of its first image
    class_ids: np.ndarray  # (b,) int32
    images: jax.Array  # (b, h, w, 3) float32 in [0, 1]
    latents: Any  # tokens (b, L) int32, or what the family has in their place


class Pipeline:
    """A model with its parameters, ready to sample, edit, encode and decode.

    Attributes:
      spec: what the model is, see families/base.py: Spec.
      params: all parameters, by part.
      image_side: h = w of its images, pixels.
    """

    def __new__(cls, spec: Any = None, *args, **kwargs):
        """An object whose methods document the options of the model's family."""
        if spec is None or spec.sampling is None:
            return super().__new__(cls)
        plain: Any = cls  # mypy takes a class for unhashable
        return super().__new__(_documented(plain, spec.family, spec.sampling))

    def __init__(self, spec: Any, params: Mapping[str, Any], dtype: str = "auto", devices=None):
        """Places the parameters on the devices; functions compile when they are first called.

        Args:
          spec, params: of a model directory or a run, see load_spec_and_params.
          dtype: of matrix products and convolutions; "auto" is bfloat16 on accelerators and float32
            on CPUs.
          devices: the images of one call are divided among them; None: the first device.
        """
        if dtype == "auto":
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        self._dtype = dtype
        self.spec = spec.with_dtype(dtype)
        self._devices = as_devices(devices)
        if dtype == "float16" and self._devices[0].platform == "cpu":
            raise InputError("dtype must be float32 or bfloat16 on CPUs; got 'float16'")
        mesh = Mesh(np.array(self._devices), ("data",))
        self._by_image = NamedSharding(mesh, PartitionSpec("data"))
        whole = NamedSharding(mesh, PartitionSpec())
        self.params = jax.device_put(jax.tree.map(jnp.asarray, dict(params)), whole)
        self.autoencoder = autoencoders.make_autoencoder(self.spec.autoencoder)
        self.image_side: int = self.autoencoder.image_side
        self._encode = jax.jit(self.autoencoder.encode)
        self._decode = jax.jit(self.autoencoder.decode)
        self._sampler: Any = None
        if self.can_sample:
            self._sampler = families.get_family(self.spec.family).make_sampler(self.spec)

    def __reduce__(self):
        """Pickles and copies: on the first device of the process that reads them."""
        own = type(self).__mro__[1] if type(self).__dict__.get("_is_documented") else type(self)
        return own, (self.spec, jax.device_get(self.params), self._dtype)

    @property
    def dtype(self) -> str:
        """Of matrix products and convolutions."""
        return self._dtype

    @property
    def can_sample(self) -> bool:
        """False for an autoencoder alone."""
        return self.spec.sampling is not None

    def __repr__(self) -> str:
        spec, size = self.spec, f"{self.image_side} x {self.image_side} pixels"
        parts = [spec.kind, size]
        if self.can_sample:
            parts.append(f"{spec.num_classes} classes")
        count = sum(x.size for x in jax.tree.leaves(self.params))
        devices = f"{len(self._devices)} x {self._devices[0].platform}"
        return f"<Pipeline: {', '.join([*parts, f'{count:,} parameters', devices])}>"

    # Sampling

    def sample(
        self,
        rng: jax.Array,
        class_id=None,
        *,
        return_tokens: bool = False,
        on_progress: Callable[[int], None] | None = None,
        **options,
    ):
        """Samples images of classes.

        Args:
          rng: a key, jax.random.key(seed), or the seed itself. Image i depends on rng, i and its
            class alone.
          class_id: an id (integer) or a class name (text) for one image, a list for several; None:
            one image without a class. A text is looked up as a name first and as an id second, see
            class_names.resolve_class; "id:2" and "name:2" say which.
          return_tokens: also return the latents: tokens, or what the family has in their place.
          on_progress: called with a number of images whenever so many more are finished.
          **options: of the family's SamplingConfig; None: the model's own value. See
            help(pipe.sample) of a loaded model.

        Returns:
          float32 images in [0, 1]: (h, w, 3) for one class, (B, h, w, 3) for a list. With
          return_tokens also int32 tokens (L,) or (B, L), scales in order.

        Raises:
          InputError: the model is an autoencoder alone, a class does not exist, or an option is
            unknown, out of its range, or requires what the model does not have.
        """
        family = self._family()
        config = self.sampling_config(family.SamplingConfig, options)
        ids, single = self._classes(class_id)
        images, latents = self._in_turns(
            lambda keys, ids: self._sampler(self.params, keys, ids, config),
            image_keys(as_key(rng), len(ids)),
            ids,
            on_progress=on_progress,
        )
        if single:
            images, latents = images[0], latents[0]
        return (images, latents) if return_tokens else images

    def sample_batches(
        self,
        rng: jax.Array,
        class_id,
        *,
        batch_size: int = _MAX_BATCH,
        which: Iterable[int] | None = None,
        **options,
    ) -> Iterator[SampleBatch]:
        """Samples a long list of images batch by batch, without keeping them.

        Image i is that of `sample` with the same list, up to rounding. Every batch is computed in
        the same shape, the last one included, so a batch has the same bits whichever others are
        sampled: what was interrupted can be resumed. While the caller uses a batch, the devices
        compute the next one.

        Args:
          rng: as `sample`'s.
          class_id: a class for each image, as `sample`'s.
          batch_size: images of a batch, on all devices together. Another size may round otherwise.
          which: numbers of the batches to sample, in this order; None: all.
          **options: as `sample`'s.

        Returns:
          An iterator of SampleBatch.

        Raises:
          InputError: as `sample`; batch_size is no positive integer, or there is no such batch.
        """
        config = self.sampling_config(self._family().SamplingConfig, options)
        key, (ids, _) = as_key(rng), self._classes(class_id)
        batch_size = as_integer("batch_size", batch_size, at_least=1)
        every = range(-(-len(ids) // batch_size))
        padded = -(-batch_size // len(self._devices)) * len(self._devices)
        check = lambda number: as_integer("a batch number in which", number, at_most=every[-1])
        wanted = every if which is None else which
        if not isinstance(wanted, Iterable):
            raise InputError(f"which must be numbers of batches, such as [3, 4]; got {which!r}")
        if isinstance(wanted, Sequence | np.ndarray):  # an iterator may be without end
            wanted = [check(number) for number in wanted]

        def compute(number: int) -> SampleBatch:
            start = number * batch_size
            some = ids[start : start + batch_size]
            rows = np.pad(some, (0, padded - len(some)), mode="edge")
            keys = image_keys(key, padded, start)
            placed = jax.device_put((keys, rows), self._by_image)
            results = self._sampler(self.params, *placed, config)
            images, latents = jax.tree.map(lambda x: x[: len(some)], results)
            return SampleBatch(number, start, some, images, latents)

        def batches() -> Iterator[SampleBatch]:
            previous = None
            for number in wanted:
                following = compute(check(number))  # returns before the devices have finished
                if previous is not None:
                    yield previous
                previous = following
            if previous is not None:
                yield previous

        return batches()

    def edit(
        self,
        rng: jax.Array,
        image,
        mask,
        class_id=None,
        *,
        return_tokens: bool = False,
        **options,
    ):
        """Regenerates a region of images, without extra training.

        Args:
          rng: a key or a seed; result i depends on rng, i, its image, mask and class alone.
          image: (h, w, 3) or (B, h, w, 3), float in [0, 1] or uint8. It keeps its size: of an image
            of another size than the model's, squares around the masked regions are edited, see
            io.crops.find_windows. With resize=True, it is resized to the model's size.
          mask: (h, w) or (B, h, w) of the image's size, True (or at least 128, in uint8) where new
            content goes.
          class_id: of the new content: an id or name, a list of B, or None for no class. One image
            and a list of classes gives one edit for each class.
          return_tokens: also return the latents.
          **options: of the family's EditingConfig, io.masks.CompositeConfig and
            io.crops.CropConfig; None: the model's own value. See help(pipe.edit) of a loaded model.

        Returns:
          float32 images in [0, 1], (h, w, 3) for one image and one class, otherwise (B, h, w, 3).
          Pixels outside the mask are equal to the image's (uint8: divided by 255), unless
          paste=False. With return_tokens also the latents: of images of the model's size (L,) or
          (B, L), otherwise those of the squares (N, L), edit after edit.

        Raises:
          InputError: as `sample`; or image, mask and classes do not fit together.
        """
        family = self._family()
        if family.EditingConfig is None:
            raise InputError(f"this model cannot edit: {self.spec.kind}")
        blending, options = _take(masks.CompositeConfig, options)
        cropping, options = _take(crops.CropConfig, options)
        config = self.sampling_config(family.EditingConfig, options)
        ids, one_class = self._classes(class_id)
        image = as_array("image", image)
        images, one_image = as_float(image), image.ndim == 3
        mask, one_mask = as_mask(mask, image.shape)
        warn_of_useless_masks(mask)
        count = max(len(images), len(ids), len(mask))
        for name, rows in (("images", images), ("classes", ids), ("masks", mask)):
            if len(rows) not in (1, count):
                raise InputError(f"{count} edits need 1 or {count} {name}; got {len(rows)}")
        if cropping.resize:
            images, mask = self._resize(images), masks.resize_mask(mask, self.image_side)
        keys, ids = image_keys(as_key(rng), count), np.broadcast_to(ids, count)
        regenerate = functools.partial(self._regenerate, config, class_id is not None)
        single = one_image and one_class and one_mask
        if images.shape[1:3] == (self.image_side, self.image_side):
            images, mask = (np.broadcast_to(x, (count, *x.shape[1:])) for x in (images, mask))
            result, latents = regenerate(keys, ids, images, mask)
            latents = latents[0] if single else latents
            if blending.paste:
                feather = blending.feather or 0
                result = masks.composite(images, np.asarray(result), mask, feather)
        else:
            cut = crops.cut_out(images, mask, count, self.image_side, cropping.context)
            if mask.any():
                warn_of_coarse_detail(cut.windows, self.image_side)
            keys = jax.vmap(jax.random.fold_in)(keys[cut.owner], cut.number)
            generated, latents = regenerate(keys, ids[cut.owner], cut.images, cut.masks)
            result = crops.put_back(images, mask, cut, np.asarray(generated), blending)
        result = jnp.asarray(result[0] if single else result)
        return (result, latents) if return_tokens else result

    def _regenerate(self, config, has_class: bool, keys, ids, images, mask):
        """Images of the model's size with new content, and their latents; rows as in `edit`."""
        latents = self._encode_all(masks.fill_masked(images, mask))
        kept = self._sampler.make_known(latents, mask, config, has_class)
        sample = lambda keys, ids, kept: self._sampler(self.params, keys, ids, config, kept)
        return self._in_turns(sample, keys, ids, kept)

    def sampling_config(self, cls: type, options: Mapping[str, Any]) -> Any:
        """Options as a checked instance of the family's class, the model's own where None.

        Raises:
          InputError: an option is unknown, out of its range, or does not fit the model.
        """
        self._family()
        given = {k: v for k, v in settings.resolve_names(cls, options).items() if v is not None}
        own = {
            f.name: getattr(self.spec.sampling, f.name)
            for f in dataclasses.fields(self.spec.sampling)
        }
        config = cls(**{**own, **given})
        self._sampler.check(config)
        return config

    def _family(self) -> Any:
        if not self.can_sample:
            raise InputError("an autoencoder alone encodes and decodes, but cannot sample")
        return families.get_family(self.spec.family)

    def resolve_class(self, given: Any) -> int:
        """The id of a class given by name or id; see class_names.resolve_class."""
        return resolve_class(given, self.spec.num_classes, self.spec.class_names)

    def _classes(self, class_id) -> tuple[np.ndarray, bool]:
        """Ids (B,) int32, and whether one was given rather than a list."""
        single = not isinstance(class_id, list | tuple | range) and np.ndim(class_id) == 0
        null = self.spec.null_class
        given = [class_id] if single else class_id
        if not len(given):
            raise InputError("class_id must name at least one class; got an empty list")
        if isinstance(class_id, np.ndarray) and class_id.ndim == 1 and class_id.dtype.kind in "iu":
            for extreme in (class_id.min(), class_id.max()):  # millions of them take no time
                self.resolve_class(extreme)
            return class_id.astype(np.int32), False
        ids = [null if c is None else self.resolve_class(c) for c in given]
        return np.array(ids, np.int32), single

    # Encoding

    def encode(self, image) -> jax.Array:
        """The latents of images: tokens (L,) or (B, L) int32, or what the autoencoder has instead.

        Args:
          image: (h, w, 3) or (B, h, w, 3), float in [0, 1] or uint8. Another size than the model's
            is resized, with a warning.
        """
        images, single = self._images(image)
        latents = _unwrap(self._encode_all(images))
        return jax.tree.map(lambda x: x[0], latents) if single else latents

    def decode(self, tokens) -> jax.Array:
        """Images (h, w, 3) or (B, h, w, 3) float32 in [0, 1] from latents, such as tokens (B, L).

        Raises:
          InputError: another shape or type than the autoencoder's, or a token outside the codebook.
        """
        latents, single = check_latents(tokens, self.autoencoder.record_spec)
        decode = lambda latents: self._decode(self.params[AUTOENCODER], latents)
        images = self._in_turns(decode, latents)
        return images[0] if single else images

    def _encode_all(self, images: np.ndarray):
        return self._in_turns(lambda rows: self._encode(self.params[AUTOENCODER], rows), images)

    def _images(self, image) -> tuple[np.ndarray, bool]:
        """(B, h, w, 3) float32 in [0, 1] of the model's size, and whether one image was given."""
        image = as_array("image", image)
        return self._resize(as_float(image)), image.ndim == 3

    def _resize(self, images: np.ndarray) -> np.ndarray:
        """(B, h, w, 3) float32 -> of the model's size, with a warning if that is another."""
        side = self.image_side
        if images.shape[1:3] == (side, side):
            return images
        warnings.warn(
            f"resizing an image of {images.shape[2]}x{images.shape[1]} to {side}x{side}, the "
            "model's size",
            stacklevel=4,
        )
        return np.stack([resize_image(x, side) for x in images])

    def _in_turns(self, function: Callable, *rows, on_progress=None):
        """function(*rows) for a limited number of images a device at a time.

        Each turn is divided among the devices; the last one is padded to a power of two, to compile
        rarely.

        Args:
          function: from trees of arrays with one row an image to such trees.
          on_progress: called with the number of images of each turn, when it is finished.
        """
        turns, devices = [], len(self._devices)
        total = len(jax.tree.leaves(rows)[0])
        for start in range(0, total, _MAX_BATCH * devices):
            count = min(_MAX_BATCH * devices, total - start)
            padded = devices * (1 << (-(-count // devices) - 1).bit_length())
            index = np.minimum(np.arange(start, start + padded), start + count - 1)
            place = lambda x: jax.device_put(x[index], self._by_image)
            placed = jax.tree.map(place, rows)
            results = function(*placed)
            turns.append(jax.tree.map(lambda x: x[:count], results))
            if on_progress is not None:
                jax.block_until_ready(turns[-1])
                on_progress(count)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *turns)


def _unwrap(latents: Mapping[str, Any]) -> Any:
    """The array of latents that have one field; otherwise all of them by name."""
    return next(iter(latents.values())) if len(latents) == 1 else latents


def _take(cls: type, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """An instance of a class of settings from those options that it has; and the other options."""
    names = {field.name for field in dataclasses.fields(cls)}
    given = {k: v for k, v in options.items() if k in names and v is not None}
    return cls(**given), {k: v for k, v in options.items() if k not in names}


def load(
    name: str, dtype: str = "auto", devices=None, checkpoint: int | str = "latest"
) -> Pipeline:
    """A bundled model by name, a run directory, or a model directory.

    Args:
      name: which.
      dtype, devices: as Pipeline's.
      checkpoint: of a run: "latest" (the latest good one), "best" (of least validation loss), or a
        step.

    Raises:
      InputError: there is no such model or checkpoint, or it is damaged.
    """
    return Pipeline(*loading.load_spec_and_params(name, checkpoint), dtype, devices)


def from_torch(
    model: str | None = None, *, family: str = "", dtype: str = "auto", **options
) -> Pipeline:
    """Published PyTorch weights as a Pipeline.

    Args:
      model: a .pth or .safetensors file with a state dict, or a trainer's checkpoint that nests
        some; None: the autoencoder alone.
      family: whose weights they are; empty: the first one's.
      dtype: as Pipeline's.
      **options: of the family's ConvertConfig, such as tokenizer="vae.pth", weights="ema".

    Raises:
      InputError: a file cannot be read or holds no such model, or an option is missing or wrong.
    """
    return Pipeline(*loading.convert_torch_files(model, family, **options), dtype)


@functools.cache
def _documented(cls: Any, family_name: str, own: Any) -> type[Pipeline]:
    """A subclass whose `sample` and `edit` have the options of a family in their signatures.

    Args:
      own: the model's own values of the sampling options.
    """
    family = families.get_family(family_name)
    methods = {
        name: _with_options(getattr(cls, name), own, family.SamplingConfig)
        for name in ("sample", "sample_batches")
    }
    if family.EditingConfig is not None:
        methods["edit"] = _with_options(cls.edit, own, family.EditingConfig, *_EDITING_CONFIGS)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**names, **methods, "_is_documented": True})


def _with_options(method: Callable, own: Any, *option_classes: type) -> Callable:
    @functools.wraps(method)
    def call(*args, **kwargs):
        return method(*args, **kwargs)

    signature = inspect.signature(method)
    fixed = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [p for cls in option_classes for p in settings.parameters(cls)]
    documented: Any = call
    documented.__signature__ = signature.replace(parameters=[*fixed, *options])
    described = "\n".join(settings.describe(cls, "  ", own) for cls in option_classes)
    call.__doc__ = f"{inspect.getdoc(method)}\n\nOptions of this model:\n{described}\n"
    return call
