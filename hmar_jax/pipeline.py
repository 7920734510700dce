"""What programs and notebooks hold: load a model by name, sample, edit, encode, decode."""

import dataclasses
import functools
import os
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from hmar_jax.errors import InputError
from hmar_jax.families.hmar import convert, editing, sampler, schedules
from hmar_jax.families.hmar.combined import CombinedModel
from hmar_jax.families.hmar.spec import ModelSpec
from hmar_jax.io import checkpoints, files

_BUNDLED = pathlib.Path(__file__).resolve().parent / "bundled"
_MAX_BATCH = 64  # images of one device in one call of the compiled sampler; more are drawn in turns
_RUN_FORMAT = "hmar_jax run 1"
TOKENIZER_FOLDER, STAGE1_FOLDER = (
    "tokenizer",
    "stage1",
)  # of a run directory: what it was trained on top of


def bundled_models() -> list[str]:
    """Names of the models that come with the package."""
    return (
        sorted(p.name for p in _BUNDLED.iterdir() if (p / "config.json").is_file())
        if _BUNDLED.is_dir()
        else []
    )


class Pipeline:
    """A model with its parameters.

    Attributes:
      spec: ModelSpec.
      params: {"tokenizer": …, "transformer": …, "masked": …}, those that it has.
    """

    def __init__(self, spec: ModelSpec, params, dtype: str = "auto", devices=None):
        """A model ready to draw.

        Args:
          dtype: of matrix products and convolutions; "auto" is bfloat16 on accelerators and float32 on CPU.
          devices: images of one call are divided among them; None: all on the first device.
        """
        if dtype == "auto":
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        transformer = spec.transformer and dataclasses.replace(spec.transformer, dtype=dtype)
        self.spec = dataclasses.replace(
            spec,
            tokenizer=dataclasses.replace(spec.tokenizer, dtype=dtype),
            transformer=transformer,
        )
        self._devices = list(devices or jax.devices()[:1])
        mesh = Mesh(np.array(self._devices), ("data",))
        self._by_image = NamedSharding(mesh, PartitionSpec("data"))
        self.params = jax.device_put(
            jax.tree.map(jnp.asarray, params), NamedSharding(mesh, PartitionSpec())
        )
        # The model is bound by closure: a bound argument would be traced by jit.
        model = CombinedModel(self.spec)
        self._sample = jax.jit(functools.partial(sampler.sample, model), static_argnames="draw")
        self._draw_scales = jax.jit(
            functools.partial(sampler.sample_scales, model), static_argnames="draw"
        )
        self._paint = jax.jit(model.paint)
        self._encode = jax.jit(lambda p, images: model.quantize(p, images * 2 - 1, method="encode"))
        self._decode = jax.jit(
            lambda p, tokens: (model.quantize(p, tokens, method="decode") + 1) / 2
        )

    def sample(
        self,
        rng: jax.Array,
        class_id=None,
        *,
        guidance: float | None = None,
        masked_guidance: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        greedy: bool = False,
        schedule=None,
        smooth: bool = False,
        confidence_noise: float | None = None,
        return_tokens: bool = False,
    ):
        """Draws images of classes.

        Args:
          rng: a key, jax.random.key(seed). Image i depends on rng, i and its class alone.
          class_id: an id or class name for one image, a list for several; None draws one without a class.
          guidance: how strongly to prefer what is typical of the class; 0 is not at all. None: the model's own.
          masked_guidance: the same for masked passes; at 0 they run without an unconditional half. None: the model's own.
          top_k, top_p: draw from the k likeliest tokens, and from the likeliest that reach probability p; 0 is off.
            None: the model's own.
          greedy: take the likeliest token everywhere.
          schedule: passes of each scale: "none" (one each), "default", "cosine:N", or a list of lists of token counts,
            see sampling/schedules.py. None: "default" where the model has stage 2, otherwise "none".
          smooth: paint mixtures of tokens: smoother images to look at, not to be measured.
          confidence_noise: how much chance there is in the order in which masked passes fix tokens; 0 is none. None: the
            model's own.
          return_tokens: also return the tokens.

        Returns:
          float32 images in [0, 1]: (h, w, 3) for one class, (B, h, w, 3) for a list. With return_tokens also int32
          tokens (L,) or (B, L), scales in order.

        Raises:
          InputError: the model is a tokenizer alone, a class does not exist, an option is out of its range, or the
            schedule does not fit the scales or needs a stage 2 that the model has not.
        """
        draw, strength = self._options(
            guidance=guidance,
            masked_guidance=masked_guidance,
            top_k=top_k,
            top_p=top_p,
            greedy=greedy,
            smooth=smooth,
            confidence_noise=confidence_noise,
        )
        plan = schedules.plan(self.schedule(schedule))
        ids, single = self._classes(class_id)
        images, tokens = self._in_turns(
            lambda keys, ids: self._sample(
                self.params, keys, ids, draw=draw, strength=strength, plan=plan
            ),
            sampler.image_keys(rng, len(ids)),
            ids,
        )
        if single:
            images, tokens = images[0], tokens[0]
        return (images, tokens) if return_tokens else images

    def edit(
        self,
        rng: jax.Array,
        image,
        mask,
        class_id=None,
        *,
        keep_coarse: bool | None = None,
        ring: int = 0,
        paste: bool = True,
        feather: float = 0,
        guidance: float | None = None,
        masked_guidance: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        greedy: bool = False,
        schedule=None,
        smooth: bool = False,
        confidence_noise: float | None = None,
        return_tokens: bool = False,
    ):
        """Draws new content into a part of images; nothing is trained for it.

        Args:
          rng: a key; result i depends on rng, i, its image, mask and class alone.
          image: (h, w, 3) or (B, h, w, 3), float in [0, 1] or uint8; of another size than the model's: resized, with a warning.
          mask: (h, w) or (B, h, w), of the image's size, True (or 128 and above, in a uint8 image) where new content goes.
          class_id: what the new content is of: an id or name, a list of B, or None for no class. One image and a list of
            classes gives one edit for each class.
          keep_coarse: keep the tokens of scales up to 2x2, which hold the layout of the whole image. None: where no
            class is asked for.
          ring: cells around the hole, at every scale, whose tokens are drawn anew too.
          paste: return the pixels outside the mask untouched; otherwise the whole image is the decoder's.
          feather: with paste, pixels from the hole's border inwards over which old and new are mixed.
          Others as in `sample`. The counts of the schedule become shares of each image's free tokens.

        Returns:
          float32 images in [0, 1], (h, w, 3) for one image and one class, otherwise (B, h, w, 3); with return_tokens
          also int32 tokens (L,) or (B, L).

        Raises:
          InputError: as `sample`; or image, mask and classes do not fit together.
        """
        draw, strength = self._options(
            guidance=guidance,
            masked_guidance=masked_guidance,
            top_k=top_k,
            top_p=top_p,
            greedy=greedy,
            smooth=smooth,
            confidence_noise=confidence_noise,
        )
        if not isinstance(ring, int) or ring < 0:
            raise InputError(f"ring={ring}: a whole number of cells, 0 or more, is wanted")
        if not feather >= 0:
            raise InputError(f"feather={feather}: a number of pixels, 0 or more, is wanted")
        plan = schedules.plan(self.schedule(schedule))
        ids, one_class = self._classes(class_id)
        images, one_image = self._images(image)
        hole, one_mask = _mask_of(mask, np.shape(image))
        hole = editing.resize_mask(hole, self.spec.tokenizer.image_side)
        count = max(len(images), len(ids), len(hole))
        for name, rows in (("images", images), ("classes", ids), ("masks", hole)):
            if len(rows) not in (1, count):
                raise InputError(f"{len(rows)} {name} for {count} edits: 1 or {count} are wanted")
        images, ids, hole = (np.broadcast_to(x, (count, *x.shape[1:])) for x in (images, ids, hole))

        if keep_coarse is None:
            keep_coarse = class_id is None
        keep = editing.kept_tokens(
            self.spec.tokenizer.scale_list, hole, ring=ring, keep_coarse=keep_coarse
        )

        def turn(keys, ids, images, hidden, keep):
            known = sampler.Known(self._encode(self.params, hidden), keep)
            f_hat, tokens = self._draw_scales(
                self.params, keys, ids, draw=draw, strength=strength, plan=plan, known=known
            )
            # A mixture is no token; otherwise the one decoder of tokens, so that known tokens give their reconstruction.
            return self._paint(self.params, f_hat) if smooth else self._decode(
                self.params, tokens
            ), tokens

        generated, tokens = self._in_turns(
            turn, sampler.image_keys(rng, count), ids, images, editing.hide(images, hole), keep
        )
        result = (
            jnp.asarray(editing.join(images, np.asarray(generated), hole, feather))
            if paste
            else generated
        )
        if one_image and one_class and one_mask:
            result, tokens = result[0], tokens[0]
        return (result, tokens) if return_tokens else result

    def _options(self, **asked):
        """The model's own values for those that are None, checked."""
        if self.spec.transformer is None:
            raise InputError(
                "this model is a tokenizer alone: it encodes and decodes, but cannot sample"
            )
        own = {name: getattr(self.spec, name) for name, value in asked.items() if value is None}
        return sampler.options(**{**asked, **own}, vocab_size=self.spec.transformer.vocab_size)

    def _classes(self, class_id) -> tuple[np.ndarray, bool]:
        """Ids (B,) int32, and whether one was given rather than a list."""
        single = (
            class_id is None
            or isinstance(class_id, (int, str, np.integer))
            or np.ndim(class_id) == 0
        )
        null = self.spec.transformer.null_class
        ids = [
            null if c is None else self.spec.resolve_class(c)
            for c in ([class_id] if single else list(class_id))
        ]
        if not ids:
            raise InputError("class_id is empty: one class or more is wanted")
        return np.array(ids, np.int32), single

    def schedule(self, wanted=None) -> schedules.Schedule:
        """The counts that a schedule option stands for; None is the model's default.

        Raises:
          InputError: it does not fit the scales, or needs a stage 2 that the model has not.
        """
        if wanted is None:
            wanted = "default" if self.spec.masked_depth else "none"
        schedule = schedules.resolve(self.spec.tokenizer.scale_list, wanted)
        if not self.spec.masked_depth and any(len(row) > 1 for row in schedule):
            raise InputError(
                f"schedule {wanted!r} has masked passes, but this model has no stage 2: schedule='none' is wanted"
            )
        return schedule

    def _in_turns(self, draw, *rows):
        """draw(*rows), from arrays of one row a image to such arrays, for at most _MAX_BATCH images a device at a time.

        Every turn is divided among the devices; the last one is padded to a power of two, to compile rarely.
        """
        turns, total, devices = [], len(rows[0]), len(self._devices)
        for start in range(0, total, _MAX_BATCH * devices):
            count = min(_MAX_BATCH * devices, total - start)
            padded = devices * (1 << (-(-count // devices) - 1).bit_length())
            index = np.minimum(np.arange(start, start + padded), start + count - 1)
            drawn = draw(*(jax.device_put(x[index], self._by_image) for x in rows))
            turns.append(jax.tree.map(lambda x: x[:count], drawn))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *turns)

    def encode(self, image) -> jax.Array:
        """Images (h, w, 3) or (B, h, w, 3), float in [0, 1] or uint8 -> tokens (L,) or (B, L) int32.

        Images of another size are resized, with a warning.
        """
        images, single = self._images(image)
        tokens = self._in_turns(functools.partial(self._encode, self.params), images)
        return tokens[0] if single else tokens

    def decode(self, tokens) -> jax.Array:
        """tokens (L,) or (B, L) -> float32 images (h, w, 3) or (B, h, w, 3) in [0, 1].

        Raises:
          InputError: another number of tokens, or a token outside the codebook.
        """
        tokens = np.asarray(tokens)
        length, vocab_size = self.spec.tokenizer.scale_list.length, self.spec.tokenizer.vocab_size
        shaped = tokens.ndim in (1, 2) and tokens.shape[-1] == length and tokens.size
        if not shaped or not np.issubdtype(tokens.dtype, np.integer):
            raise InputError(
                f"tokens of shape {tokens.shape} and type {tokens.dtype}: ({length},) or (B, {length}) integers are wanted"
            )
        if not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise InputError(
                f"tokens from {tokens.min()} to {tokens.max()}: the codebook has 0 to {vocab_size - 1}"
            )
        images = self._in_turns(
            functools.partial(self._decode, self.params), np.atleast_2d(tokens).astype(np.int32)
        )
        return images[0] if tokens.ndim == 1 else images

    def _images(self, image):
        """(B, h, w, 3) float32 in [0, 1] of the model's size, and whether one image was given."""
        images, single = _as_float(image), np.ndim(image) == 3
        side = self.spec.tokenizer.image_side
        if images.shape[1:3] != (side, side):
            warnings.warn(
                f"resizing a image of {images.shape[2]}x{images.shape[1]} to the model's {side}x{side}",
                stacklevel=3,
            )
            images = np.stack([resize_image(x, side) for x in images])
        return images, single


def _as_float(image) -> np.ndarray:
    """(h, w, 3) or (B, h, w, 3), uint8 or float in [0, 1] -> (B, h, w, 3) float32."""
    image = np.asarray(image)
    images = image[None] if image.ndim == 3 else image
    if images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        raise InputError(f"image of shape {image.shape}: (h, w, 3) or (B, h, w, 3) is wanted")
    if images.dtype == np.uint8:
        return images / np.float32(255)
    if not np.issubdtype(images.dtype, np.floating):
        raise InputError(f"image of type {images.dtype}: uint8, or float in [0, 1] is wanted")
    if not (images.min() >= 0 and images.max() <= 1):
        raise InputError(
            f"image with values from {images.min():g} to {images.max():g}: float images lie in [0, 1]"
        )
    return images.astype(np.float32)


def _mask_of(mask, image_shape) -> tuple[np.ndarray, bool]:
    """(B, h, w) bool, True in the hole, and whether one mask was given."""
    mask = np.asarray(mask)
    single = mask.ndim == 2
    masks = mask[None] if single else mask
    if masks.ndim != 3 or masks.shape[1:] != tuple(image_shape[-3:-1]):
        raise InputError(
            f"mask of shape {mask.shape} for a image of shape {tuple(image_shape)}: (h, w) or (B, h, w) of its size is wanted"
        )
    if masks.dtype == np.uint8:
        masks = masks >= 128
    elif masks.dtype != bool:
        raise InputError(
            f"mask of type {masks.dtype}: bool, or uint8 with 128 and above for the hole, is wanted"
        )
    return masks, single


def resize_image(image, side: int) -> np.ndarray:
    """(h, w, 3) float in [0, 1] -> (side, side, 3), Lanczos, each channel in full precision."""
    channels = [
        Image.fromarray(image[..., c].astype(np.float32)).resize((side, side), Image.LANCZOS)
        for c in range(3)
    ]
    return np.stack([np.asarray(c) for c in channels], -1).clip(0, 1)


def load(
    name: str, dtype: str = "auto", devices=None, checkpoint: int | str = "latest"
) -> Pipeline:
    """A bundled model by name, a run directory, or a model directory.

    Args:
      name: which.
      dtype, devices: as Pipeline's.
      checkpoint: of a run: "latest" (the latest good one), "best" (of least validation loss), or a step.

    Raises:
      InputError: there is no such model or checkpoint, or it is damaged.
    """
    return Pipeline(*load_spec_and_params(name, checkpoint), dtype, devices)


def load_spec_and_params(name: str, checkpoint: int | str = "latest"):
    """As load, but the spec and the parameters {"tokenizer": …, "transformer": …, "masked": …} on the host."""
    directory = pathlib.Path(name) if files.is_local(name) else epath.Path(name)
    there = lambda: (
        os.path.isfile(directory / "config.json")
        if files.is_local(directory)
        else (directory / "config.json").exists()
    )
    if name in bundled_models() and not there():
        directory = _BUNDLED / name
    if not there():  # os.path: unlike Path.is_file, False for any nonsense
        raise InputError(
            f"model {name!r}: neither a bundled model ({', '.join(bundled_models()) or 'none'}) nor a directory with a config.json"
        )
    config = files.read_json(directory / "config.json", "the config of a model or a run")
    if isinstance(config, dict) and config.get("format") == _RUN_FORMAT:
        return _load_run(directory, config, checkpoint)
    if checkpoint != "latest":
        raise InputError(
            f"checkpoint {checkpoint!r} of {name!r}: it is a model, which has no checkpoints; only runs have"
        )
    config, params = checkpoints.load_model(directory)
    return ModelSpec.from_json(config, str(directory / "config.json")), params


def run_config(spec: ModelSpec, config: dict) -> dict:
    """What a run directory's config.json holds: the whole training config, and the model it makes."""
    return {"format": _RUN_FORMAT, "config": config, "model": spec.to_json()}


def _load_run(directory: pathlib.Path | epath.Path, config: dict, checkpoint: int | str):
    spec = ModelSpec.from_json(config.get("model"), str(directory / "config.json"))
    _, saved = checkpoints.load_params_of_run(directory, averaged=True, checkpoint=checkpoint)
    trained = saved["params"]
    if spec.transformer is None:
        return spec, {"tokenizer": trained}
    if spec.masked_depth:
        _, frozen = checkpoints.load_model(directory / STAGE1_FOLDER)
        return spec, {**frozen, "masked": trained}
    _, frozen = checkpoints.load_model(directory / TOKENIZER_FOLDER)
    return spec, {**frozen, "transformer": trained}


def from_torch(
    model: str | None = None,
    *,
    tokenizer: str,
    masked: str | None = None,
    scales=None,
    heads: int | None = None,
    dtype: str = "auto",
) -> Pipeline:
    """Published PyTorch weights as a Pipeline; see convert_torch_files."""
    return Pipeline(
        *convert_torch_files(model, tokenizer=tokenizer, masked=masked, scales=scales, heads=heads),
        dtype,
    )


def convert_torch_files(
    model: str | None = None,
    *,
    tokenizer: str,
    masked: str | None = None,
    scales=None,
    heads: int | None = None,
):
    """Reads published weights.

    Args:
      model: a .pth file with a state dict of stage 1, VAR, stage 2 or the combined HMAR model, or a trainer's checkpoint that
        nests one; None: tokenizer alone. A stage 2 alone predicts whole scales from masks.
      tokenizer: the .pth file of VAR's tokenizer.
      masked: the .pth file of a stage 2 that was trained on the stage 1 in `model`.
      scales: the sides, where the weights' K and L are not those of a published list.
      heads: where the weights do not tell; None takes the published rule, as many as blocks.

    Returns:
      ModelSpec and parameters on the host.

    Raises:
      InputError: a file is unreadable or no such model, the two stages do not fit, or the scale list is not known.
    """
    tokenizer_state = _state_of(tokenizer, "tokenizer", "such as vae.pth")
    licence = "HMAR's published weights are for non-commercial use, VAR's are MIT: the converted weights keep their licence"
    transformer, next_scale, depth, params = None, True, 0, {}
    if model is not None:
        state = _state_of(model, "transformer", "such as hmar.pth")
        combined, alone = convert.is_combined(state), convert.is_stage2(state)
        if masked is not None:
            if combined or alone:
                raise InputError(
                    f"{model}: holds a stage 2 already; a stage 1 is wanted with masked={masked}"
                )
            state2 = _state_of(masked, "transformer", "such as masked.pth")
            if not convert.is_stage2(state2):
                raise InputError(f"{masked}: is no stage 2 by itself")
            transformer, params["transformer"], depth, params["masked"] = convert.join_stages(
                state, state2, scales, heads
            )
        elif combined or alone:
            read = convert.combined_from_state if combined else convert.stage2_from_state
            transformer, params["transformer"], depth, params["masked"] = read(state, scales, heads)
            next_scale = combined
        else:
            transformer, params["transformer"] = convert.transformer_from_state(
                state, scales, heads
            )
        scale_list = transformer.scale_list
    elif masked is not None:
        raise InputError(
            f"masked={masked} without a model: the stage 1 that it was trained on is wanted too"
        )
    else:
        scale_list = convert.tokenizer_scales(tokenizer_state, scales)
    config, params["tokenizer"] = convert.tokenizer_from_state(tokenizer_state, scale_list)
    origin = "converted from " + " and ".join(
        pathlib.Path(p).name for p in (tokenizer, model, masked) if p
    )
    spec = ModelSpec(
        tokenizer=config,
        transformer=transformer,
        masked_depth=depth,
        next_scale=next_scale,
        origin=origin,
        licence=licence,
    )
    return spec, params


def _state_of(path: str, kind: str, example: str):
    """The state dict of the tokenizer or of the transformer in a .pth file."""
    states = convert.load_state_dicts(path)
    if kind not in states:
        other = {"tokenizer": "transformer", "transformer": "tokenizer"}[kind]
        raise InputError(
            f"{path}: holds a {other} and no {kind}; give the {kind}'s file, {example}"
        )
    return states[kind]
